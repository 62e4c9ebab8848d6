"""A small engine for tests of the process and the wire: token k after a prompt that ends with p is p + k + 1. Also runs as a process."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from sagellm_protocol.engine import EngineDescription, EngineRequest, EngineStatus, TokenDelta
from sagellm_protocol.errors import EngineDiedError, ModelFileError, ResourceExhaustedError


class CountingEngine:
    """Prompt token ids below 10 are commands.

    0 refuses, 1 dies, 2 is a bug, 3 blocks the event loop for ever, 4 waits for ever, 5 holds the interpreter lock for ever.
    """

    def __init__(self, engine_id: str = "counting", step_s: float = 0.0) -> None:
        self.engine_id = engine_id
        self.step_s = step_s
        self.steps = 0
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.closed = False
        self.changed = asyncio.Event()

    async def until(self, condition: Callable[[CountingEngine], bool]) -> None:
        """Wait until `condition` holds, looking again whenever a sequence comes or goes."""
        while not condition(self):
            self.changed.clear()
            await self.changed.wait()

    async def describe(self) -> EngineDescription:
        return EngineDescription(
            engine_id=self.engine_id, model="count", architecture="none", backend="test", device="cpu", vocab_size=100_000,
            context_length=4096, block_size=16, n_blocks=64, max_batch_tokens=512, max_sequences=16, pid=os.getpid(),
        )  # fmt: skip

    async def status(self) -> EngineStatus:
        return EngineStatus(
            engine_id=self.engine_id, running=len(self.running), steps=self.steps, aborted=len(self.aborted)
        )

    async def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        last = request.prompt_token_ids[-1]
        if last == 0:
            raise ResourceExhaustedError("the queue holds 0 requests: try later", retry_after_s=2.0)
        if last == 1:
            raise EngineDiedError("the step thread ended")
        if last == 2:
            raise ZeroDivisionError("secret detail")
        if request.request_id in self.running:
            raise AssertionError(f"{request.request_id} is running")
        self.running.add(request.request_id)
        self.changed.set()
        finished = False
        try:
            if last == 3:
                time.sleep(3600)  # noqa: ASYNC251 (that is the point)
            if last == 4:
                await asyncio.Event().wait()
            if last == 5:
                ctypes.PyDLL(None).sleep(3600)
            total = request.sampling.max_tokens or 16
            yield TokenDelta(request_id=request.request_id, prompt_tokens=len(request.prompt_token_ids))
            for k in range(len(request.emitted_token_ids), total):
                await asyncio.sleep(self.step_s)
                self.steps += 1
                reason = "length" if k == total - 1 else None
                yield TokenDelta(request_id=request.request_id, token_ids=(last + k + 1,), finish_reason=reason)
            finished = True
        finally:
            self.running.discard(request.request_id)
            if not finished:
                self.aborted.append(request.request_id)
            self.changed.set()

    async def abort(self, request_id: str) -> bool:
        return request_id in self.running

    async def close(self) -> None:
        self.closed = True


def main() -> int:
    """Serve as ``sagellm_core.server`` does, with this engine in place of a model's."""
    from sagellm_core import server

    def build(text: str) -> CountingEngine:
        config = json.loads(text)
        crash_file = config.pop("crash_file", None)
        if crash_file is not None and Path(crash_file).exists():
            os._exit(9)
        if config.pop("bad_model", False):
            raise ModelFileError("weights are truncated at byte 12: fetch the file again")
        if config.pop("hang", False):
            time.sleep(3600)
        sys.stderr.write("building the engine\n")
        return CountingEngine(**config)

    server._build = build
    return server.main()


if __name__ == "__main__":
    raise SystemExit(main())
