"""What goes to an engine and what comes back: token ids, no text."""

from __future__ import annotations

from typing import Literal

import msgspec

from sagellm_protocol.errors import Error
from sagellm_protocol.generation import FinishReason, GenerationRequest, Priority, TokenLogprob, ToolCallDelta, Usage
from sagellm_protocol.sampling import SamplingParams

__all__ = ["EngineDescription", "EngineRequest", "EngineStatus", "Histogram", "TokenDelta"]


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to continue.

    Attributes:
        request_id: unique on the engine at any time (choice k of a request with n > 1 is ``<id>/k``).
        trace_id: joins the client's trace.
        prompt_token_ids: at least one id, all below the vocabulary size.
        sampling: `seed` and `max_tokens` are resolved (never None) by whoever prepares the request, so that a
            continuation on another engine draws the same tokens.
        emitted_token_ids: tokens that an earlier engine already emitted after the prompt. The engine computes their KV,
            does not emit them again, and draws the next token at position ``len(emitted_token_ids)`` of the seed's stream.
        eos_token_ids: ids that end the sequence, from the model.
        priority: a `Priority` band.
        deadline_s: seconds from submission.
        bad_token_ids: `sampling.bad_words` as token sequences, each in all the ways it can be written; resolved by whoever
            prepares the request.
        cache_salt: separates prefix caches of tenants.
        adapter: name of a LoRA adapter.
        source: the neutral request, for engines that take text instead of token ids (foreign ones).
        emitted_text: what an earlier foreign engine already emitted, where only its text is known.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    trace_id: str = ""
    emitted_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    priority: int = Priority.NORMAL
    deadline_s: float | None = None
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    cache_salt: str = ""
    adapter: str | None = None
    source: GenerationRequest | None = None
    emitted_text: str = ""


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a sequence gained in one step; the last one carries `finish_reason`.

    The first delta of a sequence (possibly without a token) has `prompt_tokens`. An end-of-sequence or stop id that ended
    the sequence is in `stop_token_id`, not in `token_ids`.

    Engines that give text instead of ids (foreign ones) fill `text`, `reasoning` and `tool_calls`, and `usage` at the end;
    `text_tokens` is how many of their events a delta joins.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: Error | None = None
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    text: str | None = None
    reasoning: str | None = None
    text_tokens: int = 0
    tool_calls: tuple[ToolCallDelta, ...] = ()
    usage: Usage | None = None


class EngineDescription(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an engine serves; fixed while it lives."""

    engine_id: str
    model: str
    architecture: str
    backend: str
    device: str
    vocab_size: int
    context_length: int
    block_size: int
    n_blocks: int
    max_batch_tokens: int
    max_sequences: int
    quantization: str = ""
    kind: str = "llm"
    pid: int = 0
    model_path: str = ""
    block_bytes: int = 0
    weight_bytes: int = 0


class Histogram(msgspec.Struct, frozen=True, kw_only=True):
    """Observations since the engine started.

    `counts[i]` of them were at most `bounds[i]` and above the bound before; the last count is of those above all bounds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float = 0.0


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is doing; counters only grow while it lives.

    `steps` is the progress counter: an engine with work whose `steps` stands still is hung. `prefix_queries` and
    `prefix_hits` count prompt tokens. Spilled blocks lie on disk, `spill_hits` of them were brought back. `histograms` has
    ttft_s, tpot_s, itl_s, queue_s, step_s and batch_rows. An engine that is not in the phase ``ready`` has its model out of
    memory, or is just loading it: it takes requests, and its steps stand still until the model is there.
    """

    engine_id: str
    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    evictions: int = 0
    aborted: int = 0
    finished: int = 0
    failed: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    rss_bytes: int = 0
    step_seconds: float = 0.0
    adapters: tuple[str, ...] = ()
    draining: bool = False
    evict_seconds: float = 0.0
    copied_blocks: int = 0
    blocks_spilled: int = 0
    spill_bytes: int = 0
    spill_hits: int = 0
    spill_errors: int = 0
    histograms: dict[str, Histogram] = {}
    phase: Literal["ready", "loading", "unloaded"] = "ready"
