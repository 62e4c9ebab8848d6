"""Token ids of one choice -> text, with logprobs, stop strings and whole characters only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from sagellm_core.text.parsing.base import Output
from sagellm_core.text.parsing.select import ParserPlan
from sagellm_core.text.stream import StopMatcher, Utf8Stream
from sagellm_protocol.engine import TokenDelta
from sagellm_protocol.generation import ChoiceDelta, FinishReason, TokenLogprob

__all__ = ["ChoiceDecoder", "spell_logprobs"]

Spell = Callable[[int], bytes]


class ChoiceDecoder:
    """A `TextDecoder`. Tokens whose text is held back wait with it, so that ids and logprobs go out with their text."""

    def __init__(
        self,
        spell: Spell,
        *,
        index: int = 0,
        stops: Sequence[str] = (),
        hidden: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        plan: ParserPlan | None = None,
    ) -> None:
        """Begin a choice.

        Args:
            spell: token id -> bytes.
            index: of the choice.
            stops: strings that end the output.
            hidden: ids that are no text (control tokens).
            min_tokens: stop strings are not looked for before that many tokens.
            plan: how reasoning and tool calls are read; None reads all as text.
        """
        self._spell, self._index, self._hidden, self._min_tokens = spell, index, hidden, min_tokens
        self._utf8, self._stops = Utf8Stream(), StopMatcher(stops)
        self._plan = plan or ParserPlan()
        self._calls = self._plan.log()
        self._parser = self._plan.build(self._calls)
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._count = 0
        self._done = False

    def push(self, delta: TokenDelta) -> ChoiceDelta | None:
        """Return what the choice gained, or None when nothing can be shown yet."""
        if self._done:
            return None
        text = "".join(self._tokens(delta))
        reason: FinishReason | None = delta.finish_reason
        if self._stops.matched is not None:
            reason = "stop"
        elif reason is not None:
            text += self._stops.push(self._utf8.flush())
            if self._stops.matched is None:
                text += self._stops.flush()
        if delta.text is not None:  # a foreign engine that speaks text
            text += delta.text
        out = Output()
        self._parser.push(text, out)
        if reason is not None:
            self._parser.finish(out)
        reason = self._judged(out, reason)
        self._done = reason is not None
        return self._emit(out, reason) if out or self._done else None

    def _judged(self, out: Output, reason: FinishReason | None) -> FinishReason | None:
        """An answer that calls a tool ends as ``tool_calls``; so it does when a second call begins and one is allowed."""
        if not self._plan.parallel and self._calls.count > 1:
            out.calls = [call for call in out.calls if call.index == 0]
            return "tool_calls"
        return "tool_calls" if reason == "stop" and self._calls.count else reason

    def _tokens(self, delta: TokenDelta) -> list[str]:
        """Take in the delta's tokens up to a stop string; return the text that became certain."""
        out: list[str] = []
        logprobs = delta.logprobs or ()
        for position, token in enumerate(delta.token_ids):
            self._ids.append(token)
            self._count += 1
            piece = "" if token in self._hidden else self._utf8.push(self._spell(token))
            if position < len(logprobs):
                self._logprobs = self._logprobs or []
                self._logprobs.append(_spelled(logprobs[position], self._spell, piece))
            out.append(self._stops.push(piece) if self._count > self._min_tokens else piece)
            if self._stops.matched is not None:
                break
        return out

    def _emit(self, out: Output, reason: FinishReason | None) -> ChoiceDelta:
        ids, logprobs = tuple(self._ids), self._logprobs
        self._ids, self._logprobs = [], None
        return ChoiceDelta(
            index=self._index,
            text=out.text,
            reasoning=out.reasoning,
            tool_calls=tuple(out.calls),
            token_ids=ids,
            logprobs=None if logprobs is None else tuple(logprobs),
            finish_reason=reason,
            stop_match=self._stops.matched,
        )


def spell_logprobs(entries: Sequence[TokenLogprob | None], spell: Spell) -> tuple[TokenLogprob | None, ...]:
    """Return a prompt's logprobs with text and bytes filled in; a token inside a character adds no text."""
    utf8 = Utf8Stream()
    return tuple(None if e is None else _spelled(e, spell, utf8.push(spell(e.token_id))) for e in entries)


def _spelled(entry: TokenLogprob, spell: Spell, text: str) -> TokenLogprob:
    top = tuple(
        msgspec.structs.replace(t, text=spell(t.token_id).decode("utf-8", "ignore"), data=spell(t.token_id))
        for t in entry.top
    )
    return msgspec.structs.replace(entry, text=text, data=spell(entry.token_id), top=top)
