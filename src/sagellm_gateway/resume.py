"""Going on with a stream whose connection broke, also when the gateway process that served it is gone.

A client that sends ``X-Stream-Resume: true`` gets an ``id:`` line with every event: the answer's id and how many characters of each choice
have been sent so far. If the connection breaks it sends the same request again with the last of these as ``Last-Event-ID``, to any worker, and
gets the rest. Nothing is stored for this: the seed follows from the answer's id, an engine gives the same tokens for the same seed whatever
else it does, so the answer is computed again (its prompt is most likely in the prefix cache) and what was sent is left out. Characters are
counted, not events, because how tokens gather into events depends on the time.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import AsyncGenerator
from hashlib import blake2b
from typing import Any

import msgspec

from sagellm_gateway.context import Call
from sagellm_gateway.streaming import Frames
from sagellm_protocol.errors import InvalidArgumentError, SageError, UnsupportedError
from sagellm_protocol.generation import ChoiceDelta, GenerationEnd, GenerationRequest, GenerationStart, ToolCallDelta

__all__ = ["ResumableFrames", "Resume", "remaining", "resume_of"]

_EVENT_ID = re.compile(r"([a-z]+-[0-9a-f]{24})((?:\.\d{1,9}){1,128})")


class Resume(msgspec.Struct, frozen=True):
    """What a client wants: ids on its events, and where to go on (`answer_id` empty: from the beginning)."""

    answer_id: str = ""
    sent: tuple[int, ...] = ()

    def prepare(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request with the seed that follows from the answer's id, if it has none of its own.

        Raises:
            UnsupportedError: the stream carries what cannot be cut at a character.
        """
        if request.sampling.logprobs is not None:
            raise UnsupportedError("a stream with logprobs cannot be resumed: leave one of them out", param="logprobs")
        changes: dict[str, Any] = {}
        if request.sampling.seed is None:
            answer_id = self.answer_id or request.request_id
            seed = int.from_bytes(blake2b(answer_id.encode(), digest_size=8).digest(), "big") >> 1
            changes["sampling"] = msgspec.structs.replace(request.sampling, seed=seed)
        if self.answer_id:
            if len(self.sent) != request.n:
                raise InvalidArgumentError(
                    f"Last-Event-ID counts {len(self.sent)} choices, the request asks for {request.n}: send the same request",
                    param="last-event-id",
                )
            changes["request_id"] = (
                f"{request.request_id}~{secrets.token_hex(3)}"  # the first run may not have ended yet
            )
        return msgspec.structs.replace(request, **changes)


def resume_of(call: Call, prefix: str) -> Resume | None:
    """Return what the headers ask for; None if nothing.

    Raises:
        InvalidArgumentError: a Last-Event-ID that is none of ours.
    """
    raw = call.headers.get(b"last-event-id")
    if raw is None:
        return Resume() if call.headers.get(b"x-stream-resume", b"").lower() in (b"true", b"1") else None
    match = _EVENT_ID.fullmatch(raw.decode("latin-1"))
    if match is None or not match[1].startswith(prefix):
        raise InvalidArgumentError(
            "Last-Event-ID is not the id of an event of this kind of answer: send it as it came", param="last-event-id"
        )
    return Resume(match[1], tuple(int(count) for count in match[2][1:].split(".")))


async def remaining(events: AsyncGenerator[Any, None], sent: tuple[int, ...]) -> AsyncGenerator[Any, None]:
    """Pass `events` on without the first ``sent[k]`` characters of choice ``k``."""
    left = list(sent)
    skipped: list[tuple[int, ...]] = [()] * len(sent)  # tokens are counted all the same
    async with contextlib.aclosing(events):
        async for event in events:
            if type(event) is not ChoiceDelta or not (left[event.index] or skipped[event.index]):
                yield event
                continue
            rest, left[event.index] = _cut(event, left[event.index])
            skipped[event.index] += event.token_ids
            if rest is not None:
                yield msgspec.structs.replace(rest, token_ids=skipped[event.index])
                skipped[event.index] = ()


def size(event: ChoiceDelta) -> int:
    """Return the characters of a delta: reasoning, text, and of each piece of a tool call its arguments and one for its head."""
    calls = sum(len(call.arguments) + (call.name is not None) for call in event.tool_calls)
    return len(event.reasoning) + len(event.text) + calls


def _cut(event: ChoiceDelta, count: int) -> tuple[ChoiceDelta | None, int]:
    """Return the delta without its first `count` characters (None if nothing is left), and how many are still to go."""
    reasoning, count = _drop(event.reasoning, count)
    text, count = _drop(event.text, count)
    calls: list[ToolCallDelta] = []
    for call in event.tool_calls:
        if call.name is not None and count:
            count -= 1
            call = msgspec.structs.replace(call, id=None, name=None)  # noqa: PLW2901 (its head was sent)
        arguments, count = _drop(call.arguments, count)
        if arguments or call.name is not None:
            calls.append(msgspec.structs.replace(call, arguments=arguments))
    if not (reasoning or text or calls or event.finish_reason):
        return None, count
    return msgspec.structs.replace(event, reasoning=reasoning, text=text, tool_calls=tuple(calls)), count


def _drop(text: str, count: int) -> tuple[str, int]:
    return text[count:], max(0, count - len(text))


class ResumableFrames:
    """Frames with an ``id:`` line on the last event of each delta.

    Args:
        frames: of the dialect; server-sent events.
        answer_id: the answer's id.
        choices: how many.
        resume: where to go on; what begins an answer was sent already then.
    """

    def __init__(self, frames: Frames, answer_id: str, choices: int, resume: Resume) -> None:
        self.content_type = frames.content_type
        self.ping = frames.ping
        self._frames = frames
        self._answer_id = answer_id.encode()
        self._sent = list(resume.sent) or [0] * choices
        self._resumed = bool(resume.answer_id)

    def start(self, event: GenerationStart) -> bytes:
        """The beginning, unless the client has it."""
        data = self._frames.start(event)
        return b"" if self._resumed else self._with_id(data)

    def delta(self, event: ChoiceDelta) -> bytes:
        """What a choice gained, and how far that brings the client."""
        self._sent[event.index] += size(event)
        return self._with_id(self._frames.delta(event))

    def end(self, event: GenerationEnd) -> bytes:
        """The end."""
        return self._frames.end(event)

    def error(self, error: SageError) -> bytes:
        """The stream breaks off."""
        return self._frames.error(error)

    def _with_id(self, data: bytes) -> bytes:
        if not data:
            return data
        at = data.rfind(b"\n\ndata: ")
        at = 0 if at < 0 else at + 2
        counts = "".join(f".{count}" for count in self._sent).encode()
        return data[:at] + b"id: " + self._answer_id + counts + b"\n" + data[at:]
