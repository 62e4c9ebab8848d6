"""What every handler shares (`Gateway`), and one request in the hands of its handler (`Call`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from sagellm_gateway import jsonbody
from sagellm_gateway.config import GatewayConfig
from sagellm_gateway.errors import HttpError, Shape, openai_body, render, status_of
from sagellm_gateway.guard import ClientGoneError, Deadline, InFlight
from sagellm_gateway.library import ModelLibrary, NoLibrary
from sagellm_protocol.errors import InternalError, SageError, UnavailableError

if TYPE_CHECKING:
    from sagellm_gateway.batches import BatchRunner
    from sagellm_gateway.keyring import KeyRing
    from sagellm_gateway.metrics import Metrics
    from sagellm_gateway.peers import Peers
    from sagellm_gateway.store.batches import BatchStore
    from sagellm_gateway.store.database import Database
    from sagellm_gateway.store.files import FileStore
    from sagellm_gateway.store.keys import KeyStore
    from sagellm_gateway.store.responses import ResponseStore
    from sagellm_gateway.store.sessions import SessionStore

__all__ = ["ANONYMOUS", "Call", "Endpoint", "Gateway", "Principal"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

log = logging.getLogger("sagellm_gateway")

_JSON = (b"content-type", b"application/json")
_TYPES_THAT_MAY_BE_JSON = re.compile(
    rb"^(application/([\w.+-]*\+)?json|application/x-www-form-urlencoded)\s*(;.*)?$", re.I
)
_TELL_S = 0.1
_encode = msgspec.json.Encoder().encode


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who calls. `key_id` is empty when no key is demanded."""

    key_id: str = ""
    name: str = ""
    role: str = "admin"


ANONYMOUS = Principal()


class Gateway:
    """The parts that handlers share. One for each app.

    Attributes:
        manager: the control plane; anything with the methods of `ControlPlaneManager`.
        config: settings.
        library: the models on disk.
        ready: whether start-up is over.
        draining: set once by `drain`; new work is answered 503 from then on.
        in_flight: guards of the requests that run.
        background: responses that are made without a listener, by id.
        peers: the other processes that share the port, where there are any.
    """

    def __init__(self, manager: Any, config: GatewayConfig, library: ModelLibrary | None = None) -> None:
        self.manager = manager
        self.library: ModelLibrary = library or NoLibrary()
        self.config = config
        self.ready = False
        self.draining = False
        self.in_flight = InFlight()
        self.background: dict[str, Any] = {}
        self.peers: Peers | None = None
        self.started_at = time.time()
        self._flusher: asyncio.Task[None] | None = None
        self._teller: asyncio.Task[None] | None = None

    @cached_property
    def database(self) -> Database:
        """The state file, opened when it is first needed."""
        from sagellm_gateway.store.database import Database

        return Database(self.config.state_path)

    @cached_property
    def responses(self) -> ResponseStore:
        """Stored responses."""
        from sagellm_gateway.store.responses import ResponseStore

        return ResponseStore(self.database, self.config.response_limit, self.config.response_ttl_s)

    @cached_property
    def files(self) -> FileStore:
        """Uploaded files and results of batches."""
        from sagellm_gateway.store.files import FileStore

        return FileStore(self.database, self.config.limits.stored_bytes)

    @cached_property
    def batches(self) -> BatchStore:
        """Batches, as they are stored."""
        from sagellm_gateway.store.batches import BatchStore

        return BatchStore(self.database)

    @cached_property
    def runner(self) -> BatchRunner:
        """The batches that are under way."""
        from sagellm_gateway.batches import BatchRunner
        from sagellm_gateway.routes.table import ROUTES
        from sagellm_gateway.routing import Router

        return BatchRunner(self, Router(self, ROUTES))

    @cached_property
    def sessions(self) -> SessionStore:
        """Conversations that the server remembers."""
        from sagellm_gateway.store.sessions import SessionStore

        return SessionStore(self.database, self.config.session_ttl_s, self.config.limits.sessions)

    @cached_property
    def keys(self) -> KeyStore:
        """API keys and their usage."""
        from sagellm_gateway.store.keys import KeyStore

        return KeyStore(self.database)

    @cached_property
    def keyring(self) -> KeyRing:
        """The keys in memory, with their rates."""
        from sagellm_gateway.keyring import KeyRing

        return KeyRing(self.keys, self.config.require_key, self.config.limits.key_bytes)

    @cached_property
    def metrics(self) -> Metrics:
        """Prometheus collectors of this app."""
        from sagellm_gateway.metrics import Metrics

        return Metrics(self)

    async def open(self) -> None:
        """Settle what an earlier process left unfinished, and begin to record usage."""
        self._flusher = asyncio.create_task(self.keyring.keep_flushing())
        if self.config.state_path is not None:
            await self.responses.fail_unfinished()
            await self.runner.resume()

    async def close(self) -> None:
        """End background work and close the state file."""
        for run in list(self.background.values()):
            await run.stop()
        if "runner" in self.__dict__:
            await self.runner.stop()
        if self._teller is not None:
            self._teller.cancel()
        if self._flusher is not None:
            self._flusher.cancel()
            await self.keyring.flush()
        self.close_state()

    def close_state(self) -> None:
        """Close the state file, if it is open."""
        if "database" in self.__dict__:
            self.database.close()

    def duty(self, what: str, body: Any = None) -> Any:
        """Do what a peer asked of this process; see `sagellm_gateway.peers.duty`."""
        from sagellm_gateway.peers import duty

        return duty(self, what, body)

    def share(self, peers: Peers) -> None:
        """From now on there are other processes on the port: what keys spend is told to them as it is spent."""
        self.peers = peers
        self._teller = asyncio.create_task(self._keep_telling(peers))

    async def _keep_telling(self, peers: Peers) -> None:
        while True:
            await asyncio.sleep(_TELL_S)
            spent = self.keyring.take_spent()
            if spent:
                await peers.ask("spent", spent)

    async def everywhere(self, what: str, body: Any = None, *, lasting: str = "") -> list[Any]:
        """Do a duty here, then in each process that shares the port; return the answers, the own first.

        Raises:
            SageError: it cannot be done here; then nobody else was asked.
        """
        own = self.duty(what, body)
        return [own] if self.peers is None else [own, *await self.peers.ask(what, body, lasting)]

    def admit(self) -> None:
        """Check that new work may start.

        Raises:
            UnavailableError: the gateway is draining.
            HttpError: 429, too many requests are in flight.
        """
        if self.draining:
            raise UnavailableError("the server is shutting down: try another one", retry_after_s=5)
        bound = self.config.limits.in_flight
        unattended = sum(not run.done for run in self.background.values()) if self.background else 0
        if len(self.in_flight) + unattended >= bound:
            raise HttpError(
                429,
                f"{bound} requests are in flight, the most this server takes",
                code="too_many_requests",
                retry_after_s=1,
            )

    def drain(self) -> None:
        """Refuse new work from now on."""
        self.draining = True

    async def finish(self, grace_s: float) -> int:
        """Wait for the requests in flight; fail those that are left after `grace_s` seconds and return their number."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.in_flight.idle(), grace_s)
        left = self.in_flight.guards()
        for guard in left:
            guard.fail(UnavailableError("the server shut down before the answer was complete"))
        return len(left)


class Call:
    """One request: its scope, its body, and the ways to answer it.

    Attributes:
        headers: the first of each name (in lower case).
    """

    __slots__ = ("gateway", "headers", "headers_out", "receive", "request_id", "scope", "send", "shape", "started")

    def __init__(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send, shape: Shape) -> None:
        self.gateway = gateway
        self.scope = scope
        self.receive = receive
        self.send = send
        self.shape = shape
        self.request_id: str = scope.get("sagellm.request_id", "")
        self.headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        self.headers_out: Headers = []
        self.started = False

    @property
    def principal(self) -> Principal:
        """Who calls, as the key check found."""
        return self.scope.get("sagellm.principal", ANONYMOUS)  # type: ignore[no-any-return]

    def used(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Note the tokens of this request, for metrics, rates and budgets."""
        before = self.scope.get("sagellm.tokens", (0, 0))
        self.scope["sagellm.tokens"] = (before[0] + prompt_tokens, before[1] + completion_tokens)

    def defaults(self, model: str) -> Mapping[str, float]:
        """Return the sampling that the makers of `model` recommend.

        Raises:
            ModelNotFoundError: it is not served.
        """
        found = self.gateway.manager.chat_model(model)
        # An embedding model has none; asking it to generate is refused further down.
        return getattr(found, "sampling_defaults", {})

    def path(self, name: str) -> str:
        """Return a parameter of the route."""
        return str(self.scope["path_params"][name])

    def header(self, name: bytes) -> bytes | None:
        """Return the first header of that (lower-case) name."""
        return self.headers.get(name)

    def query(self) -> dict[str, str]:
        """Return the query string's parameters, the last of each name."""
        from urllib.parse import parse_qsl

        raw = self.scope.get("query_string", b"").decode("latin-1")
        return dict(parse_qsl(raw, keep_blank_values=True, max_num_fields=64))

    async def body(self, max_bytes: int | None = None) -> bytes:
        """Read the request body, counting while it streams.

        Raises:
            HttpError: 413 too large, 415 encoded, 408 too slow.
        """
        limits, timeouts = self.gateway.config.limits, self.gateway.config.timeouts
        bound = limits.body_bytes if max_bytes is None else max_bytes
        if self.headers.get(b"content-encoding", b"") not in (b"", b"identity"):
            raise HttpError(
                415, "a Content-Encoding is not accepted: send the body uncompressed", code="unsupported_encoding"
            )
        taken = self.scope.get("sagellm.whole_body")
        whole: bytes | None = taken() if taken is not None else None
        if whole is not None:
            if len(whole) > bound:
                raise _too_large(bound)
            return whole
        length = self.headers.get(b"content-length")
        if length is not None and length.isdigit() and int(length[:20]) > bound:
            await self._discard()
            raise _too_large(bound)
        try:
            with Deadline(timeouts.body):
                first = await self.receive()
                if first["type"] == "http.request" and not first.get("more_body"):
                    if len(first.get("body", b"")) > bound:
                        raise _too_large(bound)
                    return bytes(first.get("body", b""))
                return await self._rest(first, bound)
        except asyncio.TimeoutError:
            raise HttpError(
                408, f"the body did not arrive within {timeouts.body:g} s", code="body_timeout", headers=_CLOSE
            ) from None

    async def _rest(self, message: Message, bound: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            if message["type"] != "http.request":
                # Some servers report a malformed chunk as a disconnect, and still pass the answer on.
                raise HttpError(400, "the connection ended before the body was complete", code="incomplete_body")
            part = message.get("body", b"")
            size += len(part)
            if size > bound:
                parts.clear()
                await self._discard()
                raise _too_large(bound)
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)
            message = await self.receive()

    async def _discard(self) -> None:
        """Swallow input for a moment: closing with unread input would reset the connection before the answer is read."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._swallow(), 5.0)

    async def _swallow(self) -> None:
        while True:
            message = await asyncio.wait_for(self.receive(), 0.5)
            if not message.get("more_body"):
                return

    async def json_object(self) -> dict[str, Any]:
        """Read the body as one JSON object; see `sagellm_gateway.jsonbody`."""
        content_type = self.headers.get(b"content-type")
        if content_type and content_type != b"application/json" and not _TYPES_THAT_MAY_BE_JSON.match(content_type):
            raise HttpError(415, "send the body as Content-Type: application/json", code="unsupported_media_type")
        body = await self.body()
        depth = self.gateway.config.limits.json_depth
        if len(body) > 1_000_000:
            return await asyncio.to_thread(jsonbody.decode_object, body, depth)
        return jsonbody.decode_object(body, depth)

    def ignore(self, names: Sequence[str]) -> None:
        """Name request fields that have no effect in the response header ``x-sagellm-ignored-params``."""
        if names:
            shown = [name if _PLAIN.match(name) else "?" for name in names]
            self.headers_out.append((b"x-sagellm-ignored-params", ",".join(shown[:32]).encode()))

    async def reply(
        self, body: bytes, *, status: int = 200, content_type: bytes | None = None, headers: Headers | None = None
    ) -> None:
        """Answer with a whole body."""
        self.started = True
        kind = _JSON if content_type is None else (b"content-type", content_type)
        all_headers = [kind, (b"content-length", str(len(body)).encode()), *self.headers_out, *(headers or ())]
        await self.send({"type": "http.response.start", "status": status, "headers": all_headers})
        await self.send({"type": "http.response.body", "body": body})

    async def json(self, value: Any, *, status: int = 200, headers: Headers | None = None) -> None:
        """Answer with JSON."""
        await self.reply(_encode(value), status=status, headers=headers)

    async def fail(self, error: SageError) -> None:
        """Answer with `error` in the dialect's shape."""
        status, headers, body = render(error, self.shape, self.request_id)
        await self.reply(body, status=status, headers=headers)


Handler = Callable[[Call], Awaitable[None]]


class Endpoint:
    """ASGI application around a handler; the one place where failures become answers."""

    def __init__(self, gateway: Gateway, handler: Handler, shape: Shape = openai_body) -> None:
        self.gateway = gateway
        self.handler = handler
        self.shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        call = Call(self.gateway, scope, receive, send, self.shape)
        try:
            await self.handler(call)
        except ClientGoneError:
            scope["sagellm.outcome"] = "cancelled"
            if not call.started:
                await call.reply(b"", status=499)
        except SageError as error:
            scope["sagellm.outcome"] = error.code.value
            if status_of(error) >= 500 and not isinstance(error, UnavailableError):
                log.exception("request %s failed: %s", call.request_id, error.code.value)
            await self._fail(call, error)
        except Exception as error:  # the border: whatever it is, the client gets a clean 500 and the log the rest
            scope["sagellm.outcome"] = "internal"
            log.exception("request %s failed", call.request_id)
            await self._fail(call, InternalError(type(error).__name__))

    async def _fail(self, call: Call, error: SageError) -> None:
        if call.started:
            # A half-sent answer cannot be taken back; ending the task without completing it closes the connection.
            return
        await call.fail(error)


_CLOSE = ((b"connection", b"close"),)
_PLAIN = re.compile(r"^[A-Za-z0-9_.\-]{1,64}$")


def _too_large(bound: int) -> HttpError:
    return HttpError(
        413, f"the body is larger than {bound} bytes, the most this server takes", code="body_too_large", headers=_CLOSE
    )
