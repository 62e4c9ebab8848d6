"""`until_it_waits`: await by hand, and act at the moment at which one would have to wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from sagellm_gateway.streaming import carry_on, until_it_waits


class Source:
    """Yields two numbers at once, waits, yields a third; notes how it ended."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.ended: BaseException | str | None = None

    async def numbers(self) -> AsyncGenerator[int, None]:
        try:
            yield 1
            yield 2
            await self.gate.wait()
            yield 3
            self.ended = "done"
        except BaseException as error:
            self.ended = error
            raise


async def taken(source: Source, log: list[object]) -> None:
    async with aclosing(source.numbers()) as numbers:
        while True:
            try:
                log.append(await until_it_waits(anext(numbers), lambda: log.append("wait")))
            except StopAsyncIteration:
                return


async def test_what_is_there_is_taken_before_it_acts() -> None:
    """The action comes exactly once for each wait, after everything that could be had without one."""
    source, log = Source(), []
    task = asyncio.create_task(taken(source, log))
    await asyncio.sleep(0)
    assert log == [1, 2, "wait"]
    source.gate.set()
    await task
    assert (log, source.ended) == ([1, 2, "wait", 3], "done")


async def test_a_cancellation_reaches_what_is_awaited() -> None:
    """Cancelling the task while it waits ends the generator where it stands, as with a plain await."""
    source, log = Source(), []
    task = asyncio.create_task(taken(source, log))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(source.ended, asyncio.CancelledError)


async def test_a_failing_action_ends_the_wait() -> None:
    """An action that fails fails the await, and the generator is not left hanging in it."""
    source = Source()

    def fail() -> None:
        raise OSError("broken pipe")

    async with aclosing(source.numbers()) as numbers:
        assert [await until_it_waits(anext(numbers), fail) for _ in range(2)] == [1, 2]
        with pytest.raises(OSError, match="broken pipe"):
            await until_it_waits(anext(numbers), fail)
    assert isinstance(source.ended, OSError)


async def test_another_task_can_finish_what_was_begun_by_hand() -> None:
    """A coroutine that was stepped until it waits ends in whatever task goes on with it, with its value."""
    gate = asyncio.Event()

    async def work() -> str:
        await gate.wait()
        await asyncio.sleep(0)
        return "done"

    async def go_on(coroutine: Any, waits_for: Any) -> Any:
        return await carry_on(coroutine, waits_for)

    coroutine = work()
    task = asyncio.create_task(go_on(coroutine, coroutine.send(None)))
    await asyncio.sleep(0)
    assert not task.done()
    gate.set()
    assert await task == "done"
