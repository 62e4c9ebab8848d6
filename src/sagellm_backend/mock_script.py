"""Scripted replies of the simulated device, so that each feature of a client can be tested without a capable model.

A script is JSON: rules are tried in order, the first whose `contains` stands in the last message (and whose `role` is that
message's) replies; where none does the device talks as usual::

    {"rules": [
      {"contains": "weather", "role": "user", "reply": [
        {"think": "I need the weather."},
        {"tool": {"name": "get_weather", "arguments": {"city": "Paris"}}}]},
      {"role": "tool", "reply": [{"say": "It is 18 degrees."}]},
      {"contains": "slow", "reply": [{"drip_ms": 50}, {"say": "one letter at a time"}]},
      {"contains": "hang", "reply": [{"say": "Now"}, {"stall_s": 3600}]},
      {"contains": "deny", "reply": [{"say": "Well, "}, {"fail": "resource_exhausted"}]},
      {"contains": "die", "reply": [{"say": "Good"}, {"crash": "process"}]},
      {"contains": "choose", "choices": [[{"say": "red"}], [{"say": "blue"}]]}]}

Tool calls are written as ``<tool_call>{"name": …, "arguments": …}</tool_call>`` and thoughts as ``<think>…</think>``: the text side
parses them as it would a model's. Of `choices` the one numbered seed modulo their number is taken. A step of the device lasts as
long as its slowest sequence, so `drip_ms` and `stall_s` hold up the whole engine, as a slow device does. ``crash`` ends the
engine (or its process) at that place, but never at the first token that an engine draws for a sequence: so a reply that is continued
elsewhere gets through.
"""

from __future__ import annotations

import json
import os
import signal
import zlib
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from sagellm_backend.base import RowSampling
from sagellm_backend.mock import BYTE_VOCAB, EOS, IM_END, IM_START, Next, NextToken, WordSalad
from sagellm_protocol.errors import EngineDiedError, Error, ErrorCode, InvalidArgumentError, SageError

__all__ = ["Script", "ScriptRule", "ScriptStep", "ScriptTool", "ScriptedTokens", "load_script"]

Int32 = npt.NDArray[np.int32]


class ScriptTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call of a tool."""

    name: str
    arguments: dict[str, Any] = {}


class ScriptStep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a reply: exactly one field is set.

    Attributes:
        say: text.
        think: text before the answer, between think marks.
        tool: call a tool.
        drip_ms: milliseconds before each of the tokens that follow.
        stall_s: seconds before the next token.
        fail: end the sequence with this error.
        crash: end the ``engine``, or kill its ``process``.
    """

    say: str | None = None
    think: str | None = None
    tool: ScriptTool | None = None
    drip_ms: float | None = None
    stall_s: float | None = None
    fail: ErrorCode | None = None
    crash: Literal["engine", "process"] | None = None

    def __post_init__(self) -> None:
        named = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"a step does one thing, this one names {', '.join(named) or 'nothing'}")


class ScriptRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When to say what: `reply`, or one of `choices`."""

    contains: str = ""
    role: Literal["", "system", "user", "assistant", "tool"] = ""
    reply: tuple[ScriptStep, ...] = ()
    choices: tuple[tuple[ScriptStep, ...], ...] = ()

    def __post_init__(self) -> None:
        if bool(self.reply) == bool(self.choices):
            raise ValueError("a rule has either a reply or choices")


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All rules, first match wins."""

    rules: tuple[ScriptRule, ...]


def load_script(path: str | Path) -> Script:
    """Read a script.

    Raises:
        InvalidArgumentError: the file is missing or no script; the message says where.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Script)
    except OSError as error:
        raise InvalidArgumentError(f"the script cannot be read: {error.strerror}", param="script") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"the script is malformed: {error}", param="script") from error


@dataclass(slots=True)
class _Reply:
    """A reply as tokens; `seconds` and `faults` are by index."""

    ids: list[int] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)
    faults: dict[int, ScriptStep] = field(default_factory=dict)


class ScriptedTokens:
    """`NextToken` that follows a script, and talks as usual where no rule matches."""

    def __init__(self, script: Script, otherwise: NextToken | None = None) -> None:
        self._rules = [(rule, [_compile(steps) for steps in rule.choices or (rule.reply,)]) for rule in script.rules]
        self._otherwise = otherwise or WordSalad(BYTE_VOCAB)
        self._drawn: deque[int] = deque(maxlen=4096)

    def __call__(self, tokens: Int32, row: RowSampling, /) -> Next:
        """Return what the script says at this place.

        Raises:
            SageError: the script fails the sequence, or the engine, here.
        """
        at = row.position
        prompt = tokens[: tokens.size - at]
        reply = self._find(prompt, row.seed) if row.target < 0 else None
        if reply is None:
            return self._otherwise(tokens, row)
        fault = reply.faults.get(at)
        if fault is not None:
            self._strike(fault, tokens)
        self._drawn.append(zlib.crc32(tokens.tobytes()))
        end = IM_END if IM_START in prompt else EOS
        return Next((reply.ids[at] if at < len(reply.ids) else end,), favour=40.0, seconds=reply.seconds.get(at, 0.0))

    def _find(self, prompt: Int32, seed: int) -> _Reply | None:
        role, message = _last_message(prompt)
        for rule, replies in self._rules:
            if rule.contains in message and rule.role in ("", role):
                return replies[seed % len(replies)]
        return None

    def _strike(self, fault: ScriptStep, tokens: Int32) -> None:
        if fault.fail is not None:
            raise SageError.from_wire(Error(code=fault.fail, message=f"the script fails here with {fault.fail.value}"))
        if zlib.crc32(tokens[:-1].tobytes()) not in self._drawn:
            return  # this engine has not drawn the token before: the sequence is continued here
        if fault.crash == "process":
            os.kill(os.getpid(), signal.SIGKILL)
        raise EngineDiedError("the script ends the engine here")


def _compile(steps: tuple[ScriptStep, ...]) -> _Reply:
    reply = _Reply()
    drip = 0.0
    for step in steps:
        if step.drip_ms is not None:
            drip = step.drip_ms / 1e3
        elif step.stall_s is not None:
            reply.seconds[len(reply.ids)] = step.stall_s
        elif step.fail is not None or step.crash is not None:
            reply.faults[len(reply.ids)] = step
        else:
            for byte in _text(step).encode():
                if drip:
                    reply.seconds[len(reply.ids)] = reply.seconds.get(len(reply.ids), 0.0) + drip
                reply.ids.append(byte)
    return reply


def _text(step: ScriptStep) -> str:
    if step.think is not None:
        return f"<think>\n{step.think}\n</think>\n\n"
    if step.tool is not None:
        # Spaced as the grammars of strict tools want it.
        call = json.dumps(msgspec.to_builtins(step.tool), ensure_ascii=False)
        return f"<tool_call>\n{call}\n</tool_call>\n"
    return step.say or ""


def _last_message(prompt: Int32) -> tuple[str, str]:
    """Return role and text of the last message before the reply; a prompt that is no chat has no role."""
    starts = np.flatnonzero(prompt == IM_START)
    if starts.size < 2:
        return "", _decode(prompt)
    message = _decode(prompt[starts[-2] + 1 : starts[-1]])
    role, _, text = message.partition("\n")
    return role, text


def _decode(ids: Int32) -> str:
    return bytes(ids[ids < 256].astype(np.uint8)).decode("utf-8", "replace")
