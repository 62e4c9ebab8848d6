"""The core's view of prefix caches against what the engines really hold."""

import contextlib
import random
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from sagellm_control_plane.config import CoreConfig
from sagellm_control_plane.live.block_feed import BlockFeed, _joined
from sagellm_control_plane.live.dispatcher import Dispatcher
from sagellm_control_plane.live.registry import Engine
from sagellm_control_plane.prefix_index import PrefixIndex
from sagellm_control_plane.state import ControlState
from sagellm_control_plane.types import EngineInfo
from sagellm_core.build import build_engine
from sagellm_core.config import CacheOptions, EngineConfig, Limits, MockOptions
from sagellm_core.local import LocalEngine
from sagellm_protocol import EngineRequest, SamplingParams
from sagellm_protocol.errors import UnavailableError
from sagellm_protocol.prefix import BlockEvent


@contextlib.asynccontextmanager
async def cluster(engines: int = 2, **config: object):
    """A core with real mock engines that are READY, and the feed between them."""
    dispatcher = Dispatcher(ControlState(CoreConfig(), random.Random(1)))
    clients = []
    for k in range(engines):
        options = {"limits": Limits(n_ctx=256, parallel=2), "mock": MockOptions(scale=0), **config}
        client = LocalEngine(build_engine(EngineConfig(model="mock", engine_id=f"e{k}", **options)))
        engine = Engine(
            EngineInfo(engine_id=f"e{k}", model_id="mock"), client=client, description=await client.describe()
        )
        dispatcher.registry.add(engine)
        dispatcher.engine_ready(engine, client, fresh=True)
        clients.append(client)
    yield SimpleNamespace(dispatcher=dispatcher, clients=clients, feed=BlockFeed(dispatcher))
    for client in clients:
        await client.close()


async def compute(client: LocalEngine, first: int, tokens: int = 64) -> None:
    prompt = tuple((first + k) % 250 for k in range(tokens))
    request = EngineRequest(
        request_id=f"r{first}", prompt_token_ids=prompt, sampling=SamplingParams(seed=1, max_tokens=1, ignore_eos=True)
    )
    async for _ in client.stream(request):
        pass


def view(c, engine_id: str) -> set[bytes]:
    return set(c.dispatcher.state.view.prefix._blocks[engine_id])


async def truth(client: LocalEngine) -> set[bytes]:
    return set((await client.block_snapshot()).names)


async def test_view_equals_the_caches():
    """After each poll the core knows exactly the blocks that each engine holds, through eviction and clearing."""
    async with cluster(cache=CacheOptions(kv_bytes=64 * 20)) as c:
        for step in range(30):
            await compute(c.clients[step % 2], step * 7)
            if step == 7:
                await c.clients[0].clear_cache()
            await c.feed.poll()
            for k, client in enumerate(c.clients):
                assert view(c, f"e{k}") == await truth(client)
        assert (await c.clients[0].status()).evictions > 0


async def test_core_that_forgot_is_told_again():
    """When the core dropped an engine's blocks on a false alarm, the feed brings them back by a snapshot."""
    async with cluster() as c:
        await compute(c.clients[0], 0)
        await c.feed.poll()
        c.dispatcher.state.view.prefix.clear_engine("e0")
        await compute(c.clients[0], 100)
        for _ in range(2):  # the gap is noticed, then filled
            await c.feed.poll()
        assert view(c, "e0") == await truth(c.clients[0])


async def test_events_that_overran():
    """When more happened than an engine remembers, a snapshot fills the gap."""
    async with cluster() as c:
        await c.feed.poll()
        await compute(c.clients[0], 0)
        c.clients[0]._engine._kv._events.popleft()
        for _ in range(2):
            await c.feed.poll()
        assert view(c, "e0") == await truth(c.clients[0])


async def test_restarted_engine_is_met_afresh():
    """A new client under the same id means a new cache: what the old one held is forgotten."""
    async with cluster() as c:
        await compute(c.clients[0], 0)
        await c.feed.poll()
        assert view(c, "e0")
        c.dispatcher.registry.get("e0").client = c.clients[1]
        await c.feed.poll()
        assert view(c, "e0") == set()


async def test_single_engine_is_not_polled(monkeypatch):
    """Where there is no choice nothing is asked."""
    async with cluster(1) as c:

        async def never(_):
            raise AssertionError("polled")

        monkeypatch.setattr(c.clients[0], "block_events", never)
        monkeypatch.setattr(c.clients[0], "block_snapshot", never)
        await c.feed.poll()


async def test_engine_that_does_not_answer(monkeypatch):
    """An engine that cannot be asked does not stop the others from being told."""
    async with cluster() as c:

        async def broken(*_):
            raise UnavailableError("gone")

        monkeypatch.setattr(c.clients[0], "block_snapshot", broken)
        await compute(c.clients[1], 5)
        await c.feed.poll()
        assert view(c, "e1") == await truth(c.clients[1])


async def test_task_starts_and_stops():
    """The task polls by itself until it is stopped; both are idempotent."""
    async with cluster() as c:
        feed = BlockFeed(c.dispatcher, interval_s=0.001)
        feed.start()
        feed.start()
        await compute(c.clients[0], 9)
        for _ in range(500):
            if view(c, "e0") == await truth(c.clients[0]):
                break
        assert view(c, "e0") == await truth(c.clients[0])
        await feed.stop()
        await feed.stop()


names = st.sampled_from([bytes([k]) for k in range(6)])


@given(st.lists(st.tuples(st.sampled_from(["stored", "removed", "cleared"]), names), max_size=30), st.integers(1, 30))
def test_joined_events_come_to_the_same(changes, size):
    """Events told several at a time leave the index as those told one by one."""
    events = [
        BlockEvent(seq=k + 1, kind=kind, block_hash=b"" if kind == "cleared" else name)
        for k, (kind, name) in enumerate(changes)
    ]
    single, joined = PrefixIndex(), PrefixIndex()
    for index in (single, joined):
        index.set_capacity("e", 100)
    for event in events:
        one = _joined("e", event.seq, [event])
        assert single.apply("e", one.sequence, one.stored, one.removed, cleared=one.cleared)
    for number, start in enumerate(range(0, len(events), size), 1):
        some = _joined("e", number, events[start : start + size])
        assert joined.apply("e", some.sequence, some.stored, some.removed, cleared=some.cleared)
    assert set(single._blocks["e"]) == set(joined._blocks["e"])
