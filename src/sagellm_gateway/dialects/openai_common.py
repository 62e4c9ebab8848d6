"""What chat completions, completions and responses share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import msgspec

from sagellm_gateway.config import Limits
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError
from sagellm_protocol.generation import ChoiceDelta, FunctionSpec, GenerationStart, TokenLogprob, Usage
from sagellm_protocol.sampling import GrammarSpec, SamplingParams

__all__ = [
    "NO_DEFAULTS",
    "SamplingFields",
    "check_model",
    "encode_json",
    "grammar_of",
    "ignored_fields",
    "sampling_of",
    "text_of_content",
    "tools_of",
    "usage_json",
]

NO_DEFAULTS: Mapping[str, float] = MappingProxyType({})

encode_json = msgspec.json.Encoder().encode


class SamplingFields(msgspec.Struct, kw_only=True):
    """Sampling knobs that the OpenAI routes share; those below `seed` are the common extensions of local servers."""

    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int | None = None


_PLAIN = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p", "typical_p",
    "repetition_penalty", "min_tokens", "ignore_eos",
)  # fmt: skip
_TUPLES = ("stop_token_ids", "bad_words", "allowed_token_ids")

# Fields that change the meaning of a request in a way that this server does not offer: refused, not ignored.
REFUSED: dict[str, str] = {
    "chat_template": "templates come with the model, never with a request",
    "chat_template_kwargs": "templates come with the model, never with a request; to switch thinking use reasoning_effort",
    "best_of": "ask for n completions instead",
    "suffix": "filling in the middle is for /v1/completions",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "audio output is not offered",
    "prediction": "predicted outputs are not offered",
    "web_search_options": "web search is not offered",
    "use_beam_search": "beam search is not offered",
    "length_penalty": "it belongs to beam search, which is not offered",
    "early_stopping": "it belongs to beam search, which is not offered",
    "truncate_prompt_tokens": "a prompt is never shortened silently",
    "api_base": "this server calls no other",
    "base_url": "this server calls no other",
    "api_key": "send the key in the Authorization header",
    "logits_processors": "code from a request is never run",
    "documents": "put documents into the messages",
    "continue_final_message": "end the messages with a user turn",
    "structured_outputs": "use response_format or guided_json, guided_regex, guided_choice, guided_grammar",
    "kv_transfer_params": "the server places KV blocks itself",
}


def ignored_fields(raw: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    """Return the names in `raw` that have no effect.

    Raises:
        UnsupportedError: a name is on the list of fields that are refused.
    """
    extra = raw.keys() - known
    if not extra:
        return []
    for name in extra:
        if name in REFUSED and raw[name] not in (None, False, [], {}):
            raise UnsupportedError(f"{name} is not supported: {REFUSED[name]}", param=name)
    return sorted(extra)


def check_model(model: str) -> str:
    """Return `model` if it can be a model's name.

    Raises:
        InvalidArgumentError: it is empty, longer than 256 characters or holds a control character.
    """
    if not model or len(model) > 256 or not model.isprintable():
        raise InvalidArgumentError("model must be 1 to 256 printable characters", param="model")
    return model


def sampling_of(
    fields: SamplingFields,
    limits: Limits,
    *,
    defaults: Mapping[str, float] = NO_DEFAULTS,
    max_tokens: int | None = None,
    max_tokens_name: str = "max_tokens",
    logprobs: int | None = None,
    grammar: GrammarSpec | None = None,
) -> SamplingParams:
    """Return the neutral sampling parameters: what the request says, else the model's `defaults`, else the API's.

    Raises:
        InvalidArgumentError: out of range; `param` is the field as the client named it.
    """
    given = {**defaults, **_given(fields)}
    if fields.stop:
        given["stop"] = _stop(fields.stop, limits)
    if fields.logit_bias:
        given["logit_bias"] = _logit_bias(fields.logit_bias)
    if fields.allowed_token_ids == []:
        raise InvalidArgumentError("allowed_token_ids is empty: nothing could be drawn", param="allowed_token_ids")
    if max_tokens is not None:
        if not 1 <= max_tokens < 2**31:
            raise InvalidArgumentError(
                f"{max_tokens_name} is {max_tokens}: it must be 1 to {2**31 - 1}", param=max_tokens_name
            )
        given["max_tokens"] = max_tokens
    if logprobs is not None:
        given["logprobs"] = logprobs
    guided = _guided(fields, limits)
    if guided is not None and grammar is not None:
        raise InvalidArgumentError("response_format and guided_* exclude each other: send one", param="response_format")
    grammar = guided or grammar
    if grammar is not None:
        given["grammar"] = grammar
    return SamplingParams(**given)


def _given(fields: SamplingFields) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name in _PLAIN:
        value = getattr(fields, name)
        if value is not None:
            given[name] = value
    for name in _TUPLES:
        value = getattr(fields, name)
        if value is not None:
            given[name] = tuple(value)
    return given


def _stop(stop: str | list[str], limits: Limits) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > limits.stop_strings:
        raise InvalidArgumentError(f"stop has {len(strings)} strings, the most is {limits.stop_strings}", param="stop")
    return strings


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    if len(bias) > 4096:
        raise InvalidArgumentError(f"logit_bias has {len(bias)} entries, the most is 4096", param="logit_bias")
    out = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise InvalidArgumentError(f"logit_bias has the key {key[:20]!r}: keys are token ids", param="logit_bias")
        out[int(key)] = value
    return out


def _guided(fields: SamplingFields, limits: Limits) -> GrammarSpec | None:
    found: list[tuple[str, GrammarSpec]] = []
    if fields.guided_json is not None:
        schema = fields.guided_json
        source = schema if isinstance(schema, str) else json.dumps(schema)
        found.append(("guided_json", GrammarSpec(kind="json_schema", source=source)))
    if fields.guided_regex is not None:
        if len(fields.guided_regex) > limits.pattern_chars:
            raise InvalidArgumentError(
                f"guided_regex has {len(fields.guided_regex)} characters, the most is {limits.pattern_chars}",
                param="guided_regex",
            )
        found.append(("guided_regex", GrammarSpec(kind="regex", source=fields.guided_regex)))
    if fields.guided_choice is not None:
        if not fields.guided_choice:
            raise InvalidArgumentError("guided_choice is empty: name at least one choice", param="guided_choice")
        found.append(("guided_choice", GrammarSpec(kind="choice", source=json.dumps(fields.guided_choice))))
    if fields.guided_grammar is not None:
        found.append(("guided_grammar", GrammarSpec(kind="lark", source=fields.guided_grammar)))
    if len(found) > 1:
        raise InvalidArgumentError(f"{found[0][0]} and {found[1][0]} exclude each other: send one", param=found[1][0])
    for name, spec in found:
        check_size(name, spec.source, limits)
        return spec
    return None


def check_size(name: str, source: str, limits: Limits) -> None:
    """Refuse a schema or grammar that is larger than the server compiles."""
    if len(source) > limits.schema_bytes:
        raise InvalidArgumentError(
            f"{name} has {len(source)} characters, the most is {limits.schema_bytes}", param=name
        )


def grammar_of(kind: str, schema: dict[str, Any] | None, limits: Limits, param: str) -> GrammarSpec | None:
    """Return the grammar of a response_format (or of `text.format` in the Responses API).

    Raises:
        InvalidArgumentError: unknown kind, no schema, or one with a pattern or a size beyond the limits.
    """
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarSpec(kind="json_object")
    if kind != "json_schema":
        raise InvalidArgumentError(
            f"{param}.type is {kind[:40]!r}: use text, json_object or json_schema", param=f"{param}.type"
        )
    if schema is None:
        raise InvalidArgumentError(f"{param} has no schema", param=param)
    check_patterns(schema, limits, param)
    source = encode_json(schema).decode()
    check_size(param, source, limits)
    return GrammarSpec(kind="json_schema", source=source)


def check_patterns(schema: Any, limits: Limits, param: str) -> None:
    """Refuse overlong patterns and references that leave the document, wherever they stand in `schema`."""
    todo = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo.extend(node)
        elif isinstance(node, dict):
            pattern, ref = node.get("pattern"), node.get("$ref")
            if isinstance(pattern, str) and len(pattern) > limits.pattern_chars:
                raise InvalidArgumentError(
                    f"a pattern in the schema has {len(pattern)} characters, the most is {limits.pattern_chars}",
                    param=param,
                )
            if isinstance(ref, str) and not ref.startswith("#"):
                raise InvalidArgumentError("a $ref in the schema leaves the document: use #/$defs/…", param=param)
            todo.extend(node.values())


class ToolWire(msgspec.Struct, kw_only=True):
    """An entry of `tools`."""

    type: str = "function"
    function: ToolFunctionWire | None = None


class ToolFunctionWire(msgspec.Struct, kw_only=True):
    """The function of a tool."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def tools_of(tools: Iterable[ToolWire] | None, limits: Limits) -> tuple[FunctionSpec, ...]:
    """Return the neutral functions.

    Raises:
        InvalidArgumentError: a name is bad or there twice, a schema too large.
        UnsupportedError: a tool of another kind than ``function``.
    """
    out: dict[str, FunctionSpec] = {}
    for i, tool in enumerate(tools or ()):
        if tool.type != "function" or tool.function is None:
            raise UnsupportedError(
                f"tools[{i}] is of type {tool.type[:40]!r}: only function tools are supported", param=f"tools[{i}].type"
            )
        add_tool(out, i, tool.function, limits)
    return tuple(out.values())


def add_tool(out: dict[str, FunctionSpec], i: int, function: ToolFunctionWire, limits: Limits) -> None:
    """Check `function` and put it into `out`."""
    name = function.name
    if not name or len(name) > 64 or not all(c.isalnum() or c in "_-." for c in name) or not name.isascii():
        raise InvalidArgumentError(
            f"tools[{i}] has the name {name[:80]!r}: use 1 to 64 of a-z, A-Z, 0-9, _, - and .",
            param=f"tools[{i}].function.name",
        )
    if name in out:
        raise InvalidArgumentError(f"tools has {name!r} twice", param=f"tools[{i}].function.name")
    if len(out) >= 128:
        raise InvalidArgumentError("tools has more than 128 entries", param="tools")
    if function.parameters is not None:
        check_patterns(function.parameters, limits, f"tools[{i}].function.parameters")
        check_size(f"tools[{i}].function.parameters", encode_json(function.parameters).decode(), limits)
    out[name] = FunctionSpec(
        name=name, description=function.description, parameters=function.parameters, strict=bool(function.strict)
    )


class ContentPart(msgspec.Struct, kw_only=True):
    """A part of a message's content; only text can be read."""

    type: str
    text: str | None = None
    refusal: str | None = None


def text_of_content(content: str | list[ContentPart] | None, where: str) -> str | None:
    """Return the text of a message's content.

    Raises:
        UnsupportedError: a part is an image, audio, video or file: `param` names it.
    """
    if content is None or isinstance(content, str):
        return content
    texts = []
    for j, part in enumerate(content):
        if part.type in ("text", "input_text", "output_text") and part.text is not None:
            texts.append(part.text)
        elif part.type == "refusal" and part.refusal is not None:
            texts.append(part.refusal)
        else:
            name = f"{where}[{j}]"
            if part.type in ("text", "input_text", "output_text", "refusal"):
                raise InvalidArgumentError(f"{name} is of type {part.type!r} and has no text", param=name)
            raise UnsupportedError(
                f"{name} is of type {part.type[:40]!r}: this model reads text only, send parts of type text", param=name
            )
    return "".join(texts)


def usage_json(usage: Usage) -> dict[str, Any]:
    """Return the `usage` object of chat completions and completions."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


class StreamOptions(msgspec.Struct, kw_only=True):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


UsageWish = Literal["none", "end", "each"]
"""Which chunks of a stream tell the usage: none, a last one of its own, or that one and each before it."""


def wants_usage(stream: bool | None, options: StreamOptions | None) -> UsageWish:
    """Return which chunks of the stream tell the usage.

    Raises:
        InvalidArgumentError: `stream_options` without `stream`, or `continuous_usage_stats` without `include_usage`.
    """
    if options is None:
        return "none"
    if not stream:
        raise InvalidArgumentError("stream_options is only allowed with stream: true", param="stream_options")
    if options.continuous_usage_stats and not options.include_usage:
        raise InvalidArgumentError(
            "stream_options.continuous_usage_stats needs stream_options.include_usage: set both to true",
            param="stream_options.continuous_usage_stats",
        )
    if not options.include_usage:
        return "none"
    return "each" if options.continuous_usage_stats else "end"


class UsageTail:
    """How the chunks of a stream end: without usage, with null, or with the tokens so far (vLLM's `continuous_usage_stats`).

    The tokens so far are prompt, completion and total; what was cached or reasoned is known with the last chunk only.
    """

    def __init__(self, wish: UsageWish) -> None:
        self.at_end = wish != "none"
        self.text = ',"usage":null}\n\n' if self.at_end else "}\n\n"
        self._running = wish == "each"
        self._prompt = self._completion = 0

    def take(self, event: GenerationStart | ChoiceDelta) -> bool:
        """Count `event`; return whether `text` changed. Several prompts of one call have a start each."""
        if not self._running:
            return False
        if type(event) is ChoiceDelta:
            self._completion += len(event.token_ids)
        elif type(event) is GenerationStart:
            self._prompt += event.prompt_tokens
        counts = f'"prompt_tokens":{self._prompt},"completion_tokens":{self._completion}'
        self.text = f',"usage":{{{counts},"total_tokens":{self._prompt + self._completion}}}}}\n\n'
        return True


def logprob_number(value: float) -> float:
    """Return a log probability that JSON can hold: -inf becomes -9999."""
    return value if value > -9999.0 else -9999.0


def token_logprob_json(entry: TokenLogprob) -> dict[str, Any]:
    """Return one entry of a chat choice's `logprobs.content`."""
    return {
        "token": entry.text,
        "logprob": logprob_number(entry.logprob),
        "bytes": list(entry.data),
        "top_logprobs": [
            {"token": t.text, "logprob": logprob_number(t.logprob), "bytes": list(t.data)} for t in entry.top
        ],
    }


class Head(NamedTuple):
    """What stands in each object of one answer."""

    id: str
    created: int
    model: str
