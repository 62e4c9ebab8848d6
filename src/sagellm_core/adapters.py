"""The LoRA adapters of one engine, loaded and unloaded while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from sagellm_backend.adapter import Adapter, AdapterRunner
from sagellm_backend.base import Runner
from sagellm_protocol.errors import InvalidArgumentError, ModelFileError, ResourceExhaustedError, UnsupportedError

__all__ = ["AdapterTable"]


@dataclass(slots=True)
class _Entry:
    number: int
    adapter: Adapter


class AdapterTable:
    """Name -> the number that the device knows it by. Called from the step loop only.

    Args:
        runner: the engine's.
        max_bytes: hard cap for the factors of all adapters together.
    """

    def __init__(self, runner: Runner, max_bytes: int) -> None:
        self._runner, self._max_bytes = runner, max_bytes
        self._entries: dict[str, _Entry] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that are loaded."""
        return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of their factors."""
        return sum(entry.adapter.nbytes for entry in self._entries.values())

    def number(self, name: str | None) -> int:
        """Return what stands in `StepBatch.adapters`; -1 for None.

        Raises:
            InvalidArgumentError: it is not loaded; the message lists those that are.
        """
        if name is None:
            return -1
        entry = self._entries.get(name)
        if entry is None:
            loaded = ", ".join(self._entries) or "none"
            raise InvalidArgumentError(f"adapter {name!r} is not loaded; loaded are: {loaded}", param="adapter")
        return entry.number

    def load(self, adapter: Adapter) -> None:
        """Make an adapter usable under its name.

        Raises:
            InvalidArgumentError: the name is taken or empty.
            UnsupportedError: the backend takes no adapters.
            ResourceExhaustedError: the cap would be passed; the message has the numbers.
            ModelFileError: it does not fit the model.
        """
        if not isinstance(self._runner, AdapterRunner):
            raise UnsupportedError(
                "this backend takes no adapters: start the engine with --backend cpu or reference", param="adapter"
            )
        if not adapter.name or adapter.name in self._entries:
            raise InvalidArgumentError(f"adapter name {adapter.name!r} is empty or taken: choose another", param="name")
        if self.nbytes + adapter.nbytes > self._max_bytes:
            raise ResourceExhaustedError(
                f"adapter {adapter.name!r} has {adapter.nbytes / 1e6:.1f} MB, {self.nbytes / 1e6:.1f} MB of "
                f"{self._max_bytes / 1e6:.1f} MB are in use: unload another first"
            )
        used = {entry.number for entry in self._entries.values()}
        number = next(n for n in range(len(used) + 1) if n not in used)
        try:
            self._runner.load_adapter(number, adapter)
        except ValueError as error:
            raise ModelFileError(f"the adapter does not fit the model: {error}") from error
        self._entries[adapter.name] = _Entry(number, adapter)

    def unload(self, name: str, in_use: Iterable[str | None]) -> None:
        """Forget an adapter; `in_use` are the names that sequences hold now.

        Raises:
            InvalidArgumentError: it is not loaded, or sequences use it.
        """
        number = self.number(name)
        users = Counter(in_use)[name]
        if users:
            raise InvalidArgumentError(
                f"{users} sequences use adapter {name!r}: unload it when they have ended", param="name"
            )
        assert isinstance(self._runner, AdapterRunner)
        self._runner.unload_adapter(number)
        del self._entries[name]
