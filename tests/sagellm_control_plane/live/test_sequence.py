"""From an engine's bytes to the reader: who runs when, for engines that push."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from sagellm_control_plane.live.sequence import Mailbox
from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_control_plane.testing import LetterChatModel, ScriptedEngine
from sagellm_control_plane.view import RequestView
from sagellm_protocol.engine import EngineRequest, TokenDelta
from sagellm_protocol.generation import ChoiceDelta, GenerationRequest
from sagellm_protocol.sampling import SamplingParams


class PushingEngine(ScriptedEngine):
    """An engine whose tokens the test pushes by hand."""

    def push(self, request, sink):
        self.sink, self.cancelled = sink, False
        return self

    def cancel(self):
        self.cancelled = True

    def token(self, letter, finish=None):
        self.sink.delta(TokenDelta(request_id="r", token_ids=(ord(letter),), finish_reason=finish))


@asynccontextmanager
async def reading(stop=(), heard=lambda _event: None):
    """A request on a pushing engine, up to where its reader waits; yields manager, engine, and the texts that were read."""
    engine, manager, read = PushingEngine("e"), ControlPlaneManager(seed=1), []
    await manager.start()
    await manager.add_engine(engine, LetterChatModel())
    sampling = SamplingParams(max_tokens=8, stop=stop)
    request = GenerationRequest(request_id="r", model="letters", prompt="hello", sampling=sampling)

    async def read_all():
        async for event in manager.generate(request):
            if isinstance(event, ChoiceDelta):
                heard(manager)
                read.append(event.text)

    reader = asyncio.create_task(read_all())
    await asyncio.sleep(0)  # it runs up to where it waits
    try:
        yield manager, engine, read
        await asyncio.wait_for(reader, 5)
    finally:
        await manager.stop()
    assert manager._state.ledger.open == manager._state.active == 0


async def from_the_loop(act):
    """Call `act` as the event loop calls a protocol: not from a task. Returns what it returns, or raises what it raises."""
    done = asyncio.get_running_loop().create_future()

    def call():
        try:
            done.set_result(act())
        except Exception as error:  # noqa: BLE001  (the test's own failure, carried to it)
            done.set_exception(error)

    asyncio.get_running_loop().call_soon(call)
    return await done


async def test_a_waiting_reader_has_a_token_before_the_engines_read_is_over():
    """A token that arrives on a socket is with its reader when the call that brought it returns, not a turn of the loop later."""
    async with reading() as (_manager, engine, read):

        def arrive():
            engine.token("a")
            first = list(read)
            engine.token("b")
            return first, list(read)

        assert await from_the_loop(arrive) == (["a"], ["a", "b"])
        engine.token("c", finish="stop")


async def test_a_token_that_a_task_brings_is_read_in_the_next_turn():
    """Two tasks cannot run at once: the reader of a token that another task brought waits for its turn, and loses nothing."""
    async with reading() as (_manager, engine, read):
        engine.token("a")
        engine.token("b")
        assert read == []
        await asyncio.sleep(0)
        assert "".join(read) == "ab"
        engine.token("c", finish="stop")


async def test_the_reader_comes_before_the_books():
    """The last token is read while the core still holds the lease; when the call that brought it returns the lease is back."""
    leases = []
    async with reading(heard=lambda manager: leases.append(manager._state.ledger.open)) as (manager, engine, read):

        def arrive():
            engine.token("a", finish="stop")
            return list(read), list(leases), manager._state.ledger.open

        assert await from_the_loop(arrive) == (["a"], [1], 0)


@pytest.mark.parametrize("first", ["", "xyz"])
async def test_a_stop_string_aborts_the_run_that_brought_it(first):
    """A reader that has enough closes the sequence while its engine is still pushing: the run is cancelled, no lease stays, nothing more is read."""
    async with reading(stop=("!",)) as (manager, engine, read):

        def arrive():
            for letter in f"{first}!":
                engine.token(letter)
            engine.token("z")
            return "".join(read), engine.cancelled, manager._state.ledger.open

        assert await from_the_loop(arrive) == (first, True, 0)


async def test_what_is_opened_and_closed_within_a_readers_turn_leaves_nothing():
    """A reader may begin and give up another sequence while the core has not yet been told of its own: nothing fails, no lease stays."""

    def begin_and_give_up(manager):
        request = EngineRequest(request_id="other", prompt_token_ids=(1,), sampling=SamplingParams())
        view = RequestView(request_id="other", model="letters", prompt_tokens=1)
        manager._dispatcher.close(manager._dispatcher.open(0, request, view, Mailbox()))

    async with reading(heard=begin_and_give_up) as (manager, engine, read):

        def arrive():
            engine.token("a", finish="stop")
            return list(read), manager._state.ledger.open, manager._state.active

        assert await from_the_loop(arrive) == (["a"], 0, 0)
