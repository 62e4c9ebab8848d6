"""What a policy sees: engines with their load, and one request. Plain data and arithmetic, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from sagellm_control_plane.breaker import Breaker
from sagellm_control_plane.config import SLO, LatencyPrior
from sagellm_control_plane.predictor import LatencyModel
from sagellm_control_plane.prefix_index import PrefixIndex

__all__ = [
    "ClusterView",
    "Decision",
    "DeviceTurn",
    "EngineProfile",
    "EngineView",
    "RandomSource",
    "RequestView",
    "Route",
]


class RandomSource(Protocol):
    """The part of `random.Random` that policies use; it comes in as an argument."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...

    def randrange(self, stop: int, /) -> int:
        """Uniform in [0, stop)."""
        ...


class EngineProfile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is fixed about an engine.

    Attributes:
        engine_id: unique.
        model: what it serves.
        kind: ``llm`` or ``embedding``.
        slots: sequences that it runs at once.
        block_size: tokens of one KV block.
        n_blocks: KV blocks.
        zone: where it stands, most general part first, separated by ``/`` (``region/host/socket``).
        cost: of one second, in any unit; only ratios count.
        role: ``any``, ``prefill`` or ``decode``.
        prior: what is believed of its speed; None takes the cluster's.
        device: what it shares with engines of other models; empty is a device of its own.
        adapters: LoRA adapters that it has loaded.
        journal: what it must be told to continue a sequence that another engine began: ``tokens``, ``text``, or ``none`` when
            it cannot.
    """

    engine_id: str
    model: str
    kind: str = "llm"
    slots: int = 256
    block_size: int = 16
    n_blocks: int = 0
    zone: str = ""
    cost: float = 1.0
    role: str = "any"
    prior: LatencyPrior | None = None
    device: str = ""
    adapters: tuple[str, ...] = ()
    journal: str = "tokens"


class RequestView(msgspec.Struct, kw_only=True, gc=False, omit_defaults=True):
    """What is known of one sequence when it is placed. `emitted` grows when it moves to another engine."""

    request_id: str
    model: str
    prompt_tokens: int
    max_tokens: int = 0
    blocks: tuple[bytes, ...] = ()
    block_tokens: int = 0
    priority: int = 2
    tenant: str = ""
    session: str = ""
    zone: str = ""
    adapter: str = ""
    kind: str = "llm"
    deadline_s: float | None = None
    arrived_at: float = 0.0
    emitted: int = 0
    avoid: tuple[str, ...] = ()
    suspect: bool = False
    journal: str = "tokens"

    @property
    def deadline_at(self) -> float:
        """When the answer becomes worthless; infinity without a deadline."""
        return float("inf") if self.deadline_s is None else self.arrived_at + self.deadline_s


class Decision(msgspec.Struct, gc=False):
    """Where a request goes: its engine, the prompt tokens expected in that engine's cache, and why.

    With `prefill`, that engine computes the prompt (and the cached tokens are its), `engine` decodes.
    """

    engine: EngineView
    hit_tokens: int
    score: float
    reason: str
    prefill: EngineView | None = None


Route = Callable[["ClusterView", RequestView, Sequence["EngineView"], float, RandomSource], Decision]
"""A routing strategy: picks one of the candidates (never empty)."""


class EngineView:
    """One engine's load: exact counters kept by the ledger, and what it reported itself."""

    __slots__ = (
        "adapters",
        "blocks_cached",
        "blocks_used",
        "breaker",
        "busy_since",
        "completed",
        "context_tokens",
        "death_alone",
        "death_at",
        "death_suspects",
        "decoding",
        "ended_before",
        "engine_id",
        "failed",
        "latency",
        "limit",
        "model",
        "others",
        "others_seen",
        "prefill_tokens",
        "profile",
        "reported_at",
        "reported_steps",
        "running",
        "state",
        "stepped_at",
        "suspects",
    )

    def __init__(self, profile: EngineProfile, prior: LatencyPrior, breaker: Breaker, limit: int) -> None:
        self.profile = profile
        self.engine_id = profile.engine_id
        self.model = profile.model
        self.adapters = profile.adapters
        self.state = "STARTING"
        self.latency = LatencyModel(profile.prior or prior)
        self.breaker = breaker
        self.limit = limit
        self.running = 0
        self.decoding = 0
        self.prefill_tokens = 0
        self.context_tokens = 0
        self.suspects = 0
        self.death_at = float("-inf")
        self.death_alone = False
        self.death_suspects = 0
        self.busy_since = 0.0
        self.completed = 0
        self.failed = 0
        self.reported_at = float("-inf")
        self.reported_steps = -1
        self.others = 0
        self.others_seen = 0
        self.ended_before = 0
        self.stepped_at = 0.0
        self.blocks_used = 0
        self.blocks_cached = 0

    @property
    def has_room(self) -> bool:
        """Whether another sequence may be sent: slots plus what keeps it from idling."""
        return self.running + self.others < self.limit

    @property
    def load(self) -> int:
        """Sequences on the engine: ours, and those that others (another gateway, an earlier one) run there by its own report."""
        return self.running + self.others

    def note_report(self, sequences: int, now: float) -> None:
        """The engine says how many sequences it holds; what is not ours is others'.

        A report is older than our own books: what has ended here since the last one may still be in it, and a difference counts
        once two reports in a row have shown it.
        """
        ended = self.completed + self.failed
        seen = max(sequences - self.running - (ended - self.ended_before), 0)
        self.ended_before = ended
        self.others, self.others_seen, self.reported_at = min(seen, self.others_seen), seen, now

    def forget_report(self) -> None:
        """The last report is too old to be believed."""
        self.others = self.others_seen = 0

    def backlog(self, now: float) -> float:
        """Prompt tokens that wait for prefill, less what must have been computed since the last sign of progress."""
        if self.prefill_tokens == 0:
            return 0.0
        done = (now - self.busy_since) * self.latency.prefill_rate
        return max(self.prefill_tokens - done, self.prefill_tokens * 0.1)

    def predicted_ttft(self, uncached: int, now: float) -> float:
        """Seconds until the first token of a request with `uncached` tokens to compute."""
        return self.latency.ttft(self.backlog(now) + uncached, self.decoding + self.others)

    def predicted_tpot(self, extra_sequences: int = 1, extra_tokens: int = 0) -> float:
        """Seconds a token once the request decodes here."""
        return self.latency.tpot(self.running + self.others + extra_sequences, self.context_tokens + extra_tokens)


class DeviceTurn:
    """Whose turn it is on a shared device, since when, and how many requests it has taken in."""

    __slots__ = ("began", "model", "sent")

    def __init__(self, model: str, began: float) -> None:
        self.model = model
        self.began = began
        self.sent = 0


class ClusterView:
    """All engines, ready ones by model, and who holds which prefix."""

    #: Above this many ready engines a decision looks at a sample: the best holders of the prefix and a few random ones.
    FULL_SCAN = 32
    HOLDERS = 8
    RANDOM = 4

    def __init__(self, slo: SLO) -> None:
        self.slo = slo
        self.engines: dict[str, EngineView] = {}
        self.ready: dict[str, list[EngineView]] = {}
        self.prefix = PrefixIndex()
        self.rotation: dict[str, int] = {}
        self.output_tokens: dict[str, float] = {}
        self.turns: dict[str, DeviceTurn] = {}
        self.waiting_since: dict[str, float] = {}

    def add(self, engine: EngineView) -> None:
        """Take in an engine that is not ready yet."""
        self.engines[engine.engine_id] = engine

    def set_state(self, engine_id: str, state: str) -> None:
        """Change an engine's state and with it whether it is a candidate."""
        engine = self.engines[engine_id]
        if engine.state == state:
            return
        if engine.state == "READY":
            self.ready[engine.model].remove(engine)
        engine.state = state
        if state == "READY":
            self.ready.setdefault(engine.model, []).append(engine)

    def remove(self, engine_id: str) -> EngineView:
        """Forget an engine and its prefix blocks."""
        self.set_state(engine_id, "STOPPED")
        self.prefix.drop_engine(engine_id)
        return self.engines.pop(engine_id)

    def candidates(self, request: RequestView, now: float, rng: RandomSource) -> list[EngineView]:
        """Ready engines with room, a bounded number of them; avoids what failed unless nothing else is left."""
        ready = self.ready.get(request.model)
        if not ready:
            return []
        if len(ready) > self.FULL_SCAN:
            ready = self._sample(ready, request, rng)
        usable = [e for e in ready if e.running + e.others < e.limit and (e.breaker.closed or e.breaker.allows(now))]
        if not usable:
            # All breakers open: trying a doubtful engine beats refusing (the panic mode of load balancers).
            usable = [e for e in ready if e.has_room]
        if request.adapter:
            usable = [e for e in usable if request.adapter in e.adapters] or usable
        if request.emitted:
            usable = [e for e in usable if e.profile.journal == request.journal != "none"]
        if request.avoid:
            usable = [e for e in usable if e.engine_id not in request.avoid] or usable
        if request.suspect:
            # Apart from each other, what kills engines can be told from what happened to be there.
            usable = [e for e in usable if e.suspects == 0] or usable
        return usable

    def _sample(self, ready: list[EngineView], request: RequestView, rng: RandomSource) -> list[EngineView]:
        picked: dict[str, EngineView] = {}
        for engine_id in self.prefix.holders(request.blocks, self.HOLDERS):
            engine = self.engines.get(engine_id)
            if engine is not None and engine.state == "READY" and engine.model == request.model:
                picked[engine_id] = engine
        n = len(ready)
        for _ in range(self.RANDOM):
            engine = ready[int(rng.random() * n)]
            picked[engine.engine_id] = engine
        return list(picked.values())

    def on_device(self, device: str) -> list[EngineView]:
        """Engines that share a device."""
        return [engine for engine in self.engines.values() if engine.profile.device == device]

    def hit_tokens(self, engine: EngineView, request: RequestView) -> int:
        """Prompt tokens that `engine` is believed to hold; at least one token is always computed."""
        if not request.blocks:
            return 0
        depth = self.prefix.depth(engine.engine_id, request.blocks)
        return min(depth * request.block_tokens, request.prompt_tokens + request.emitted - 1)

    def uncached(self, engine: EngineView, request: RequestView) -> int:
        """Tokens that `engine` would have to compute before the first new one."""
        return request.prompt_tokens + request.emitted - self.hit_tokens(engine, request)

    def next_turn(self, key: str, n: int) -> int:
        """Round-robin counter for `key`, below `n`."""
        turn = self.rotation.get(key, -1) + 1
        self.rotation[key] = turn
        return turn % n

    def expected_output(self, request: RequestView, default: int) -> float:
        """Output tokens to expect, from what this model's requests produced, never above the request's own limit."""
        mean = self.output_tokens.get(request.model, float(default))
        return min(mean, float(request.max_tokens)) if request.max_tokens else mean
