"""What an engine refuses before it queues a sequence."""

from __future__ import annotations

from collections.abc import Collection

from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import ContextLengthError, InvalidArgumentError, UnsupportedError

__all__ = ["check_request"]


def check_request(request: EngineRequest, vocab_size: int, n_ctx: int, kv_tokens: int) -> None:
    """Check one sequence against the vocabulary, the context window and the KV cache (`kv_tokens` tokens).

    Raises:
        InvalidArgumentError: an id out of the vocabulary, an empty prompt, an unresolved seed or max_tokens.
        ContextLengthError: prompt and max_tokens do not fit.
        UnsupportedError: bad words that nobody has tokenised.
    """
    sampling = request.sampling
    if not request.prompt_token_ids:
        raise InvalidArgumentError("the prompt has no tokens: give at least one", param="prompt")
    if sampling.seed is None or sampling.max_tokens is None:
        name = "seed" if sampling.seed is None else "max_tokens"
        raise InvalidArgumentError(f"{name} is not resolved: whoever prepares an engine request sets it", param=name)
    if sampling.bad_words and not request.bad_token_ids:
        raise UnsupportedError("bad_words came without their token ids: this model cannot ban words", param="bad_words")
    _check_ids(request.prompt_token_ids, vocab_size, "prompt")
    _check_ids(request.emitted_token_ids, vocab_size, "emitted_token_ids")
    _check_ids(request.eos_token_ids, vocab_size, "eos_token_ids")
    _check_ids(sampling.stop_token_ids, vocab_size, "stop_token_ids")
    _check_ids(sampling.logit_bias or (), vocab_size, "logit_bias")
    _check_ids(sampling.allowed_token_ids or (), vocab_size, "allowed_token_ids")
    for bad in request.bad_token_ids:
        if not bad:
            raise InvalidArgumentError("bad_token_ids has an empty sequence: remove it", param="bad_words")
        _check_ids(bad, vocab_size, "bad_words")
    _check_length(len(request.prompt_token_ids), sampling.max_tokens, n_ctx, kv_tokens)


def _check_ids(ids: Collection[int], vocab_size: int, param: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise InvalidArgumentError(
            f"token id {wrong} in {param} is outside the vocabulary of {vocab_size} tokens", param=param
        )


def _check_length(n_prompt: int, max_tokens: int, n_ctx: int, kv_tokens: int) -> None:
    if n_prompt + max_tokens > n_ctx:
        raise ContextLengthError(
            f"prompt ({n_prompt} tokens) + max_tokens ({max_tokens}) is {n_prompt + max_tokens} tokens, the context window "
            f"has {n_ctx}: shorten the prompt or pass max_tokens {max(1, n_ctx - n_prompt)} or less",
            param="prompt" if n_prompt >= n_ctx else "max_tokens",
        )
    if n_prompt + max_tokens > kv_tokens:
        raise ContextLengthError(
            f"prompt ({n_prompt} tokens) + max_tokens ({max_tokens}) is {n_prompt + max_tokens} tokens, the KV cache "
            f"holds {kv_tokens}: start the engine with more --kv-size",
            param="max_tokens",
        )
