"""KV blocks from one engine to another."""

import contextlib
import os
import subprocess
import sys

import msgspec
import pytest

from sagellm_core import handover as handover_module
from sagellm_core.build import build_engine
from sagellm_core.config import CacheOptions, EngineConfig, Limits, MockOptions
from sagellm_core.handover import Handover, shared_directory
from sagellm_core.local import LocalEngine
from sagellm_protocol import EngineRequest, SamplingParams
from sagellm_protocol.errors import InvalidArgumentError, KVTransferError
from sagellm_protocol.handover import KVExportRequest, KVTicket
from sagellm_protocol.ports import KVTransferClient

PROMPT = tuple((k * 7) % 250 for k in range(100))


@contextlib.asynccontextmanager
async def engines(tmp_path, monkeypatch, **second):
    """Two engines with a directory of their own between them."""
    directory = tmp_path / "kv"
    directory.mkdir(exist_ok=True)
    monkeypatch.setattr(handover_module, "shared_directory", lambda: directory)
    monkeypatch.setattr(Handover.__init__, "__defaults__", (lambda: directory,))
    one, other = (LocalEngine(build_engine(config(**options))) for options in ({}, second))
    yield one, other, directory
    await one.close()
    await other.close()
    assert list(directory.iterdir()) == []


def config(**options: object) -> EngineConfig:
    fields = {"model": "mock", "mock": MockOptions(scale=0), "limits": Limits(n_ctx=512, parallel=4)}
    return EngineConfig(**{**fields, **options})


async def generate(engine: LocalEngine, prompt=PROMPT, **fields: object) -> tuple[list[int], int]:
    """Token ids, and how many of the prompt's tokens were cached."""
    sampling = SamplingParams(seed=1, max_tokens=8, temperature=1.0, ignore_eos=True)
    request = EngineRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling, **fields)
    deltas = [delta async for delta in engine.stream(request)]
    return [t for d in deltas for t in d.token_ids], max(d.cached_tokens for d in deltas)


async def test_second_engine_goes_on_where_the_first_was(tmp_path, monkeypatch):
    """After a hand-over the second engine finds the prompt cached and draws the very tokens that the first drew."""
    async with engines(tmp_path, monkeypatch) as (one, other, _):
        assert isinstance(one, KVTransferClient)
        expected, cached = await generate(one)
        assert cached == 0
        ticket = await one.export_kv(KVExportRequest(token_ids=PROMPT))
        assert len(ticket.token_ids) == 96
        imported = await other.import_kv(ticket)
        assert (imported.stored, imported.present) == (6, 0)
        assert await generate(other) == (expected, 96)
        await other.check_integrity()
        again = await other.import_kv(await one.export_kv(KVExportRequest(token_ids=PROMPT)))
        assert (again.stored, again.present) == (0, 6)


async def test_chunks(tmp_path, monkeypatch):
    """Blocks that go in many small pieces arrive as in one."""
    monkeypatch.setattr(handover_module, "_CHUNK_BYTES", 1)
    async with engines(tmp_path, monkeypatch) as (one, other, _):
        expected, _ = await generate(one)
        await other.import_kv(await one.export_kv(KVExportRequest(token_ids=PROMPT)))
        assert await generate(other) == (expected, 96)


async def test_tenants_stay_apart(tmp_path, monkeypatch):
    """Blocks of one tenant's salt are not found by another's, before and after a hand-over."""
    async with engines(tmp_path, monkeypatch) as (one, other, _):
        await generate(one, cache_salt="a")
        with pytest.raises(KVTransferError, match="no full block"):
            await one.export_kv(KVExportRequest(token_ids=PROMPT, cache_salt="b"))
        await other.import_kv(await one.export_kv(KVExportRequest(token_ids=PROMPT, cache_salt="a")))
        assert (await generate(other, cache_salt="b"))[1] == 0
        assert (await generate(other, cache_salt="a"))[1] == 96


async def test_damaged_block(tmp_path, monkeypatch):
    """One flipped bit is seen by the checksum: the hand-over fails, the damaged block is not taken, and a prefill does the work."""
    async with engines(tmp_path, monkeypatch) as (one, other, directory):
        expected, _ = await generate(one)
        ticket = await one.export_kv(KVExportRequest(token_ids=PROMPT))
        raw = bytearray((directory / ticket.name).read_bytes())
        raw[-1] ^= 1
        (directory / ticket.name).write_bytes(raw)
        with pytest.raises(KVTransferError, match=r"block 5 of .* is damaged"):
            await other.import_kv(ticket)
        assert await generate(other) == (expected, 0)


async def test_truncated_file(tmp_path, monkeypatch):
    """A file that is shorter than its ticket is refused with both numbers."""
    async with engines(tmp_path, monkeypatch) as (one, other, directory):
        await generate(one)
        ticket = await one.export_kv(KVExportRequest(token_ids=PROMPT))
        os.truncate(directory / ticket.name, 10)
        with pytest.raises(KVTransferError, match=f"have 10 bytes, the ticket says {ticket.total_bytes}"):
            await other.import_kv(ticket)


async def test_another_model(tmp_path, monkeypatch):
    """Blocks of another model are refused before a byte is read; they can be discarded."""
    async with engines(tmp_path, monkeypatch) as (one, other, _):
        await generate(one)
        ticket = await one.export_kv(KVExportRequest(token_ids=PROMPT))
        strange = msgspec.structs.replace(ticket, fingerprint="llama/cpu")
        with pytest.raises(KVTransferError, match="the blocks are of llama/cpu"):
            await other.import_kv(strange)
        assert await one.discard_kv(ticket.name)
        assert not await one.discard_kv(ticket.name)
        with pytest.raises(KVTransferError, match="cannot be read: No such file"):
            await other.import_kv(ticket)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "kv-1", ""])
async def test_names_cannot_leave_the_directory(tmp_path, monkeypatch, name):
    """A ticket cannot name any file but one of ours."""
    async with engines(tmp_path, monkeypatch) as (one, other, _):
        await generate(one)
        ticket = await one.export_kv(KVExportRequest(token_ids=PROMPT))
        with pytest.raises(InvalidArgumentError, match="not the name of a KV hand-over file"):
            await other.import_kv(msgspec.structs.replace(ticket, name=name))


async def test_no_room(tmp_path, monkeypatch):
    """An engine that has no room for all blocks takes what fits, and works on."""
    small = {"limits": Limits(n_ctx=128, parallel=1), "cache": CacheOptions(kv_bytes=64 * 16 * 4)}
    async with engines(tmp_path, monkeypatch, **small) as (one, other, _):
        expected, _ = await generate(one)
        try:
            await other.import_kv(await one.export_kv(KVExportRequest(token_ids=PROMPT)))
        finally:
            await other.check_integrity()
        assert (await generate(other))[0] == expected


async def test_unfetched_files_are_removed(tmp_path, monkeypatch):
    """What nobody fetched goes when its engine closes, and what a killed engine left goes with the next one that closes."""
    async with engines(tmp_path, monkeypatch) as (one, _, directory):
        await generate(one)
        await one.export_kv(KVExportRequest(token_ids=PROMPT))
        dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)  # noqa: ASYNC221
        (directory / f"kv-{int(dead.stdout)}-{'0' * 16}").touch()
        assert len(list(directory.iterdir())) == 2


def test_ticket_is_consistent():
    """A ticket whose tokens and checksums do not match is refused on decoding."""
    with pytest.raises(InvalidArgumentError, match="has 3 tokens and 1 checksums for blocks of 16"):
        KVTicket(name="x", fingerprint="f", block_size=16, block_bytes=4, token_ids=(1, 2, 3), checksums=(0,))


def test_shared_directory_is_private():
    """The directory is for this user alone."""
    assert shared_directory().stat().st_mode & 0o077 == 0


@pytest.mark.model
async def test_real_model_is_bit_equal_after_a_hand_over(tmp_path, monkeypatch, default_model_path):
    """On the native backend tokens and log-probabilities after a hand-over are those of the engine that computed the prompt."""
    real = {"model": str(default_model_path), "mock": MockOptions()}
    directory = tmp_path / "kv"
    directory.mkdir()
    monkeypatch.setattr(Handover.__init__, "__defaults__", (lambda: directory,))
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=tuple((k * 37) % 40_000 for k in range(70)),
        sampling=SamplingParams(seed=1, max_tokens=8, temperature=0.0, logprobs=2),
    )
    results = []
    engines = [LocalEngine(build_engine(config(**real))) for _ in range(2)]
    for k, engine in enumerate(engines):
        if k:
            ticket = await engines[0].export_kv(KVExportRequest(token_ids=request.prompt_token_ids))
            assert (await engine.import_kv(ticket)).stored == 4
        deltas = [delta async for delta in engine.stream(request)]
        results.append(
            [pair for d in deltas for pair in zip(d.token_ids, d.logprobs or (), strict=True)]
        )  # a delta may join steps
        assert max(d.cached_tokens for d in deltas) == 64 * k
    assert results[0] == results[1]
    for engine in engines:
        await engine.close()
