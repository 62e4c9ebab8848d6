"""The process behind ``sage-llm serve``: brings the house up, says so, and takes it down on Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sagellm._version import __version__
from sagellm.cli.failures import describe
from sagellm_protocol.errors import SageError

if TYPE_CHECKING:
    import socket

    from sagellm.compose import House
    from sagellm_core.config import EngineConfig
    from sagellm_gateway.config import GatewayConfig
    from sagellm_gateway.uvicorn_server import GatewayServer

__all__ = ["ServeOptions", "announce", "engine_name", "say", "serve_until_stopped"]


@dataclass(frozen=True)
class ServeOptions:
    """What to serve and where.

    Attributes:
        host, port: address to listen on; port 0 takes a free one.
        models: (name or None, stored name or path) of each model.
        engines: engine processes for each model.
        roles: of a model's engines in turn (``prefill``, ``decode``, ``any``), or none.
        policy: scheduling policy.
        control: further keyword arguments of `ControlPlaneManager`: routing, and what is switched on.
        changes: to every engine's configuration.
        gateway: further fields of `GatewayConfig`.
        grace_s: seconds for running requests after SIGTERM.
        access_log: write one line for each request to stderr.
        workers: gateway processes; with more than one a supervisor owns the engines.
        keep_alive_s: idle seconds after which an engine unloads its model; 0 is never.
    """

    host: str
    port: int
    models: tuple[tuple[str | None, str], ...]
    engines: int = 1
    roles: tuple[str, ...] = ()
    policy: str = "adaptive"
    control: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    gateway: dict[str, Any] = field(default_factory=dict)
    grace_s: float = 30.0
    access_log: bool = False
    workers: int = 1
    keep_alive_s: float = 0.0

    def configs(self) -> list[EngineConfig]:
        """Return the configuration of each model's engines.

        Raises:
            SageError: a model is missing or a setting is wrong.
        """
        from sagellm import compose

        shared = len(self.models) > 1
        return [compose.engine_config(model, self.changes, name=name, shared=shared) for name, model in self.models]

    def planned(self, configs: Iterable[EngineConfig]) -> list[tuple[str, str, dict[str, Any]]]:
        """Return model, engine id and options of each engine that is to run."""
        return [
            (c.served_id, engine_name(c.served_id, k, self.engines), {"role": self.roles[k]} if self.roles else {})
            for c in configs
            for k in range(self.engines)
        ]


def serve_until_stopped(options: ServeOptions) -> None:
    """Serve until a signal; returns after a clean stop.

    Raises:
        SystemExit: the port is in use, or an engine could not be started.
        SageError: a model is missing or a setting is wrong.
    """
    began = time.perf_counter()
    import msgspec

    from sagellm import compose
    from sagellm_gateway.config import GatewayConfig
    from sagellm_gateway.listen import bind

    configs = options.configs()
    sock = bind(options.host, options.port)
    port = sock.getsockname()[1]
    fields = {"host": options.host, "port": port, "timeouts": {"grace": options.grace_s}, **options.gateway}
    gateway = msgspec.convert(fields, GatewayConfig)
    if options.access_log:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("sagellm_gateway.access").setLevel(logging.INFO)
    url = f"http://{_shown_host(options.host)}:{port}"
    if options.workers > 1:
        _supervise(options, gateway, sock, url)
        return
    house = compose.build_server(
        configs,
        gateway,
        options.changes,
        remember=options.port != 0,
        keep_alive_s=options.keep_alive_s,
        begin=options.planned(configs),
        scheduling_policy=options.policy,
        **options.control,
    )
    start = _Start(house, configs, options, url, began)
    try:
        _serve(house, start, gateway, sock)
    finally:
        house.drop_begun()
    if start.failure is not None:
        raise SystemExit(f"error: {describe(start.failure)}")
    say("stopped", "")


def _serve(house: House, start: _Start, gateway: GatewayConfig, sock: socket.socket) -> None:
    from sagellm_gateway.listen import refuse_open_door
    from sagellm_gateway.uvicorn_server import server_of

    app = house.server_app(start.lifespan)
    refuse_open_door(app.state.gateway, gateway)
    start.server = server_of(app, gateway)
    say("isagellm", f"{__version__}, pid {os.getpid()}")
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how one stops a server
        start.server.run(sockets=[sock])


def _supervise(options: ServeOptions, gateway: GatewayConfig, sock: socket.socket, url: str) -> None:
    from sagellm import compose
    from sagellm.cli.workers import Supervisor
    from sagellm_gateway.listen import refuse_open_door

    # An application that serves nobody: it knows the keys, and whether this address may be open.
    house = compose.build_worker([], gateway, None, {})
    nobodys = house.server_app(contextlib.nullcontext).state.gateway
    try:
        refuse_open_door(nobodys, gateway)
        keys = house.key_state()
    finally:
        nobodys.close_state()
    with sock:
        supervisor = Supervisor(options, gateway, sock, url, keys)
        say("isagellm", f"{__version__}, pid {os.getpid()}")
        asyncio.run(supervisor.run())
    say("stopped", "")


def engine_name(model_id: str, k: int, engines: int) -> str:
    """Return the id of a model's engine number `k`, counted from 0."""
    return model_id if engines == 1 else f"{model_id}-{k + 1}"


def announce(url: str, began: float, keys: tuple[bool, str], configs: list[EngineConfig]) -> None:
    """Say that everything is up, and what to do now; `keys` tells whether one is needed, and who may call."""
    needed, who = keys
    say("ready", f"{url}/v1 ({time.perf_counter() - began:.1f} s)")
    say("keys", who)
    if configs:
        say("try", _curl(url, configs[0].served_id, with_key=needed))
    say("stop", f"Ctrl-C, or: kill {os.getpid()}")


def _curl(url: str, model: str, *, with_key: bool) -> str:
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is the capital of France? Answer in one sentence."}}], "temperature": 0}}'
    key = ' -H "Authorization: Bearer $SAGE_UNIFIED_API_KEY"' if with_key else ""
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"


def trim_heap() -> None:
    """Give back to the system what loading tokenizers has freed: some 10 MB that malloc would keep. Does nothing without glibc."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _Start:
    """Starts the engines once the event loop runs, and tells about each phase."""

    def __init__(
        self, house: House, configs: list[EngineConfig], options: ServeOptions, url: str, began: float
    ) -> None:
        self.house = house
        self.configs = configs
        self.options = options
        self.url = url
        self.began = began
        self.server: GatewayServer | None = None
        self.failure: SageError | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Run `_bring_up` beside the server."""
        task = asyncio.create_task(self._bring_up())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _bring_up(self) -> None:
        from sagellm_gateway.uvicorn_server import calm_collector

        self.house.set_ready(False)
        try:
            for model_id, engine_id, options in self.options.planned(self.configs):
                started = time.perf_counter()
                line = await self.house.start_engine(model_id, engine_id, options)
                say("engine", f"{line} ({time.perf_counter() - started:.1f} s)")
        except SageError as error:
            self.failure = error
            if self.server is not None:
                self.server.should_exit = True
            return
        calm_collector()
        self.house.set_ready(True)
        trim_heap()
        announce(self.url, self.began, self.house.key_state(), self.configs)


def _shown_host(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 - shown, not bound


def say(what: str, text: str) -> None:
    """Print one line of the start."""
    sys.stdout.write(f"{what:<9}{text}".rstrip() + "\n")
    sys.stdout.flush()
