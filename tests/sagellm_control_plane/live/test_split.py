"""Prefill on one engine, decode on another, over real engines with the simulated device."""

import contextlib

import msgspec
import pytest

from sagellm_control_plane.live.split import SplitStats, split_stream
from sagellm_core import handover
from sagellm_core.build import build_engine
from sagellm_core.config import EngineConfig, Limits, MockOptions
from sagellm_core.local import LocalEngine
from sagellm_protocol import EngineRequest, SamplingParams
from sagellm_protocol.deltas import join_deltas
from sagellm_protocol.errors import KVTransferError, ResourceExhaustedError, SageError

REQUEST = EngineRequest(
    request_id="r",
    prompt_token_ids=tuple((k * 5) % 250 for k in range(75)),
    sampling=SamplingParams(seed=11, max_tokens=20, logprobs=1, ignore_eos=True),
)


@contextlib.asynccontextmanager
async def pair(tmp_path, monkeypatch):
    """An engine for prefill, one for decode, and an undisturbed one to compare with."""
    monkeypatch.setattr(handover.Handover.__init__, "__defaults__", (lambda: tmp_path,))
    config = EngineConfig(model="mock", mock=MockOptions(scale=0), limits=Limits(n_ctx=256, parallel=4))
    engines = [LocalEngine(build_engine(config)) for _ in range(3)]
    yield engines
    for engine in engines:
        await engine.check_integrity()
        assert (await engine.status()).blocks_used == 0
        await engine.close()
    assert list(tmp_path.iterdir()) == []


async def whole(stream):
    return join_deltas([delta async for delta in stream])


def same(one, other) -> bool:
    fields = ("token_ids", "logprobs", "finish_reason", "prompt_tokens")
    return all(getattr(one, f) == getattr(other, f) for f in fields)


async def test_split_gives_what_one_engine_gives(tmp_path, monkeypatch):
    """Tokens, log-probabilities and the end are those of the unsplit run, and the second engine computes almost no prompt."""
    async with pair(tmp_path, monkeypatch) as (prefill, decode, alone):
        stats = SplitStats()
        split = await whole(split_stream(prefill, decode, REQUEST, stats))
        assert same(split, await whole(alone.stream(REQUEST)))
        assert (stats.transfers, stats.blocks, stats.fallbacks) == (1, 4, 0)
        assert stats.bytes == 4 * (await decode.describe()).block_bytes
        assert (await decode.status()).prefix_hits == 64
        assert (await prefill.status()).generation_tokens == 1


async def test_first_token_comes_before_the_hand_over(tmp_path, monkeypatch):
    """The reader has the first token before a block is moved."""
    async with pair(tmp_path, monkeypatch) as (prefill, decode, _):
        stream = split_stream(prefill, decode, REQUEST, stats := SplitStats())
        first = await anext(stream)
        assert len(first.token_ids) == 1
        assert first.finish_reason is None
        assert stats.transfers == 0
        await stream.aclose()


@pytest.mark.parametrize("changes", [{"max_tokens": 1}, {"min_tokens": 15}, {"prompt_logprobs": 0}, {"max_tokens": 2}])
async def test_limits_are_kept(tmp_path, monkeypatch, changes):
    """max_tokens, min_tokens and prompt_logprobs mean what they mean on one engine."""
    request = msgspec.structs.replace(REQUEST, sampling=msgspec.structs.replace(REQUEST.sampling, **changes))
    async with pair(tmp_path, monkeypatch) as (prefill, decode, alone):
        split = await whole(split_stream(prefill, decode, request, SplitStats()))
        expected = await whole(alone.stream(request))
        assert same(split, expected)
        assert split.prompt_logprobs == expected.prompt_logprobs


async def test_continuation_can_be_split_too(tmp_path, monkeypatch):
    """A sequence that an earlier engine began goes on split with the same tokens."""
    async with pair(tmp_path, monkeypatch) as (prefill, decode, alone):
        expected = (await whole(alone.stream(REQUEST))).token_ids
        rest = msgspec.structs.replace(REQUEST, emitted_token_ids=expected[:7])
        split = await whole(split_stream(prefill, decode, rest, SplitStats()))
        assert expected[:7] + split.token_ids == expected


async def test_failed_hand_over_falls_back(tmp_path, monkeypatch):
    """When the blocks do not arrive the second engine computes the prompt, and the reader sees no difference."""
    async with pair(tmp_path, monkeypatch) as (prefill, decode, alone):

        async def broken(ticket):
            raise KVTransferError("block 2 is damaged: its checksum differs")

        monkeypatch.setattr(decode, "import_kv", broken)
        stats = SplitStats()
        split = await whole(split_stream(prefill, decode, REQUEST, stats))
        assert same(split, await whole(alone.stream(REQUEST)))
        assert (stats.transfers, stats.fallbacks) == (0, 1)


async def test_failed_prefill_falls_back(tmp_path, monkeypatch):
    """When the first engine refuses or dies before the first token, the second does everything."""
    async with pair(tmp_path, monkeypatch) as (prefill, decode, alone):
        expected = await whole(alone.stream(REQUEST))

        async def refusing(request):
            raise ResourceExhaustedError("the queue is full")
            yield

        monkeypatch.setattr(prefill, "stream", refusing)
        stats = SplitStats()
        assert same(await whole(split_stream(prefill, decode, REQUEST, stats)), expected)
        assert stats.fallbacks == 1


async def test_bad_request_is_an_error(tmp_path, monkeypatch):
    """A request that no engine takes fails as it does unsplit."""
    bad = msgspec.structs.replace(REQUEST, prompt_token_ids=(10**6,))
    async with pair(tmp_path, monkeypatch) as (prefill, decode, _):
        try:
            delta = await whole(split_stream(prefill, decode, bad, SplitStats()))
        except SageError:
            return
        assert delta.error is not None


async def test_closing_aborts(tmp_path, monkeypatch):
    """Closing the stream while the second engine draws frees its blocks."""
    async with pair(tmp_path, monkeypatch) as (prefill, decode, _):
        stream = split_stream(prefill, decode, REQUEST, SplitStats())
        await anext(stream)
        await anext(stream)
        await stream.aclose()
        await decode.check_integrity()
