"""Sends a workload and measures each request: one record a request, times in seconds from the start of the run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sagellm.bench.workload import Arrival, Workload, prompt_of
from sagellm.results import Delta
from sagellm.transport import Transport
from sagellm_protocol.errors import SageError

__all__ = ["Record", "run_workload"]


@dataclass
class Record:
    """One request as measured.

    Attributes:
        index: in the workload.
        due_s: when it was to be sent (None in a closed loop).
        sent_s: when it was sent.
        token_s: when each piece of the answer arrived.
        end_s: when the answer was complete.
        prompt_tokens, output_tokens, cached_tokens: as the server counts them.
        finish_reason: as the server says.
        error: what went wrong; empty if nothing did.
    """

    index: int
    due_s: float | None
    sent_s: float
    token_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether an answer came, whole."""
        return not self.error and bool(self.token_s)

    @property
    def ttft_s(self) -> float:
        """From sending to the first piece."""
        return self.token_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean time of each token after the first; 0 where there is only one."""
        return (self.token_s[-1] - self.token_s[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def itl_s(self) -> list[float]:
        """Gaps between pieces."""
        return [later - earlier for earlier, later in zip(self.token_s, self.token_s[1:], strict=False)]

    @property
    def e2e_s(self) -> float:
        """From sending to the end."""
        return self.end_s - self.sent_s


async def run_workload(
    transport: Transport,
    model: str,
    workload: Workload,
    *,
    warmup: int = 2,
    options: dict[str, Any] | None = None,
    prompts: Callable[[Arrival, int], str | list[int]] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Record]:
    """Send `workload` and return a record for each request; `warmup` requests of the same size go before and are not counted.

    Args:
        transport: where to.
        model: as served there.
        workload: what and when.
        warmup: how many requests warm the server; the first one also measures how many tokens a word is there.
        options: further fields of every request (``temperature`` is 0 unless given here).
        prompts: makes the prompt of an arrival, text or token ids; None is `prompt_of`, fitted to the vocabulary.
        on_done: told how many requests are done.
    """
    sender = _Sender(transport, model, workload, options or {}, prompts, on_done)
    for k in range(warmup):
        await sender.send(-1 - k, workload.arrivals[0])
        if k == 0:
            sender.calibrate()
    sender.start()
    if workload.concurrency is None:
        await asyncio.gather(*(sender.send_at(i, arrival) for i, arrival in enumerate(workload.arrivals)))
    else:
        todo = iter(enumerate(workload.arrivals))
        await asyncio.gather(*(sender.send_all(todo) for _ in range(workload.concurrency)))
    return sorted(sender.records, key=lambda record: record.index)


class _Sender:
    def __init__(
        self,
        transport: Transport,
        model: str,
        workload: Workload,
        options: dict[str, Any],
        prompts: Callable[[Arrival, int], str | list[int]] | None,
        on_done: Callable[[int], None] | None,
    ) -> None:
        self.transport = transport
        self.model = model
        self.workload = workload
        self.prompts = prompts or self._text
        self.options = {"temperature": 0, **options}
        self.on_done = on_done or (lambda _count: None)
        self.records: list[Record] = []
        self.began = time.perf_counter()
        self.words_per_token = 1.0

    def calibrate(self) -> None:
        """Fit the prompts' length to the vocabulary, by what the server counted."""
        counted, aimed = self.records[-1].prompt_tokens, self.workload.arrivals[0].prompt_tokens
        if counted:
            self.words_per_token = aimed / counted

    def _text(self, arrival: Arrival, index: int) -> str:
        return prompt_of(arrival, index, self.workload.seed, self.words_per_token)

    def start(self) -> None:
        self.records.clear()
        self.began = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.began

    async def send_all(self, todo: Any) -> None:
        for index, arrival in todo:
            await self.send(index, arrival)

    async def send_at(self, index: int, arrival: Arrival) -> None:
        await asyncio.sleep(max(0.0, (arrival.at_s or 0.0) - self.now()))
        await self.send(index, arrival)

    async def send(self, index: int, arrival: Arrival) -> None:
        body = {
            "model": self.model,
            "prompt": self.prompts(arrival, index),
            "max_tokens": arrival.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.options,
        }
        record = Record(index, arrival.at_s, self.now())
        try:
            async for chunk in self.transport.events("/completions", body):
                self._take(record, Delta(chunk))
        except SageError as error:
            record.error = f"{error.code.value}: {error}"
        record.end_s = self.now()
        if not record.error and record.output_tokens == 0:
            record.output_tokens = len(record.token_s)  # a server that sends no usage: one piece a token
        self.records.append(record)
        self.on_done(len(self.records))

    def _take(self, record: Record, delta: Delta) -> None:
        if delta.text:
            record.token_s.append(self.now())
        record.finish_reason = delta.finish_reason or record.finish_reason
        if usage := delta.usage:
            record.prompt_tokens = int(usage.get("prompt_tokens", 0))
            record.output_tokens = int(usage.get("completion_tokens", 0))
            record.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
