"""What happens to the control plane (events) and what it wants done (commands); both are plain data that can be logged."""

from __future__ import annotations

import msgspec

from sagellm_control_plane.view import EngineProfile, RequestView
from sagellm_protocol.engine import EngineStatus
from sagellm_protocol.errors import Error, ErrorCode

__all__ = [
    "Abort",
    "AttemptFailed",
    "AttemptFinished",
    "BlocksChanged",
    "BlocksSnapshot",
    "Command",
    "Dispatch",
    "EngineDied",
    "EngineJoined",
    "EngineLeft",
    "EngineReported",
    "EngineStateChanged",
    "Event",
    "Fail",
    "FirstToken",
    "HedgeDue",
    "PolicyChanged",
    "ProbeNow",
    "RequestArrived",
    "RequestCancelled",
    "RestartHung",
    "SnapshotWanted",
    "Tick",
]


class _Event(msgspec.Struct, frozen=True, tag=True, gc=False, omit_defaults=True):
    pass


class EngineJoined(_Event, frozen=True, gc=False):
    """An engine was registered; it is STARTING until it is said to be ready."""

    engine: EngineProfile


class EngineStateChanged(_Event, frozen=True, gc=False):
    """An engine is READY, DRAINING, STARTING, STOPPED or in ERROR. READY after anything else means empty caches only if `fresh`."""

    engine_id: str
    state: str
    fresh: bool = False


class EngineDied(_Event, frozen=True, gc=False):
    """An engine ended or cannot be reached; `restarting` when somebody brings it back."""

    engine_id: str
    restarting: bool = False


class EngineLeft(_Event, frozen=True, gc=False):
    """An engine was unregistered."""

    engine_id: str


class EngineReported(_Event, frozen=True, gc=False):
    """An engine said what it is doing."""

    status: EngineStatus


class RequestArrived(_Event, frozen=True, gc=False):
    """One sequence wants an engine."""

    request: RequestView


class FirstToken(_Event, frozen=True, gc=False):
    """An attempt produced its first new token; `cached_tokens` as the engine counted them, -1 if it did not say."""

    request_id: str
    attempt: int
    cached_tokens: int = -1


class AttemptFinished(_Event, frozen=True, gc=False):
    """An attempt ended well, with `output_tokens` in the whole sequence."""

    request_id: str
    attempt: int
    output_tokens: int


class AttemptFailed(_Event, frozen=True, gc=False):
    """An attempt ended badly; `emitted` tokens of the sequence had reached us."""

    request_id: str
    attempt: int
    error: Error
    emitted: int = 0


class RequestCancelled(_Event, frozen=True, gc=False):
    """The client went away, or had enough (`finished`: a stop string matched): `output_tokens` were used."""

    request_id: str
    output_tokens: int = 0
    finished: bool = False


class HedgeDue(_Event, frozen=True, gc=False):
    """The time named in `Dispatch.hedge_after_s` has passed without a first token."""

    request_id: str


class BlocksChanged(_Event, frozen=True, gc=False):
    """An engine's own block event (see `sagellm_protocol.prefix.BlockEvent`); several that follow each other may be joined."""

    engine_id: str
    sequence: int
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    cleared: bool = False


class BlocksSnapshot(_Event, frozen=True, gc=False):
    """All blocks that an engine holds, least recently used first."""

    engine_id: str
    sequence: int
    blocks: tuple[bytes, ...] = ()


class PolicyChanged(_Event, frozen=True, gc=False):
    """Another policy from the next request on; an empty name leaves that part as it is."""

    scheduling_policy: str = ""
    routing_strategy: str = ""


class Tick(_Event, frozen=True, gc=False):
    """Time passed."""


Event = (
    EngineJoined
    | EngineStateChanged
    | EngineDied
    | EngineLeft
    | EngineReported
    | RequestArrived
    | FirstToken
    | AttemptFinished
    | AttemptFailed
    | RequestCancelled
    | HedgeDue
    | BlocksChanged
    | BlocksSnapshot
    | PolicyChanged
    | Tick
)


class Dispatch(msgspec.Struct, frozen=True, tag=True, gc=False, omit_defaults=True):
    """Send the sequence to an engine. `attempt` counts from 1; `hedge_after_s` asks for a `HedgeDue`.

    With a `prefill_engine_id` that engine computes the prompt and the first token, and hands its KV over to `engine_id`.
    """

    request_id: str
    attempt: int
    engine_id: str
    hit_tokens: int = 0
    predicted_ttft_s: float = 0.0
    hedge: bool = False
    hedge_after_s: float | None = None
    reason: str = ""
    prefill_engine_id: str = ""


class Fail(msgspec.Struct, frozen=True, tag=True, gc=False, omit_defaults=True):
    """Tell the client; nothing of this request is left anywhere."""

    request_id: str
    error: Error


class Abort(msgspec.Struct, frozen=True, tag=True, gc=False, omit_defaults=True):
    """Stop one attempt on its engine and report nothing more of it."""

    request_id: str
    attempt: int
    engine_id: str


class RestartHung(msgspec.Struct, frozen=True, tag=True, gc=False, omit_defaults=True):
    """The engine has work and makes no steps: fail its attempts and restart it if it is ours."""

    engine_id: str
    idle_s: float


class ProbeNow(msgspec.Struct, frozen=True, tag=True, gc=False, omit_defaults=True):
    """Find out whether the engine still answers."""

    engine_id: str


class SnapshotWanted(msgspec.Struct, frozen=True, tag=True, gc=False, omit_defaults=True):
    """Block events of this engine have a gap: fetch its whole list."""

    engine_id: str


Command = Dispatch | Fail | Abort | RestartHung | ProbeNow | SnapshotWanted


def unavailable(message: str, retry_after_s: float | None = None) -> Error:
    """Return a retryable 503."""
    return Error(code=ErrorCode.UNAVAILABLE, message=message, retryable=True, retry_after_s=retry_after_s)


def exhausted(message: str, retry_after_s: float | None = None) -> Error:
    """Return a retryable 429."""
    return Error(code=ErrorCode.RESOURCE_EXHAUSTED, message=message, retryable=True, retry_after_s=retry_after_s)
