from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

import pytest

from sagellm_control_plane.config import CoreConfig, HealthConfig, HedgeConfig, LatencyPrior, RetryConfig
from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_control_plane.testing import LetterChatModel, ScriptedEngine, expected_tokens
from sagellm_control_plane.types import EngineState, RequestStatus
from sagellm_protocol.errors import (
    CancelledRequestError,
    EngineDiedError,
    InvalidArgumentError,
    ModelNotFoundError,
    SageError,
    UnavailableError,
)
from sagellm_protocol.generation import ChoiceDelta, GenerationEnd, GenerationRequest, GenerationStart
from sagellm_protocol.sampling import SamplingParams
from sagellm_protocol.types import Request

QUICK = CoreConfig(
    health=HealthConfig(interval_s=0.02, timeout_s=0.5, failures=2, hung_s=0.3, stall_s=0.2),
    retry=RetryConfig(retry_wait_s=0.2, recovery_wait_s=2.0),
)


def ask(request_id: str = "r", prompt: str = "hello", max_tokens: int = 8, **more) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, seed=7, stop=more.pop("stop", ()))
    return GenerationRequest(request_id=request_id, model="letters", prompt=prompt, sampling=sampling, **more)


async def manager_with(*engines: ScriptedEngine, config: CoreConfig = QUICK, **options) -> ControlPlaneManager:
    manager = ControlPlaneManager(config=config, seed=1, **options)
    await manager.start()
    for engine in engines:
        await manager.add_engine(engine, LetterChatModel())
    return manager


async def collect(manager: ControlPlaneManager, request: GenerationRequest) -> dict[int, str]:
    texts: dict[int, str] = {}
    async with aclosing(manager.generate(request)) as events:
        async for event in events:
            if isinstance(event, ChoiceDelta):
                texts[event.index] = texts.get(event.index, "") + event.text
    return texts


def undisturbed(request: GenerationRequest) -> dict[int, str]:
    prepared = LetterChatModel().prepare(request)
    return {i: "".join(map(chr, expected_tokens(r))) for i, r in enumerate(prepared.engine_requests)}


async def until(holds) -> None:
    while not holds():  # noqa: ASYNC110 - the fakes signal nothing; pytest's timeout bounds the wait
        await asyncio.sleep(0.001)


def assert_idle(manager: ControlPlaneManager) -> None:
    state = manager._state
    assert state.active == 0
    assert state.ledger.open == 0
    for engine in state.view.engines.values():
        counters = (engine.running, engine.decoding, engine.prefill_tokens, engine.context_tokens, engine.suspects)
        assert counters == (0, 0, 0, 0, 0)


async def test_one_request_gives_start_deltas_and_a_measured_end():
    """A request yields one start, its text, and an end with usage and times."""
    manager = await manager_with(ScriptedEngine("a"))
    events = [event async for event in manager.generate(ask())]
    await manager.stop()
    assert isinstance(events[0], GenerationStart)
    assert (events[0].engine_id, events[0].prompt_tokens) == ("a", 5)
    end = events[-1]
    assert isinstance(end, GenerationEnd)
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (5, 8)
    assert end.ttft_s is not None
    assert 0.0 < end.ttft_s <= end.duration_s
    assert "".join(e.text for e in events[1:-1]) == undisturbed(ask())[0]
    assert_idle(manager)


async def test_choices_run_at_once_and_keep_their_indices():
    """With n choices each index gets its own text, and usage counts all of them."""
    engine = ScriptedEngine("a", token_s=0.001)
    manager = await manager_with(engine)
    request = ask(n=3)
    assert await collect(manager, request) == undisturbed(request)
    assert [r.request_id for r in engine.received] == ["r/0", "r/1", "r/2"]
    await manager.stop()
    assert_idle(manager)


async def test_a_stop_string_ends_the_text_and_aborts_the_engine():
    """When a stop string matches, the stream ends before it and the engine's sequence is aborted."""
    engine = ScriptedEngine("a", token_s=0.002)
    manager = await manager_with(engine)
    whole = undisturbed(ask(max_tokens=200))[0]
    stop = whole[10:13]
    events = [e async for e in manager.generate(ask(max_tokens=200, stop=(stop,)))]
    deltas = [e for e in events if isinstance(e, ChoiceDelta)]
    assert "".join(d.text for d in deltas) == whole[: whole.index(stop)]
    assert (deltas[-1].finish_reason, deltas[-1].stop_match) == ("stop", stop)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not engine.running
    await manager.stop()
    assert_idle(manager)


async def test_closing_the_generator_aborts_every_choice():
    """A reader that goes away frees the engine's sequences and all leases."""
    engine = ScriptedEngine("a", token_s=0.005)
    manager = await manager_with(engine)
    async with aclosing(manager.generate(ask(n=2, max_tokens=500))) as events:
        async for event in events:
            if isinstance(event, ChoiceDelta):
                break
    for _ in range(20):
        await asyncio.sleep(0)
    assert not engine.running
    assert_idle(manager)
    await manager.stop()


async def test_load_spreads_over_engines_by_leases():
    """Sixteen equal requests at once go to two equal engines in halves."""
    engines = [ScriptedEngine("a", token_s=0.01), ScriptedEngine("b", token_s=0.01)]
    manager = await manager_with(*engines, routing_strategy="least_loaded")
    await asyncio.gather(*(collect(manager, ask(f"r{i}", prompt=f"p{i}")) for i in range(16)))
    assert [len(engine.received) for engine in engines] == [8, 8]
    await manager.stop()
    assert_idle(manager)


@pytest.mark.parametrize("died_after", [0, 1, 5])
async def test_a_stream_continues_on_another_engine_token_for_token(died_after):
    """When an engine dies the reader gets the undisturbed text: nothing repeated, nothing missing, no error."""
    dying = ScriptedEngine("a", die_after=died_after)
    sound = ScriptedEngine("b")
    manager = await manager_with(dying)
    request = ask(max_tokens=20)
    async with aclosing(manager.generate(request)) as events:
        text = ""
        async for event in events:
            if isinstance(event, GenerationStart):
                await manager.add_engine(sound, LetterChatModel())
            if isinstance(event, ChoiceDelta):
                text += event.text
    assert text == undisturbed(request)[0]
    assert len(sound.received[0].emitted_token_ids) == died_after
    await manager.stop()
    assert_idle(manager)


async def test_without_another_engine_a_request_without_tokens_fails_with_503():
    """When the only engine dies before the first token, the request fails as unavailable and the next one at once."""
    engine = ScriptedEngine("a", die_after=0)
    manager = await manager_with(engine)
    with pytest.raises(EngineDiedError):
        await collect(manager, ask("r1"))
    with pytest.raises(UnavailableError):
        await collect(manager, ask("r2"))
    assert manager.get_engine_info("a").state is EngineState.ERROR
    engine.dead, engine.die_after = False, None
    await until(lambda: manager.get_engine_info("a").state is EngineState.READY)
    assert await collect(manager, ask("r3")) == undisturbed(ask("r3"))
    await manager.stop()
    assert_idle(manager)


async def test_a_refusal_is_retried_elsewhere():
    """A 503 of one engine is not the client's: another engine serves."""
    full, free = ScriptedEngine("a", refuse=True), ScriptedEngine("b")
    manager = await manager_with(full, free, routing_strategy="round_robin")
    for i in range(4):
        assert await collect(manager, ask(f"r{i}")) == undisturbed(ask())
    assert not full.received
    await manager.stop()
    assert_idle(manager)


async def test_a_hedge_wins_when_the_first_engine_is_slow():
    """Within its budget a second attempt starts after the predicted time; the first token wins, the other is aborted."""
    config = CoreConfig(
        health=QUICK.health,
        hedge=HedgeConfig(enabled=True, budget_ratio=1.0, min_delay_s=0.02),
        prior=LatencyPrior(step_s=0.001),
    )
    slow, quick = ScriptedEngine("a", token_s=0.3), ScriptedEngine("b")
    manager = await manager_with(slow, quick, config=config, routing_strategy="round_robin")
    request = ask(max_tokens=6)
    events = [e async for e in manager.generate(request)]
    assert "".join(e.text for e in events if isinstance(e, ChoiceDelta)) == undisturbed(request)[0]
    assert events[0].engine_id in ("a", "b")
    assert manager.get_scheduling_metrics().hedges == 1
    await until(lambda: not slow.running)
    assert slow.aborted == ["r"]
    await manager.stop()
    assert_idle(manager)


async def test_a_silent_stream_is_moved():
    """A stream that falls silent on an engine that still answers goes on elsewhere."""
    silent, sound = ScriptedEngine("a", stall_after=3), ScriptedEngine("b")
    manager = await manager_with(silent)
    request = ask(max_tokens=12)
    task = asyncio.create_task(collect(manager, request))
    await until(lambda: silent.received)
    await manager.add_engine(sound, LetterChatModel())
    assert await task == undisturbed(request)
    assert len(sound.received[0].emitted_token_ids) == 3
    await manager.stop()
    assert_idle(manager)


async def test_a_request_that_kills_engines_is_failed_and_not_spread():
    """The poison guard stops after two engines; the third is never reached."""
    poison = tuple(map(ord, "boom"))
    engines = [ScriptedEngine(name, kills={poison}) for name in "abc"]
    manager = await manager_with(*engines)
    with pytest.raises(EngineDiedError) as caught:
        await collect(manager, ask(prompt="boom"))
    assert "2 engines" in caught.value.message
    assert sum(engine.deaths for engine in engines) == 2
    assert await collect(manager, ask("ok")) == undisturbed(ask())
    await manager.stop()
    assert_idle(manager)


async def test_an_unregistered_engine_loses_nothing():
    """Unregistering moves what runs on the engine, closes its client and makes its id free again."""
    slow, other = ScriptedEngine("a", token_s=0.01), ScriptedEngine("b")
    manager = await manager_with(slow)
    request = ask("long", max_tokens=60)
    task = asyncio.create_task(collect(manager, request))
    await until(lambda: slow.steps > 3)
    await manager.add_engine(other, LetterChatModel())
    assert manager.unregister_engine("a").state is EngineState.STOPPED
    assert await task == undisturbed(request)
    await until(lambda: slow.closed)
    with pytest.raises(InvalidArgumentError, match="unknown"):
        manager.unregister_engine("a")
    await manager.add_engine(ScriptedEngine("a"), LetterChatModel())
    await manager.stop()
    assert_idle(manager)


def test_engines_by_address_come_and_go_without_an_event_loop():
    """Registering and unregistering by address needs no running loop."""
    manager = ControlPlaneManager()
    assert manager.register_engine("far", "m", "127.0.0.1", 9).state is EngineState.STARTING
    assert manager.unregister_engine("far").state is EngineState.STOPPED
    assert manager.list_registered_engines() == []


async def test_draining_sends_nothing_new_and_moves_what_is_late():
    """A drained engine finishes what it has; what is late at the end of the grace time goes on elsewhere."""
    slow, other = ScriptedEngine("a", token_s=0.01), ScriptedEngine("b")
    manager = await manager_with(slow)
    request = ask("long", max_tokens=300)
    task = asyncio.create_task(collect(manager, request))
    await until(lambda: slow.received)
    await manager.add_engine(other, LetterChatModel())
    stopping = asyncio.create_task(manager.stop_engine_gracefully("a", timeout_s=0.1))
    await asyncio.sleep(0)
    assert manager.get_engine_info("a").state is EngineState.DRAINING
    assert await collect(manager, ask("new")) == undisturbed(ask())
    assert len(slow.received) == 1
    assert await task == undisturbed(request)
    await stopping
    assert slow.closed
    assert manager.prune_stopped_engines() == ["a"]
    await manager.stop()
    assert_idle(manager)


async def test_v01_requests_run_stream_and_are_found_by_id():
    """Protocol v0.1: execute, stream, submit, status, result."""
    manager = await manager_with(ScriptedEngine("a"))
    request = Request(request_id="x", trace_id="t", model="letters", prompt="hello", max_tokens=6)
    response = await manager.execute_request(request)
    assert (response.finish_reason, len(response.output_tokens), response.prompt_tokens) == ("length", 6, 5)
    assert response.metrics is not None
    assert response.metrics.ttft_ms > 0.0
    events = [e async for e in manager.stream_request(request)]
    assert [events[0].event, events[-1].event] == ["start", "end"]
    assert "".join(e.content for e in events[1:-1]) == response.output_text == events[-1].content
    again = Request(request_id="y", trace_id="t", model="letters", prompt="hello", max_tokens=6)
    assert await manager.submit_request(again) == "y"
    assert (await manager.get_request_result("y", 5.0)).output_text == response.output_text
    assert manager.get_request_status("y") is RequestStatus.COMPLETED
    await manager.stop()


async def test_cancel_reaches_running_and_queued_requests():
    """Cancelling works while a request runs and while it waits for a slot."""
    engine = ScriptedEngine("a", token_s=0.01, slots=1)
    manager = await manager_with(engine)
    tasks = [asyncio.create_task(collect(manager, ask(f"r{i}", max_tokens=400))) for i in range(5)]
    await until(lambda: len(engine.running) == 3)
    assert manager.get_request_status("r4") is RequestStatus.QUEUED
    assert manager.get_request_status("r0") is RequestStatus.RUNNING
    assert all(manager.cancel_request(f"r{i}") for i in range(5))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(r, CancelledRequestError) for r in results)
    assert not manager.cancel_request("r0")
    await manager.stop()
    assert_idle(manager)


async def test_registry_refuses_what_is_wrong():
    """Duplicate ids, unknown engines, models, policies and modes are errors that name the fault."""
    manager = await manager_with(ScriptedEngine("a"))
    with pytest.raises(InvalidArgumentError, match="registered already"):
        await manager.add_engine(ScriptedEngine("a"), LetterChatModel())
    with pytest.raises(InvalidArgumentError, match="unknown"):
        manager.get_engine_info("zzz")
    with pytest.raises(ModelNotFoundError):
        await collect(manager, GenerationRequest(request_id="r", model="nope", prompt="x"))
    with pytest.raises(InvalidArgumentError, match="fifo"):
        manager.update_policy("fancy")
    with pytest.raises(InvalidArgumentError, match="round_robin"):
        manager.update_routing("fancy")
    with pytest.raises(InvalidArgumentError, match="fancy"):
        ControlPlaneManager(scheduling_policy="fancy")
    with pytest.raises(InvalidArgumentError, match="mode"):
        ControlPlaneManager(mode="remote")  # type: ignore[arg-type]
    manager.update_routing("round_robin")
    assert manager.get_scheduling_metrics().routing_strategy == "round_robin"
    await manager.stop()
    with pytest.raises(SageError):
        await collect(manager, ask())


async def test_two_requests_of_one_id_do_not_mix():
    """A second request with the id of a running one is refused."""
    manager = await manager_with(ScriptedEngine("a", token_s=0.01))
    task = asyncio.create_task(collect(manager, ask("same", max_tokens=20)))
    await asyncio.sleep(0.02)
    with pytest.raises(InvalidArgumentError, match="in use"):
        await collect(manager, ask("same"))
    assert await task == undisturbed(ask(max_tokens=20))
    await manager.stop()


async def test_the_event_loop_goes_on_while_a_long_text_is_tokenised(monkeypatch):
    """A long prompt is prepared on a thread, which here ends only when the loop has done something else; a short one at once."""
    loop_went_on = threading.Event()
    where: dict[str, int] = {}
    original = LetterChatModel.prepare

    def slow(model, request):
        where[request.request_id] = threading.get_ident()
        assert request.request_id == "short" or loop_went_on.wait(60.0)
        return original(model, request)

    monkeypatch.setattr(LetterChatModel, "prepare", slow)
    manager = await manager_with(ScriptedEngine("a"))
    long = asyncio.create_task(collect(manager, ask("long", "x" * 10_000)))
    assert await collect(manager, ask("short")) == undisturbed(ask("short"))
    loop_went_on.set()
    assert len((await long)[0]) == 8
    await manager.stop()
    assert where["short"] == threading.get_ident() != where["long"]
