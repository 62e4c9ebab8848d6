"""The neutral request and its events: what every HTTP dialect translates to and from.

A dialect decodes its wire format into a `GenerationRequest`; `ChatModel.prepare` (see `sagellm_protocol.ports`) turns that
into an `EngineRequest` of token ids; the engine's `TokenDelta` become `GenerationEvent` again by `ChatModel.decoder`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sagellm_protocol.sampling import SamplingParams

__all__ = [
    "ChatMessage",
    "ChoiceDelta",
    "FinishReason",
    "FunctionCall",
    "FunctionSpec",
    "GenerationEnd",
    "GenerationEvent",
    "GenerationRequest",
    "GenerationStart",
    "Priority",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "Usage",
]

FinishReason = Literal["stop", "length", "tool_calls", "error", "cancelled"]


class Priority:
    """Bands of urgency; the lower number goes first."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3
    BACKGROUND = 4


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    """A function's name and its arguments as JSON text, as the model wrote them."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the assistant made."""

    id: str
    function: FunctionCall


class FunctionSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn. `content` is text only: parts that are not text are refused by the dialect, by name."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a client asked for, whatever dialect it spoke. Exactly one of `messages` and `prompt` is set.

    Attributes:
        request_id: unique; also the id of the response.
        trace_id: joins the client's trace.
        model: as the client named it.
        messages: a conversation; the model's chat template is applied.
        prompt: text or token ids; never templated.
        suffix: what comes after the gap that the output fills; `prompt` comes before it. Empty: there is none.
        sampling: how to draw and when to stop.
        n: number of choices, each with its own derived seed.
        tools: functions that the model may call.
        tool_choice: ``auto``, ``none``, ``required``, or the name of one of `tools`.
        parallel_tool_calls: whether more than one call is allowed.
        reasoning: whether to let the model think, where its template has a switch; None is the model's default.
        continue_final: the last message is the assistant's and unfinished: the output goes on from it (chats only).
        echo: put the prompt before the output (completions only).
        priority: a `Priority` band.
        deadline_s: seconds from arrival after which the answer is worthless.
        tenant: whose fair share and prefix cache this counts on.
        adapter: name of a LoRA adapter.
        metadata: for logs and policies; never shown to the model.
    """

    request_id: str
    model: str
    trace_id: str = ""
    messages: tuple[ChatMessage, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    suffix: str = ""
    sampling: SamplingParams = SamplingParams()
    n: int = 1
    tools: tuple[FunctionSpec, ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    reasoning: bool | None = None
    continue_final: bool = False
    echo: bool = False
    priority: int = Priority.NORMAL
    deadline_s: float | None = None
    tenant: str = ""
    adapter: str | None = None
    metadata: dict[str, str] = {}


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token's natural-log probability and its best alternatives, most likely first.

    `text` is what the token adds (it may be empty inside a character); `data` its bytes.
    """

    token_id: int
    logprob: float
    text: str = ""
    data: bytes = b""
    top: tuple[TokenLogprob, ...] = ()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one request; `cached_tokens` of the prompt were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of a tool call; `id` and `name` stand in the first piece of each call only."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class GenerationStart(msgspec.Struct, frozen=True, kw_only=True, tag="start", omit_defaults=True):
    """First event of a request: the prompt was accepted by an engine."""

    request_id: str
    model: str
    prompt_tokens: int
    engine_id: str = ""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


class ChoiceDelta(msgspec.Struct, frozen=True, kw_only=True, tag="delta", omit_defaults=True):
    """What one choice gained; the last one of each choice carries `finish_reason`.

    `stop_match` is the stop string that ended the choice, where one did.
    """

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_match: str | None = None


class GenerationEnd(msgspec.Struct, frozen=True, kw_only=True, tag="end", omit_defaults=True):
    """Last event of a request: all choices have finished. Times are seconds, measured."""

    usage: Usage
    ttft_s: float | None = None
    duration_s: float | None = None


GenerationEvent = GenerationStart | ChoiceDelta | GenerationEnd
