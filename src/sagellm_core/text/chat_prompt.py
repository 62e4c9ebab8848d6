"""From a conversation to the ids of a prompt, and how the answer to it is to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from sagellm_core.text.parsing.select import ParserPlan, ToolFormat, reasoning_marks, tool_format
from sagellm_core.text.specials import SpecialTokens
from sagellm_core.text.tokenizer import TextTokenizer
from sagellm_core.text.tool_prompt import call_grammar, chosen_tools, strict_grammar, with_tool_prompt
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError
from sagellm_protocol.generation import ChatMessage, FunctionSpec, GenerationRequest
from sagellm_protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from sagellm_core.text.template import ChatTemplate

__all__ = ["chat_prompt", "constrained_sampling"]

_TAIL = 16


def chat_prompt(
    request: GenerationRequest,
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    check_length: Callable[[Sequence[str | int]], None],
) -> tuple[list[int], ParserPlan]:
    """Render and tokenise a conversation.

    Args:
        request: with messages.
        template: of the model.
        tokenizer: of the model.
        check_length: called with the rendered pieces before they are tokenised.

    Raises:
        InvalidArgumentError: empty messages, or messages that the template refuses; a tool choice without its tool.
        UnsupportedError: reasoning from a model that does not reason, or together with a grammar.
    """
    if not request.messages:
        raise InvalidArgumentError("messages is empty: pass at least one message", param="messages")
    if request.continue_final and request.messages[-1].role != "assistant":
        raise InvalidArgumentError("only a message of the assistant can be continued", param="messages")
    tools = chosen_tools(request.tools, request.tool_choice)
    forced = bool(tools) and request.tool_choice != "auto"
    marks = reasoning_marks(template.source, tokenizer.marks)
    constrained = forced or request.sampling.grammar is not None
    if constrained and request.sampling.grammar is not None and (forced or any(tool.strict for tool in tools)):
        raise InvalidArgumentError(
            "a grammar and a forced call (or strict tools) exclude each other: leave one of them out",
            param="tool_choice",
        )
    thinks = _thinks(request, template, marks, constrained=constrained)
    messages: Sequence[ChatMessage] = request.messages
    if not template.knows_tools:
        messages = with_tool_prompt(messages, tools)
    pieces = template.render(
        messages,
        tools if template.knows_tools else (),
        reasoning=thinks,
        parallel_tool_calls=request.parallel_tool_calls,
        continue_final=request.continue_final,
    )
    check_length(pieces)
    ids = tokenizer.encode_pieces(pieces)
    if not ids:
        raise InvalidArgumentError("the chat template makes nothing of these messages", param="messages")
    opened = marks is not None and tokenizer.decode(ids[-_TAIL:]).rstrip().endswith(marks[0])
    if marks is not None and opened and thinks is False:
        # The template thinks whether it is told to or not: close what it opened.
        ids += tokenizer.encode_pieces([0, *tokenizer.specials.split(f"{marks[1]}\n\n")])[1:]
        opened = False
    plan = ParserPlan(
        tools=_tool_format(request, template, tokenizer, tools, forced=forced),
        specs=tools,
        reasoning=None if constrained else marks,
        opened=opened,
        parallel=request.parallel_tool_calls,
    )
    return ids, plan


def constrained_sampling(request: GenerationRequest, plan: ParserPlan, specials: SpecialTokens) -> SamplingParams:
    """Return the request's sampling, with the grammar of a forced call or of strict tools.

    Raises:
        UnsupportedError: strict tools in a format that is no JSON.
    """
    tools = chosen_tools(request.tools, request.tool_choice) if plan.tools != "none" else ()
    if plan.tools == "forced":
        grammar = call_grammar(tools)
    elif any(tool.strict for tool in tools):
        grammar = strict_grammar(plan.tools, tools, specials.get)
    else:
        return request.sampling
    return msgspec.structs.replace(request.sampling, grammar=grammar)


def _thinks(
    request: GenerationRequest, template: ChatTemplate, marks: tuple[str, str] | None, *, constrained: bool
) -> bool | None:
    """What to tell the template: the request's wish; no reasoning where a grammar begins with the first token."""
    if request.reasoning and marks is None and not template.has_thinking_switch:
        raise UnsupportedError(f"{request.model} does not reason: leave reasoning out", param="reasoning")
    if not constrained:
        return request.reasoning
    if request.reasoning:
        raise UnsupportedError("reasoning cannot be combined with a grammar or a forced call", param="reasoning")
    return False if marks is not None else None


def _tool_format(
    request: GenerationRequest,
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    tools: Sequence[FunctionSpec],
    *,
    forced: bool,
) -> ToolFormat:
    if not tools:
        return "none"
    if request.sampling.grammar is not None:  # the answer is what the grammar says, not a call
        return "none"
    if forced:
        return "forced"
    return tool_format(template.source, tokenizer.marks) if template.knows_tools else "generic"
