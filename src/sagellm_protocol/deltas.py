"""Several deltas of one sequence as one, for a reader that was slower than the engine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from sagellm_protocol.engine import TokenDelta

__all__ = ["join_deltas"]


def join_deltas(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """Return what consecutive deltas of one sequence say together; linear in their tokens.

    Text and reasoning are each joined in order; which of the two came first within the joined delta is lost.
    """
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    text = [delta.text for delta in deltas if delta.text is not None]
    reasoning = [delta.reasoning for delta in deltas if delta.reasoning is not None]
    return TokenDelta(
        request_id=last.request_id,
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=tuple(chain.from_iterable(logprobs)) if logprobs else None,
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        error=last.error,
        prompt_tokens=next((d.prompt_tokens for d in deltas if d.prompt_tokens is not None), None),
        cached_tokens=max(delta.cached_tokens for delta in deltas),
        text="".join(text) if text else None,
        reasoning="".join(reasoning) if reasoning else None,
        text_tokens=sum(delta.text_tokens for delta in deltas),
        tool_calls=tuple(chain.from_iterable(delta.tool_calls for delta in deltas)),
        usage=next((d.usage for d in reversed(deltas) if d.usage is not None), None),
    )
