"""The engines that the driver knows: who they are, how to talk to them, and who started them."""

from __future__ import annotations

from dataclasses import dataclass

from sagellm_control_plane.live.lifecycle import EngineSpec
from sagellm_control_plane.types import EngineInfo, EngineState
from sagellm_control_plane.view import EngineProfile
from sagellm_protocol.engine import EngineDescription, EngineStatus
from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.ports import EngineClient

__all__ = ["Engine", "EngineRegistry"]


@dataclass
class Engine:
    """One engine as the live side sees it."""

    info: EngineInfo
    client: EngineClient | None = None
    description: EngineDescription | None = None
    status: EngineStatus | None = None
    spec: EngineSpec | None = None
    missed_probes: int = 0
    joined: bool = False
    hung: bool = False
    lease_s: float = 0.0
    renewed_at: float = 0.0

    def profile(self) -> EngineProfile:
        """Return what the core is told about the engine.

        `info.metadata` may set `zone`, `cost`, `role`, `device` and `slots`. Engines over HTTP that we know to go on with an unfinished
        assistant message continue from text; the others cannot.
        """
        meta, known = self.info.metadata, self.description
        return EngineProfile(
            engine_id=self.info.engine_id,
            model=self.info.model_id,
            kind=self.info.engine_kind,
            slots=int(meta.get("slots", known.max_sequences if known else 0)),
            block_size=known.block_size if known else 16,
            n_blocks=known.n_blocks if known else 0,
            zone=str(meta.get("zone", "")),
            cost=float(meta.get("cost", 1.0)),
            role=str(meta.get("role", "any")),
            device=str(meta.get("device", known.device if known is not None and self.spec is not None else "")),
            journal=_journal(known),
        )


def _journal(known: EngineDescription | None) -> str:
    if known is None or known.device != "remote":
        return "tokens"
    return "text" if known.backend in ("vllm", "sglang") else "none"


class EngineRegistry:
    """Engines by id."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}

    def add(self, engine: Engine) -> None:
        """Take in an engine.

        Raises:
            InvalidArgumentError: its id is taken.
        """
        engine_id = engine.info.engine_id
        known = self._engines.get(engine_id)
        if known is not None:
            raise InvalidArgumentError(
                f"engine {engine_id!r} is registered already ({known.info.state.value}, model {known.info.model_id}): "
                f"unregister it first, or choose another engine_id",
                param="engine_id",
            )
        self._engines[engine_id] = engine

    def get(self, engine_id: str) -> Engine:
        """Return an engine.

        Raises:
            InvalidArgumentError: nobody registered it.
        """
        engine = self._engines.get(engine_id)
        if engine is None:
            known = ", ".join(sorted(self._engines)) or "none"
            raise InvalidArgumentError(f"engine {engine_id!r} is unknown: known are {known}", param="engine_id")
        return engine

    def find(self, engine_id: str) -> Engine | None:
        """Return an engine, or None."""
        return self._engines.get(engine_id)

    def remove(self, engine_id: str) -> Engine:
        """Forget an engine and return it."""
        engine = self.get(engine_id)
        del self._engines[engine_id]
        return engine

    def all(self) -> list[Engine]:
        """All engines in the order of registration."""
        return list(self._engines.values())

    def of_model(self, model_id: str) -> list[Engine]:
        """Engines that serve a model, in whatever state."""
        return [engine for engine in self._engines.values() if engine.info.model_id == model_id]

    def in_state(self, state: EngineState) -> list[Engine]:
        """Engines in one state."""
        return [engine for engine in self._engines.values() if engine.info.state is state]
