"""Chat templates: Jinja from a model file, which is untrusted code, in an immutable sandbox; user text stays user text."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sagellm_core.text.specials import Guard, SpecialTokens
from sagellm_core.text.template_forms import Form, drops_calls, forms
from sagellm_protocol.errors import InvalidArgumentError, ModelFileError
from sagellm_protocol.generation import ChatMessage, FunctionSpec

__all__ = ["ChatTemplate"]

_MAX_REPEAT = 100_000
_CONTENT_NONE = re.compile(r"content['\"\]]* is (not )?none")
_SWITCH = re.compile(r"\b(enable_)?thinking\b")


class ChatTemplate:
    """One compiled template. Rendering has no effect on it; safe to use from threads."""

    def __init__(self, source: str, specials: SpecialTokens, names: dict[str, str]) -> None:
        """Compile.

        Args:
            source: Jinja text.
            specials: control tokens, which only the template itself may use.
            names: ``bos_token`` and its like, as variables.

        Raises:
            ModelFileError: `source` is no valid template.
        """
        self.source, self._specials, self._names = source, specials, names
        self._usual = Form(null_content=_CONTENT_NONE.search(source) is not None)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelFileError(f"the model's chat template is malformed ({error}): pass another one") from error

    @property
    def knows_tools(self) -> bool:
        """Whether the template says anything about tools."""
        return "tools" in self.source

    @property
    def has_thinking_switch(self) -> bool:
        """Whether the template can be told to think or not."""
        return _SWITCH.search(self.source) is not None

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[FunctionSpec] = (),
        *,
        reasoning: bool | None = None,
        parallel_tool_calls: bool = True,
        continue_final: bool = False,
    ) -> list[str | int]:
        """Return pieces of plain text and ids of the template's special tokens.

        Args:
            messages: the conversation.
            tools: that the model may call.
            reasoning: value of the template's switch; None leaves it unset.
            parallel_tool_calls: whether more than one call is allowed.
            continue_final: end inside of the last message instead of opening a turn.

        Raises:
            InvalidArgumentError: the template refuses these messages; the message says why.
        """
        refusal: InvalidArgumentError | None = None
        incomplete: list[str | int] | None = None
        for form in forms(messages, tools, self._usual):
            if form.merged_system and "system" not in str(refusal).lower():
                continue  # it was refused for something else
            if incomplete is not None and not form.flat_calls:
                continue
            shown = form.messages(messages)
            guard = Guard(
                self._specials, _strings([form.message(m, m.role) for m in shown] + (form.tools(tools) or []))
            )
            values = {
                "messages": [self._protected(guard, form.message(m, self._role(m))) for m in shown],
                "tools": guard.protect_all(form.tools(tools)),
                "add_generation_prompt": not continue_final,
                "parallel_tool_calls": parallel_tool_calls,
                "documents": None,
                **self._names,
            }
            if reasoning is not None:
                values |= {"enable_thinking": reasoning, "thinking": reasoning}
            try:
                rendered = self._run(values)
                if continue_final:
                    rendered = _cut_behind(rendered, guard.protect(shown[-1].content or "").strip())
            except InvalidArgumentError as error:
                refusal = refusal or error
                continue
            pieces = list(guard.split(rendered))
            if form.flat_calls or not drops_calls(rendered, messages, tools):
                return pieces
            incomplete = incomplete or pieces
        if incomplete is not None:
            return incomplete
        assert refusal is not None
        raise refusal

    def _run(self, values: dict[str, Any]) -> str:
        try:
            return self._template.render(values)
        except InvalidArgumentError:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise InvalidArgumentError(
                f"the chat template refuses these messages: {error}", param="messages"
            ) from error
        except RecursionError as error:
            raise InvalidArgumentError("the chat template recurses without end", param="messages") from error

    def _role(self, message: ChatMessage) -> str:
        known = message.role != "developer" or "developer" in self.source
        return message.role if known else "system"

    @staticmethod
    def _protected(guard: Guard, message: dict[str, Any]) -> dict[str, Any]:
        return {key: value if key == "role" else guard.protect_all(value) for key, value in message.items()}


def _cut_behind(rendered: str, final: str) -> str:
    at = rendered.rfind(final)
    if not final or at < 0:
        raise InvalidArgumentError(
            "the last message cannot be continued: it is empty, or the chat template changes it", param="messages"
        )
    return rendered[: at + len(final)]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


class _Sandbox(ImmutableSandboxedEnvironment):
    """No attribute of Python's own, no mutation, and no repetition that fills the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse ``'x' * 10**9`` and ``9**9**9``."""
        for value, other in ((left, right), (right, left)):
            sized = isinstance(value, str | list | tuple) and isinstance(other, int)
            if sized and len(value) * other > _MAX_REPEAT:
                raise jinja2.TemplateRuntimeError(f"a repetition of {len(value)} × {other} elements is refused")
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= 64):
            raise jinja2.TemplateRuntimeError(f"a power with the exponent {right!r} is refused")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's part for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares a set

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return the body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise InvalidArgumentError(f"the chat template refuses these messages: {message}", param="messages")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_listed
    )


def _listed(value: Any) -> list[Any]:
    """Filters such as `map` give iterators."""
    if isinstance(value, Iterator):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


_ENVIRONMENT: list[jinja2.Environment] = []


def _environment() -> jinja2.Environment:
    if not _ENVIRONMENT:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        _ENVIRONMENT.append(environment)
    return _ENVIRONMENT[0]
