"""No stream is lost: real engine processes over the simulated device, killed, frozen, overloaded and aborted by a seeded script."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import signal
import sys
import time
from contextlib import aclosing, asynccontextmanager

import msgspec
import pytest

from sagellm_control_plane.config import CoreConfig, HealthConfig, RetryConfig
from sagellm_control_plane.decision_log import replay
from sagellm_control_plane.live.lifecycle import EngineSpec, RestartPolicy
from sagellm_control_plane.live.process_driver import ProcessDriver, ProcessOptions
from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_control_plane.types import EngineState
from sagellm_core.config import DeviceOptions, EngineConfig, Limits, MockOptions
from sagellm_core.text import load_chat_model
from sagellm_core.text.bytes_model import ByteChatModel
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import SageError
from sagellm_protocol.generation import ChoiceDelta, GenerationEnd, GenerationRequest
from sagellm_protocol.sampling import GrammarSpec, SamplingParams

ENGINES = 4
GRAMMAR = True
HEALTH = HealthConfig(interval_s=0.1, timeout_s=0.4, failures=2, hung_s=2.0, stall_s=1.5)
RESTART = RestartPolicy(first_delay_s=0.05, max_delay_s=0.2, max_attempts=100, stable_s=1.0)


class Catalog:
    def models(self):
        return ["mock"]

    def engine_spec(self, model_id, engine_id, options):
        config = EngineConfig(
            model="mock",
            engine_id=engine_id,
            limits=Limits(parallel=16, n_ctx=1024, max_waiting=64),
            mock=MockOptions(base_ms=4.0, prefill_us=20.0, sequence_us=50.0),
        )
        return EngineSpec(engine_id=engine_id, model_id=model_id, config=msgspec.to_builtins(config))

    def chat_model(self, model_id):
        return ByteChatModel(model_id, 1024)


def argv(spec, socket):
    config = msgspec.json.encode(spec.config).decode()
    return [sys.executable, "-m", "sagellm_core.server", "--config", config, "--socket", socket, "--heartbeat", "0.2"]


@asynccontextmanager
async def house(tmp_path, log, engines=ENGINES, catalog=None, health=HEALTH):
    driver = ProcessDriver(argv, ProcessOptions(run_dir=tmp_path / "r", log_dir=tmp_path / "l"))
    config = CoreConfig(health=health, retry=RetryConfig(budget_min=10_000.0))
    manager = ControlPlaneManager(
        config=config, driver=driver, catalog=catalog or Catalog(), seed=5, restart_policy=RESTART, decision_log=log
    )
    await manager.start()
    try:
        await asyncio.gather(*(manager.request_engine_startup("mock", f"e{i}") for i in range(engines)))
        yield manager
    finally:
        await manager.stop()


def requests(count: int, seed: int) -> list[GenerationRequest]:
    """Greedy and seeded, some with a grammar; lengths from a few tokens to more than a hundred."""
    rng = random.Random(seed)
    out = []
    for i in range(count):
        grammar = GrammarSpec(kind="regex", source="[a-z]{20,60}") if GRAMMAR and i % 10 == 9 else None
        sampling = SamplingParams(
            temperature=0.0 if i % 3 == 0 else 0.9,
            seed=rng.randrange(1 << 30),
            max_tokens=rng.randrange(8, 120),
            grammar=grammar,
        )
        words = " ".join(rng.choice(["river", "stone", "light", "engine"]) for _ in range(rng.randrange(2, 40)))
        out.append(GenerationRequest(request_id=f"c{i}", model="mock", prompt=f"{i} {words}", sampling=sampling))
    return out


async def run_one(manager, request, results):
    text, tokens, finish, end = "", [], None, None
    try:
        async with aclosing(manager.generate(request)) as events:
            async for event in events:
                if isinstance(event, ChoiceDelta):
                    text += event.text
                    tokens += event.token_ids
                    finish = event.finish_reason or finish
                elif isinstance(event, GenerationEnd):
                    end = event
        results[request.request_id] = (text, tuple(tokens), finish, end.usage.completion_tokens)
    except SageError as error:
        results[request.request_id] = error


async def run_all(manager, wanted, at_once):
    results = {}
    queue = asyncio.Queue()
    for request in wanted:
        queue.put_nowait(request)

    async def worker():
        while not queue.empty():
            await run_one(manager, queue.get_nowait(), results)

    await asyncio.gather(*(worker() for _ in range(at_once)))
    return results


async def crowd(client, log):
    """Fill an engine as another gateway would, for half a second: what we send it meanwhile is refused for want of room."""

    async def occupy(number):
        sampling = SamplingParams(max_tokens=1000, ignore_eos=True, seed=number)
        request = EngineRequest(request_id=f"crowd{len(log)}-{number}", prompt_token_ids=(65,) * 4, sampling=sampling)
        with contextlib.suppress(SageError):
            async with aclosing(client.stream(request)) as deltas:
                async for _ in deltas:
                    pass

    tasks = [asyncio.create_task(occupy(number)) for number in range(120)]
    await asyncio.sleep(0.5)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def torment(manager, rng, log):
    """Hurt one engine after another, never the last healthy one."""
    while True:
        await asyncio.sleep(rng.uniform(0.1, 0.4))
        ready = manager.list_engines(EngineState.READY)
        if len(ready) < 2:
            continue
        victim = ready[rng.randrange(len(ready))]
        kind = rng.choice(["kill", "freeze", "abort", "blip", "crowd"])
        log.append(kind)
        if kind == "kill":
            os.kill(victim.pid, signal.SIGKILL)
        elif kind == "freeze":
            # Alive, the socket open, no answer: half-open as seen from here.
            os.kill(victim.pid, signal.SIGSTOP)
            await asyncio.sleep(rng.uniform(0.5, 1.2))
            try:
                os.kill(victim.pid, signal.SIGCONT)
            except ProcessLookupError:
                log.append("gone")
        elif kind == "abort":
            engine = manager._dispatcher.registry.get(victim.engine_id)
            for sequence in list(manager._dispatcher._sequences.values())[:4]:
                if sequence.attempts_on(victim.engine_id):
                    numbers = sequence.attempts_on(victim.engine_id)
                    name = sequence.request_id if numbers[0] == 1 else f"{sequence.request_id}#{numbers[0]}"
                    try:
                        await asyncio.wait_for(engine.client.abort(name), 1.0)
                    except (SageError, asyncio.TimeoutError):
                        log.append("abort failed")
        elif kind == "crowd":
            await crowd(manager._dispatcher.registry.get(victim.engine_id).client, log)
        else:
            os.kill(victim.pid, signal.SIGSTOP)
            await asyncio.sleep(0.1)
            os.kill(victim.pid, signal.SIGCONT)


async def chaos(tmp_path, count, at_once, seed):
    """Compare `count` streams under torment with the same ones undisturbed; return what was done to the engines."""
    wanted = requests(count, seed)
    decisions = io.BytesIO()
    async with house(tmp_path, decisions) as manager:
        expected = await run_all(manager, wanted, at_once)
        assert not [r for r in expected.values() if isinstance(r, SageError)]
        log = []
        began = time.monotonic()
        tormentor = asyncio.create_task(torment(manager, random.Random(seed), log))
        rounds = [await run_all(manager, wanted, at_once)]
        while not manager.get_scheduling_metrics().migrations:  # a quick machine is through before anybody was hurt
            rounds.append(await run_all(manager, wanted, at_once))
        tormentor.cancel()
        seconds = time.monotonic() - began
        metrics = manager.get_scheduling_metrics()
        results = [(k, r) for part in rounds for k, r in part.items()]
        lost = [(k, r) for k, r in results if isinstance(r, SageError)]
        wrong = [(k, expected[k], r) for k, r in results if not isinstance(r, SageError) and r != expected[k]]
        print(  # noqa: T201 - what the chaos did, shown with -s
            f"{len(results)} streams in {seconds:.1f} s, faults {[(k, log.count(k)) for k in sorted(set(log))]}, "
            f"retries {metrics.retries} {metrics.reasons.get('retries')}, migrations {metrics.migrations}, lost {len(lost)}, wrong {len(wrong)}"
        )
        assert lost == []
        assert wrong == []
        assert len(results) == count * len(rounds)
        assert metrics.migrations > 0
        state = manager._state
        assert (state.active, state.ledger.open) == (0, 0)
    assert replay(decisions.getvalue().splitlines(), random.Random) == []
    return set(log)


async def test_no_stream_is_lost_when_engines_are_killed_frozen_and_aborted(tmp_path):
    """While one healthy engine remains no client sees an error or a wrong token, and the log of decisions replays."""
    await chaos(tmp_path, count=240, at_once=32, seed=3)


class RealCatalog:
    def __init__(self, path):
        self.path = path

    def models(self):
        return ["mock"]

    def engine_spec(self, model_id, engine_id, options):
        config = EngineConfig(
            model=str(self.path),
            model_id=model_id,
            engine_id=engine_id,
            limits=Limits(parallel=8, n_ctx=512),
            device=DeviceOptions(threads=1),
        )
        return EngineSpec(engine_id=engine_id, model_id=model_id, config=msgspec.to_builtins(config))

    def chat_model(self, model_id):
        return load_chat_model(self.path, model_id, 512)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(300)
async def test_a_real_model_continues_token_for_token(tmp_path, default_model_path):
    """With a real model on two engine processes, streams of a killed engine go on with the very same tokens."""
    wanted = requests(12, seed=7)
    # A real model may take seconds for a step on a busy machine: that is slow, not hung.
    patient = HealthConfig(interval_s=0.2, timeout_s=5.0, failures=3, hung_s=30.0, stall_s=30.0)
    catalog = RealCatalog(default_model_path)
    async with house(tmp_path, io.BytesIO(), engines=2, catalog=catalog, health=patient) as manager:
        expected = await run_all(manager, wanted, 6)
        task = asyncio.create_task(run_all(manager, wanted, 6))
        for _ in range(2):
            while not task.done():
                ready = manager.list_engines(EngineState.READY)
                busy = max(ready, key=lambda e: e.active_requests)
                if len(ready) == 2 and busy.active_requests >= 2:
                    break
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)
            if not task.done():
                os.kill(busy.pid, signal.SIGKILL)
                await asyncio.sleep(0.5)
        assert await task == expected
        assert manager.get_scheduling_metrics().migrations > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_two_thousand_streams_survive_chaos(tmp_path):
    """The same over 2,000 streams, with every kind of fault among them."""
    assert await chaos(tmp_path, count=2000, at_once=48, seed=11) >= {"kill", "freeze", "abort", "blip", "crowd"}
