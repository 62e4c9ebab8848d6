"""Engines that nobody registers by hand: those of a file, and those that answer on local ports."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from sagellm_control_plane.live.http1 import Http1Client, HttpBrokenError, HttpRefusedError
from sagellm_control_plane.types import EngineInfo
from sagellm_protocol.errors import InvalidArgumentError, SageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["LOCAL_PORTS", "Directory", "EngineEntry", "read_engine_file"]

_log = logging.getLogger(__name__)

#: Where servers of other makers listen by default: vLLM, llama.cpp, Ollama, SGLang, and the old ports of this project's engines.
LOCAL_PORTS = (8000, 8001, 8002, 8080, 8090, 8091, 8901, 11434, 30000)

_FLAVOURS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp", "library": "ollama"}
_OURS = "isagellm"  # a gateway: registering it would send requests around in circles


class EngineEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine of the file; the fields are those of `ControlPlaneManager.register_engine`."""

    engine_id: str
    model_id: str
    host: str
    port: int
    engine_kind: str = "llm"
    metadata: dict[str, Any] = {}


class _File(msgspec.Struct, forbid_unknown_fields=True):
    engines: list[EngineEntry]


def read_engine_file(path: Path) -> dict[str, EngineEntry]:
    """Return the engines of a file (``.json`` or TOML) with one list, ``engines``, by id.

    Raises:
        InvalidArgumentError: it cannot be read, is of another form, or names an id twice.
    """
    try:
        if path.suffix == ".json":
            entries = msgspec.json.decode(path.read_bytes(), type=_File).engines
        else:
            entries = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _File).engines
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"the engine file {path} cannot be used: {error}", param="engine_file") from None
    found = {entry.engine_id: entry for entry in entries}
    if len(found) < len(entries):
        raise InvalidArgumentError(f"the engine file {path} names an engine_id twice", param="engine_file")
    return found


class Register(Protocol):
    """`Engines.register`."""

    def __call__(
        self, engine_id: str, model_id: str, host: str, port: int, kind: str, metadata: Mapping[str, Any], *, keep: bool
    ) -> EngineInfo:
        """Register an engine by its address; `keep` notes it for the next control plane."""
        ...


class Directory:
    """Keeps the registry in step with a file and with local ports, every `interval_s` seconds.

    An engine that left the file is unregistered; what ran on it goes on elsewhere. A file that cannot be used after a change leaves
    everything as it is, and says so in the log. One that was found on a port stays: probes tell whether it lives.

    Args:
        register, unregister, known: of the control plane's engines.
        file: list of engines, or None.
        ports: of 127.0.0.1, looked at each time.
        interval_s: between looks.

    Raises:
        InvalidArgumentError: the file cannot be used.
    """

    def __init__(
        self,
        register: Register,
        unregister: Callable[[str], object],
        known: Callable[[str], bool],
        *,
        file: Path | None,
        ports: Sequence[int],
        interval_s: float = 2.0,
    ) -> None:
        self._register = register
        self._unregister = unregister
        self._known = known
        self._file = file
        self._ports = tuple(ports)
        self._interval_s = interval_s
        self._entries: dict[str, EngineEntry] = {}
        self._wanted = read_engine_file(file) if file is not None else {}
        self._stamp = _stamp(file)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take in what there is, and begin to follow it."""
        self._follow(self._wanted)
        self._task = asyncio.get_running_loop().create_task(self._run(), name="control-plane-directory")

    async def stop(self) -> None:
        """Follow no more. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.gather(*(self._look(port) for port in self._ports))
            await asyncio.sleep(self._interval_s)
            self._read_again()

    def _read_again(self) -> None:
        stamp = _stamp(self._file)
        if self._file is None or stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            wanted = read_engine_file(self._file)
        except SageError as error:
            _log.warning("%s: the engines stay as they are", error.message)
            return
        self._follow(wanted)

    def _follow(self, wanted: Mapping[str, EngineEntry]) -> None:
        for engine_id, entry in list(self._entries.items()):
            if wanted.get(engine_id) != entry:
                del self._entries[engine_id]
                if self._known(engine_id):
                    self._unregister(engine_id)
        for engine_id, entry in wanted.items():
            if engine_id not in self._entries and self._add(entry):
                self._entries[engine_id] = entry

    def _add(self, entry: EngineEntry) -> bool:
        try:
            self._register(
                entry.engine_id, entry.model_id, entry.host, entry.port, entry.engine_kind, entry.metadata, keep=False
            )
        except SageError as error:
            _log.warning("engine %s cannot be registered: %s", entry.engine_id, error.message)
            return False
        return True

    async def _look(self, port: int) -> None:
        """Register every model that a server on `port` offers."""
        client = Http1Client(f"http://127.0.0.1:{port}", {}, connect_s=1.0, keep=0)
        try:
            reply = await asyncio.wait_for(client.request("GET", "/v1/models"), 2.0)
            rows = msgspec.json.decode(reply.content, type=_Models).data if reply.status == 200 else []
        except (HttpRefusedError, HttpBrokenError, asyncio.TimeoutError, msgspec.MsgspecError):
            return  # nobody there, or somebody else
        for row in rows:
            engine_id = f"127.0.0.1:{port}/{row.id}"
            if row.owned_by != _OURS and not self._known(engine_id):
                metadata = {"flavour": _FLAVOURS.get(row.owned_by, "openai")}
                self._add(
                    EngineEntry(engine_id=engine_id, model_id=row.id, host="127.0.0.1", port=port, metadata=metadata)
                )


class _Model(msgspec.Struct):
    id: str
    owned_by: str = ""


class _Models(msgspec.Struct):
    data: list[_Model]


def _stamp(file: Path | None) -> tuple[int, int] | None:
    try:
        status = file.stat() if file is not None else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size) if status is not None else None
