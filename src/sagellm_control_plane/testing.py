"""Fakes for tests of the control plane and of what stands on it: an engine without a model, and a text side without a tokenizer.

`ScriptedEngine` draws token k of a sequence as a pure function of prompt, seed and k, so that any number of them give the same output
and a continuation can be checked token for token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import msgspec

from sagellm_protocol.engine import EngineDescription, EngineRequest, EngineStatus, TokenDelta
from sagellm_protocol.errors import EngineDiedError, InvalidArgumentError, UnavailableError
from sagellm_protocol.generation import ChoiceDelta, FinishReason, GenerationRequest

__all__ = ["LetterChatModel", "ScriptedEngine", "expected_tokens"]

_LETTERS = 26


def expected_tokens(request: EngineRequest) -> list[int]:
    """Return the tokens that an undisturbed `ScriptedEngine` gives."""
    limit = request.sampling.max_tokens or 16
    return [_token(request, position) for position in range(limit)]


def _token(request: EngineRequest, position: int) -> int:
    text = f"{request.prompt_token_ids}{request.sampling.seed}{position}"
    return ord("a") + crc32(text.encode()) % _LETTERS


@dataclass
class ScriptedEngine:
    """An `EngineClient` in memory. Faults are switched on by the fields, also while it runs.

    Attributes:
        engine_id: its name.
        model: what it says it serves.
        token_s: seconds between tokens; 0 gives control back to the loop and goes on.
        die_after: tokens after which each stream dies with the engine, None never.
        abort_after: tokens after which a stream alone breaks, None never.
        stall_after: tokens after which a stream falls silent.
        refuse: every new stream is answered by 503.
        dead: it answers nothing at all.
        slots: sequences that it says it runs at once.
        kills: prompts that kill any engine they reach.
    """

    engine_id: str
    model: str = "letters"
    token_s: float = 0.0
    die_after: int | None = None
    abort_after: int | None = None
    stall_after: int | None = None
    refuse: bool = False
    dead: bool = False
    slots: int = 64
    kills: set[tuple[int, ...]] = field(default_factory=set)
    received: list[EngineRequest] = field(default_factory=list)
    running: dict[str, EngineRequest] = field(default_factory=dict)
    steps: int = 0
    deaths: int = 0
    closed: bool = False
    aborted: list[str] = field(default_factory=list)

    async def describe(self) -> EngineDescription:
        """Return a description."""
        self._check()
        return EngineDescription(
            engine_id=self.engine_id,
            model=self.model,
            architecture="scripted",
            backend="scripted",
            device="none",
            vocab_size=256,
            context_length=4096,
            block_size=16,
            n_blocks=256,
            max_batch_tokens=512,
            max_sequences=self.slots,
        )

    async def status(self) -> EngineStatus:
        """Return the load."""
        self._check()
        return EngineStatus(engine_id=self.engine_id, running=len(self.running), steps=self.steps)

    def _check(self) -> None:
        if self.dead:
            raise UnavailableError(f"engine {self.engine_id} does not answer")

    def die(self) -> None:
        """End the engine: every stream breaks."""
        self.dead = True
        self.deaths += 1

    async def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Run a sequence."""
        if self.dead:
            raise EngineDiedError(f"engine {self.engine_id} is gone")
        if self.refuse:
            raise UnavailableError(f"engine {self.engine_id} is full")
        self.received.append(request)
        self.running[request.request_id] = request
        try:
            async for delta in self._tokens(request):
                yield delta
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(request.request_id)
            raise
        finally:
            self.running.pop(request.request_id, None)

    async def _tokens(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        name = request.request_id
        yield TokenDelta(request_id=name, prompt_tokens=len(request.prompt_token_ids))
        limit = request.sampling.max_tokens or 16
        for sent, position in enumerate(range(len(request.emitted_token_ids), limit)):
            await asyncio.sleep(self.token_s)
            if request.prompt_token_ids in self.kills and not self.dead:
                self.die()
            if sent == self.die_after:
                self.die()
            if self.dead or sent == self.abort_after:
                raise EngineDiedError(f"engine {self.engine_id} broke the stream")
            if sent == self.stall_after:
                await asyncio.Event().wait()
            self.steps += 1
            finish: FinishReason | None = "length" if position == limit - 1 else None
            yield TokenDelta(request_id=name, token_ids=(_token(request, position),), finish_reason=finish)

    async def abort(self, request_id: str) -> bool:
        """Nothing is held outside of the generators."""
        return request_id in self.running

    async def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True


@dataclass
class _Prepared:
    source: GenerationRequest
    engine_requests: Sequence[EngineRequest]
    text: bytes | None = None


class _LetterDecoder:
    def __init__(self, request: EngineRequest, index: int) -> None:
        self._stops = request.sampling.stop
        self._index = index
        self._text = ""
        self._shown = 0

    def push(self, delta: TokenDelta) -> ChoiceDelta | None:
        self._text += "".join(map(chr, delta.token_ids))
        for stop in self._stops:
            at = self._text.find(stop, max(0, self._shown - len(stop)))
            if at >= 0:
                return self._show(at, delta, "stop", stop)
        held = 0 if delta.finish_reason else max((len(stop) - 1 for stop in self._stops), default=0)
        end = max(len(self._text) - held, self._shown)
        if end == self._shown and delta.finish_reason is None:
            return None
        return self._show(end, delta, delta.finish_reason, None)

    def _show(self, end: int, delta: TokenDelta, finish: FinishReason | None, stop: str | None) -> ChoiceDelta:
        text, self._shown = self._text[self._shown : end], end
        return ChoiceDelta(
            index=self._index, text=text, token_ids=delta.token_ids, finish_reason=finish, stop_match=stop
        )


class LetterChatModel:
    """A `ChatModel` whose tokens are characters."""

    def __init__(self, model_id: str = "letters", context_length: int = 4096) -> None:
        self.model_id = model_id
        self.context_length = context_length

    def prepare(self, request: GenerationRequest) -> _Prepared:
        """Encode the prompt, or the messages' contents in a row."""
        if request.prompt is not None and not isinstance(request.prompt, str):
            ids = tuple(request.prompt)
        else:
            text = request.prompt or "".join(message.content or "" for message in request.messages or ())
            ids = tuple(map(ord, text))
        if not ids:
            raise InvalidArgumentError("the prompt is empty: give at least one character", param="prompt")
        out = []
        for k in range(request.n):
            sampling = msgspec.structs.replace(
                request.sampling, seed=(request.sampling.seed or 0) + k, max_tokens=request.sampling.max_tokens or 16
            )
            name = request.request_id if request.n == 1 else f"{request.request_id}/{k}"
            out.append(
                EngineRequest(
                    request_id=name,
                    prompt_token_ids=ids,
                    sampling=sampling,
                    priority=request.priority,
                    deadline_s=request.deadline_s,
                )
            )
        return _Prepared(request, tuple(out))

    def decoder(self, prepared: _Prepared, index: int) -> _LetterDecoder:
        """Return a decoder with stop strings."""
        return _LetterDecoder(prepared.engine_requests[index], index)

    def tokenize(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Characters."""
        del add_special_tokens, parse_special  # there are no special tokens
        return list(map(ord, text))

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Characters."""
        del skip_special_tokens
        return "".join(map(chr, token_ids))
