"""Protocol v0.1: the request, the response and the stream events that programs of every earlier version know.

Between the floors of this house the neutral types of `sagellm_protocol.generation` are used; `Request.to_generation` crosses over.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from sagellm_protocol.checks import at_least, in_range, not_empty
from sagellm_protocol.errors import Error, InvalidArgumentError
from sagellm_protocol.generation import ChatMessage, FinishReason, GenerationRequest
from sagellm_protocol.metrics import Metrics
from sagellm_protocol.sampling import SamplingParams

__all__ = [
    "DeltaEvent",
    "EndEvent",
    "Request",
    "Response",
    "StartEvent",
    "StreamEvent",
    "StreamEventDelta",
    "StreamEventEnd",
    "StreamEventStart",
]


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a client asks for. Exactly one of `prompt` and `messages` is set; a field that is not listed is refused.

    Attributes:
        request_id: unique.
        trace_id: joins the client's trace.
        model: the name it is served under.
        max_tokens: most output tokens, > 0.
        prompt: text, never templated.
        messages: a conversation; the model's chat template is applied.
        stream: answer by events.
        temperature: [0, 2]; shorthand for the field of `sampling_params`.
        top_p: (0, 1]; shorthand likewise.
        sampling_params: everything else; its `max_tokens` gives way to the field above.
        kv_budget_tokens: most tokens that the request may hold in the KV cache, prompt and output together.
        phase: do only this half, where prefill and decode are separated.
        metadata: for logs and policies; never shown to the model.

    Raises:
        InvalidArgumentError: a field is missing or out of range, or two fields contradict each other.
    """

    request_id: str
    trace_id: str
    model: str
    max_tokens: int
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    sampling_params: SamplingParams | None = None
    kv_budget_tokens: int | None = None
    phase: Literal["prefill", "decode"] | None = None
    metadata: dict[str, Any] = {}

    def __post_init__(self) -> None:
        not_empty("request_id", self.request_id)
        not_empty("trace_id", self.trace_id)
        not_empty("model", self.model)
        in_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if (self.prompt is None) == (self.messages is None):
            state = "both missing" if self.prompt is None else "both set"
            raise InvalidArgumentError(f"prompt and messages are {state}: give exactly one of them", param="prompt")
        if self.messages is not None:
            msgspec.structs.force_setattr(self, "messages", _as_messages(self.messages))
        if self.messages is not None and not self.messages:
            raise InvalidArgumentError("messages is empty: give at least one message", param="messages")
        if self.temperature is not None:
            in_range("temperature", self.temperature, 0.0, 2.0)
        if self.top_p is not None:
            in_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        if self.kv_budget_tokens is not None:
            at_least("kv_budget_tokens", self.kv_budget_tokens, 1)
        for name in ("temperature", "top_p"):
            self._check_agreement(name)

    def _check_agreement(self, name: str) -> None:
        own, defaults = getattr(self, name), SamplingParams()
        if own is None or self.sampling_params is None:
            return
        other = getattr(self.sampling_params, name)
        if other not in (own, getattr(defaults, name)):
            raise InvalidArgumentError(
                f"{name} is {own} and sampling_params.{name} is {other}: give one of them", param=name
            )

    def sampling(self) -> SamplingParams:
        """Return the sampling parameters with the shorthands and `max_tokens` in their places."""
        changes: dict[str, Any] = {"max_tokens": self.max_tokens}
        if self.temperature is not None:
            changes["temperature"] = self.temperature
        if self.top_p is not None:
            changes["top_p"] = self.top_p
        return msgspec.structs.replace(self.sampling_params or SamplingParams(), **changes)

    def to_generation(self) -> GenerationRequest:
        """Return the neutral request. `stream`, `kv_budget_tokens` and `phase` have no place in it: the caller minds them."""
        return GenerationRequest(
            request_id=self.request_id,
            trace_id=self.trace_id,
            model=self.model,
            messages=self.messages,
            prompt=self.prompt,
            sampling=self.sampling(),
            metadata={key: _as_text(value) for key, value in self.metadata.items()},
        )


class Response(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The whole answer. `output_tokens` are token ids; `prompt_tokens` is a count."""

    request_id: str
    trace_id: str
    output_text: str
    output_tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int | None = None
    metrics: Metrics | None = None
    error: Error | None = None

    def __post_init__(self) -> None:
        _as_tuple(self, "output_tokens")
        _check_outcome(self.finish_reason, self.error)
        if self.prompt_tokens is not None:
            at_least("prompt_tokens", self.prompt_tokens, 0)


class StreamEventStart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag="start"):
    """The first event of a stream: engine `engine_id` has taken the request."""

    request_id: str
    trace_id: str
    engine_id: str
    prompt_tokens: int | None = None

    @property
    def event(self) -> Literal["start"]:
        """The event's name, as in JSON."""
        return "start"


class StreamEventDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag="delta"):
    """What the stream gained: `content` is text, `content_tokens` are the token ids behind it.

    `chunk` and `chunk_tokens` are the older names of the same two. Either generation is accepted, and both are offered, as
    attributes and in JSON.
    """

    request_id: str
    trace_id: str
    engine_id: str
    content: str | None = None
    content_tokens: tuple[int, ...] | None = None
    chunk: str | None = None
    chunk_tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _as_tuple(self, "content_tokens")
        _as_tuple(self, "chunk_tokens")
        _same(self, "content", "chunk")
        _same(self, "content_tokens", "chunk_tokens", ())

    @property
    def event(self) -> Literal["delta"]:
        """The event's name, as in JSON."""
        return "delta"


class StreamEventEnd(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag="end"):
    """The last event of a stream: the whole text, the ids of all output tokens, and how it went.

    `output_text` is the older name of `content`. Either is accepted, and both are offered.
    """

    request_id: str
    trace_id: str
    engine_id: str
    finish_reason: FinishReason
    content: str | None = None
    output_text: str | None = None
    output_tokens: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    metrics: Metrics | None = None
    error: Error | None = None

    def __post_init__(self) -> None:
        _as_tuple(self, "output_tokens")
        _same(self, "content", "output_text")
        _check_outcome(self.finish_reason, self.error)

    @property
    def event(self) -> Literal["end"]:
        """The event's name, as in JSON."""
        return "end"


StreamEvent: TypeAlias = StreamEventStart | StreamEventDelta | StreamEventEnd

StartEvent = StreamEventStart
DeltaEvent = StreamEventDelta
EndEvent = StreamEventEnd


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _as_messages(messages: object) -> tuple[ChatMessage, ...]:
    """Accept lists and plain dicts, as programs write them."""
    try:
        return msgspec.convert(messages, tuple[ChatMessage, ...])
    except msgspec.ValidationError as exc:
        raise InvalidArgumentError(f"messages: {exc}", param="messages") from None


def _as_tuple(struct: msgspec.Struct, name: str) -> None:
    if isinstance(getattr(struct, name), list):
        msgspec.structs.force_setattr(struct, name, tuple(getattr(struct, name)))


def _same(event: msgspec.Struct, name: str, older: str, default: object = None) -> None:
    """Give both names of a field the one value that was given."""
    one, other = getattr(event, name), getattr(event, older)
    if one is not None and other is not None and one != other:
        raise InvalidArgumentError(f"{name} and {older} are two names of one field and differ: give one", param=name)
    value = one if one is not None else other if other is not None else default
    if value is None:
        raise InvalidArgumentError(f"{name} is missing: give it (or {older}, its older name)", param=name)
    msgspec.structs.force_setattr(event, name, value)
    msgspec.structs.force_setattr(event, older, value)


def _check_outcome(finish_reason: FinishReason, error: Error | None) -> None:
    if error is not None and finish_reason not in ("error", "cancelled"):
        raise InvalidArgumentError(
            f"finish_reason is {finish_reason!r} although an error is set: use 'error' or 'cancelled'",
            param="finish_reason",
        )
