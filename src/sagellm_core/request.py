"""The state of one sequence, and the lengths that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.generation import FinishReason, TokenLogprob
from sagellm_protocol.sampling import GrammarSpec, SamplingParams

__all__ = ["Constraint", "GrammarCompiler", "PendingMasks", "Phase", "SequenceState"]


class Constraint(Protocol):
    """A grammar in the middle of one sequence."""

    @property
    def finished(self) -> bool:
        """Whether the output is complete: nothing but an end-of-sequence token may follow."""
        ...

    def ready(self) -> bool:
        """Return False while the grammar is being compiled.

        Raises:
            SageError: it cannot be compiled; the request fails alone.
        """
        ...

    def allowed(self, draft: Sequence[int]) -> int:
        """Return how many tokens of `draft` the grammar allows in a row. The constraint does not move."""
        ...

    def accept(self, token_id: int) -> None:
        """Move on by an emitted token."""
        ...


class PendingMasks(Protocol):
    """Masks that are being written beside a step. `rows` is uint32[n, ceil(vocab / 32)], bit t % 32 of word t // 32."""

    @property
    def rows(self) -> Any:
        """The masks; not to be read before `wait` returned."""
        ...

    def wait(self) -> None:
        """Return when all are written. May be called again."""
        ...


class GrammarCompiler(Protocol):
    """Makes constraints; the slow part happens off the step loop."""

    def compile(self, spec: GrammarSpec) -> Constraint:
        """Return at once; the constraint says when it is ready.

        Raises:
            InvalidArgumentError: the grammar is seen to be wrong without compiling it.
        """
        ...

    def masks(self, asked: Sequence[tuple[Any, Sequence[int]]]) -> PendingMasks:
        """Begin to write masks and return at once: for each (constraint, draft) one for the next token and one after each of the draft.

        The constraints are this compiler's, each allows its draft, and none moves before `PendingMasks.wait` returned.
        """
        ...

    def close(self) -> None:
        """Stop compiling. Idempotent."""
        ...


class Phase(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class SequenceState:
    """One sequence. `tokens` holds prompt and output; the rest is what has happened to them so far.

    Attributes:
        request: as it came.
        arrival: number of its arrival on this engine.
        queued_at: seconds on the engine's clock.
        urgency: sequences are served in ascending order of it: arrival time plus a constant for each priority band, so that
            age counts and the order of two sequences never changes.
        tokens: prompt, then output (also what an earlier engine emitted).
        computed: tokens whose keys and values are in the cache.
        blocks: the block table.
        hashes: names of the full blocks of `tokens`, as far as they were needed.
        promised: names of blocks that it is about to compute, for which others wait.
        blocked: it cannot start yet: its grammar is being compiled.
        constrained: output tokens that `constraint` has accepted.
        want_draft: tokens that may be guessed ahead in the next step.
        adapter: number of its LoRA adapter on the device, -1 for none.
        prompt_logprobs: collected so far, if asked for.
    """

    request: EngineRequest
    arrival: int
    queued_at: float
    urgency: tuple[float, int]
    root: bytes
    constraint: Constraint | None = None
    phase: Phase = Phase.WAITING
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    promised: list[bytes] = field(default_factory=list)
    blocked: bool = False
    constrained: int = 0
    want_draft: int = 0
    adapter: int = -1
    cached_tokens: int = 0
    preemptions: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None

    @staticmethod
    def of(request: EngineRequest, *, arrival: int, now: float, ageing_s: float, root: bytes) -> SequenceState:
        """Return the state of a sequence that arrives at `now`."""
        wants = request.sampling.prompt_logprobs is not None and not request.emitted_token_ids
        return SequenceState(
            request=request,
            arrival=arrival,
            queued_at=now,
            urgency=(now + request.priority * ageing_s, arrival),
            root=root,
            tokens=[*request.prompt_token_ids, *request.emitted_token_ids],
            prompt_logprobs=[None] if wants else None,
        )

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        """The request's sampling parameters."""
        return self.request.sampling

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def n_output(self) -> int:
        """Tokens emitted after the prompt, by whichever engine; also the position of the next draw."""
        return len(self.tokens) - self.n_prompt

    @property
    def max_length(self) -> int:
        """Tokens at which the sequence ends by length."""
        return self.n_prompt + (self.sampling.max_tokens or 0)

    @property
    def uncomputed(self) -> int:
        """Tokens that must go through the model before the next one can be drawn; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """Whether only the newest token is not in the cache yet."""
        return self.uncomputed == 1

    @property
    def reusable(self) -> int:
        """Tokens that may be taken from the prefix cache: rows whose log-probabilities are wanted must be computed."""
        if self.prompt_logprobs is None or self.scored:
            return len(self.tokens)
        return len(self.prompt_logprobs) - 1

    @property
    def scored(self) -> bool:
        """Whether all log-probabilities of the prompt that were asked for are there."""
        return self.prompt_logprobs is None or len(self.prompt_logprobs) == self.n_prompt

    @property
    def deadline(self) -> float | None:
        """Seconds on the engine's clock after which the answer is worthless."""
        limit = self.request.deadline_s
        return None if limit is None else self.queued_at + limit

    def stops_at(self, token_id: int) -> bool:
        """Whether a drawn token ends the sequence instead of belonging to it."""
        if token_id in self.sampling.stop_token_ids:
            return True
        return token_id in self.request.eos_token_ids and not self.sampling.ignore_eos

    def completed(self) -> FinishReason | None:
        """Say whether the token that was just appended is the last; to be called once for each."""
        if self.constraint is not None:
            self.constraint.accept(self.tokens[-1])
            self.constrained += 1
            if self.constraint.finished:
                return "stop"
        return "length" if len(self.tokens) >= self.max_length else None
