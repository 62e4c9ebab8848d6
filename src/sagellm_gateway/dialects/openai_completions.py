"""POST /v1/completions: text or token prompts, never a chat template."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from sagellm_gateway.config import Limits
from sagellm_gateway.dialects.openai_chat import choices_of, priority_of
from sagellm_gateway.dialects.openai_common import (
    NO_DEFAULTS,
    Head,
    SamplingFields,
    StreamOptions,
    UsageTail,
    UsageWish,
    check_model,
    encode_json,
    logprob_number,
    sampling_of,
    usage_json,
)
from sagellm_gateway.errors import openai_body
from sagellm_protocol.errors import InvalidArgumentError, SageError
from sagellm_protocol.generation import (
    ChoiceDelta,
    GenerationEnd,
    GenerationRequest,
    GenerationStart,
    TokenLogprob,
    Usage,
)
from sagellm_protocol.sampling import SamplingParams

__all__ = ["KNOWN", "CompletionBody", "CompletionFrames", "CompletionResult", "requests_of"]


class CompletionBody(SamplingFields, kw_only=True):
    """The request body."""

    model: str
    prompt: str | list[Any] | None = None
    suffix: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = None
    user: str | None = None


KNOWN = frozenset(CompletionBody.__struct_fields__)


def requests_of(
    body: CompletionBody, request_id: str, limits: Limits, *, defaults: Mapping[str, float] = NO_DEFAULTS, **extra: Any
) -> list[GenerationRequest]:
    """Translate `body`: one neutral request a prompt, ids ``<id>`` or ``<id>-k``.

    Raises:
        InvalidArgumentError: something is missing, contradictory or out of range.
    """
    n = choices_of(body.n, limits)
    prompts = [""] if body.prompt == "" and body.suffix else _prompts(body.prompt)
    if len(prompts) * n > limits.choices:
        raise InvalidArgumentError(
            f"{len(prompts)} prompts with n = {n} make {len(prompts) * n} completions, the most is {limits.choices}",
            param="prompt",
        )
    # OpenAI's logprobs is 0–5; more alternatives do no harm, so the bound is the one of chat.
    if body.logprobs is not None and not 0 <= body.logprobs <= 20:
        raise InvalidArgumentError(f"logprobs is {body.logprobs}: it must be 0 to 20", param="logprobs")
    if body.suffix and body.echo:
        raise InvalidArgumentError("echo and suffix exclude each other: leave one of them out", param="suffix")
    max_tokens, scoring = body.max_tokens, False
    if max_tokens == 0 and body.echo:
        # Scoring of a prompt (lm-eval's loglikelihood): one token is drawn and left out of the answer.
        max_tokens, scoring = 1, True
    sampling = sampling_of(body, limits, defaults=defaults, max_tokens=max_tokens, logprobs=body.logprobs)
    if body.echo and body.logprobs is not None:
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=body.logprobs)
    if scoring:
        sampling = msgspec.structs.replace(sampling, ignore_eos=True)
    metadata = {"user": body.user} if body.user else {}
    return [
        GenerationRequest(
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{k}",
            model=check_model(body.model),
            prompt=prompt,
            suffix=body.suffix or "",
            sampling=_seeded(sampling, k),
            n=n,
            echo=bool(body.echo),
            priority=priority_of(body.priority),
            metadata=metadata,
            **extra,
        )
        for k, prompt in enumerate(prompts)
    ]


def scores_only(body: CompletionBody) -> bool:
    """Return whether the answer is the echoed prompt alone."""
    return bool(body.echo) and body.max_tokens == 0


def _seeded(sampling: SamplingParams, k: int) -> SamplingParams:
    if k == 0 or sampling.seed is None:
        return sampling
    seed = (sampling.seed + k + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(sampling, seed=seed)


def _prompts(prompt: str | list[Any] | None) -> list[str | tuple[int, ...]]:
    if prompt is None:
        raise InvalidArgumentError("prompt is missing: send a string, a list of strings or token ids", param="prompt")
    if isinstance(prompt, str):
        return [_text(prompt)]
    if not prompt:
        raise InvalidArgumentError("prompt is empty", param="prompt")
    if all(type(p) is int for p in prompt):
        return [_ids(prompt)]
    if len(prompt) > 2048:
        raise InvalidArgumentError(f"prompt has {len(prompt)} entries, the most is 2048", param="prompt")
    return [_text(p) if isinstance(p, str) else _ids(p) for p in prompt]


def _text(text: str) -> str:
    if not text:
        raise InvalidArgumentError("prompt is an empty string: send at least one character", param="prompt")
    return text


def _ids(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise InvalidArgumentError(
            "prompt must be a string, a list of strings, token ids or a list of them", param="prompt"
        )
    return tuple(ids)


class _Logprobs:
    """The four parallel lists of the completions API, with offsets into the text."""

    def __init__(self) -> None:
        self.offset = 0

    def json(self, entries: tuple[TokenLogprob | None, ...]) -> dict[str, Any]:
        tokens, logprobs, tops, offsets = [], [], [], []
        for entry in entries:
            if entry is None:
                continue
            tokens.append(entry.text)
            # NaN marks the first token of an echoed prompt, which nothing precedes.
            known = not math.isnan(entry.logprob)
            logprobs.append(logprob_number(entry.logprob) if known else None)
            tops.append({t.text: logprob_number(t.logprob) for t in entry.top} if known else None)
            offsets.append(self.offset)
            self.offset += len(entry.text)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


class CompletionFrames:
    """Server-sent events of one completion, over all its prompts."""

    content_type = b"text/event-stream; charset=utf-8"
    ping = b": ping\n\n"

    def __init__(self, head: Head, choices: int, *, usage: UsageWish, logprobs: bool) -> None:
        self._prefix = (
            f'data: {{"id":{encode_json(head.id).decode()},"object":"text_completion","created":{head.created},'
            f'"model":{encode_json(head.model).decode()},'
        )
        self._tail = UsageTail(usage)
        self._logprobs = [_Logprobs() for _ in range(choices)] if logprobs else None

    def start(self, event: GenerationStart) -> bytes:
        """Nothing: completions have no role."""
        self._tail.take(event)
        return b""

    def delta(self, event: ChoiceDelta) -> bytes:
        """One chunk with the text and, at the end, the finish reason."""
        self._tail.take(event)
        if not (event.text or event.finish_reason or (self._logprobs and event.logprobs)):
            return b""
        logprobs = None
        if self._logprobs is not None and event.logprobs:
            logprobs = self._logprobs[event.index].json(event.logprobs)
        choice = {
            "text": event.text,
            "index": event.index,
            "logprobs": logprobs,
            "finish_reason": event.finish_reason,
        }
        return f'{self._prefix}"choices":[{encode_json(choice).decode()}]{self._tail.text}'.encode()

    def end(self, event: GenerationEnd) -> bytes:
        """The usage chunk where it was asked for, and the terminator."""
        done = b"data: [DONE]\n\n"
        if not self._tail.at_end:
            return done
        usage = encode_json(usage_json(event.usage)).decode()
        return f'{self._prefix}"choices":[],"usage":{usage}}}\n\n'.encode() + done

    def error(self, error: SageError) -> bytes:
        """An error event; no terminator follows."""
        return b"data: " + encode_json(openai_body(error, "")) + b"\n\n"


class CompletionResult:
    """Gathers the events of one request into the body of a plain answer."""

    def __init__(self, choices: int) -> None:
        self.texts: list[list[str]] = [[] for _ in range(choices)]
        self.entries: list[list[TokenLogprob | None]] = [[] for _ in range(choices)]
        self.finish: list[str | None] = [None] * choices
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)

    def add(self, event: GenerationStart | ChoiceDelta | GenerationEnd) -> None:
        """Take one event."""
        if type(event) is ChoiceDelta:
            self.texts[event.index].append(event.text)
            self.entries[event.index].extend(event.logprobs or ())
            self.finish[event.index] = event.finish_reason or self.finish[event.index]
        elif type(event) is GenerationEnd:
            self.usage = event.usage

    def body(self, head: Head, *, logprobs: bool) -> dict[str, Any]:
        """Return the `text_completion` object."""
        return {
            "id": head.id,
            "object": "text_completion",
            "created": head.created,
            "model": head.model,
            "choices": [
                {
                    "text": "".join(texts),
                    "index": i,
                    "logprobs": _Logprobs().json(tuple(entries)) if logprobs else None,
                    "finish_reason": finish,
                }
                for i, (texts, entries, finish) in enumerate(zip(self.texts, self.entries, self.finish, strict=True))
            ],
            "usage": usage_json(self.usage),
        }
