"""The disk tier: lossless, checked, bounded, gone with its engine."""

import os

import pytest

from sagellm_backend.mock import MockKV
from sagellm_core.spill import DiskTier
from sagellm_core.testing import collect, mock_engine
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.sampling import SamplingParams


@pytest.fixture
def kv():
    cache = MockKV(8)
    for block in range(8):
        cache.import_blocks([block], bytes([block + 1]) * cache.block_bytes)
    return cache


@pytest.fixture
def tier(kv, tmp_path):
    made = DiskTier(kv, tmp_path, 3 * kv.block_bytes)
    yield made
    made.close()


def name(number):
    return bytes([number]) * 16


def test_a_block_comes_back_as_it_went(kv, tier):
    """What is loaded is what was stored, into whichever block."""
    tier.store(name(1), (1, 2), 3)
    assert tier.holds(name(1), (1, 2))
    assert tier.load(name(1), 6)
    assert kv.export_blocks([6]) == kv.export_blocks([3])


def test_tokens_are_compared(tier):
    """A name with other tokens is not held."""
    tier.store(name(1), (1, 2), 3)
    assert not tier.holds(name(1), (9, 9))
    assert not tier.holds(name(2), (1, 2))


def test_the_byte_cap_is_hard_and_the_least_recently_used_goes(kv, tier):
    """Three blocks fit: the fourth takes the place of the one that was not used for longest."""
    for number in (1, 2, 3):
        tier.store(name(number), (number,), number)
    tier.load(name(1), 7)
    tier.store(name(4), (4,), 4)
    assert tier.n_blocks == 3
    assert tier.n_bytes == 3 * kv.block_bytes
    assert not tier.holds(name(2), (2,))
    assert tier.load(name(1), 6)
    assert tier.load(name(4), 5)
    assert kv.export_blocks([5]) == kv.export_blocks([4])


def test_a_damaged_block_is_not_loaded(kv, tier):
    """A flipped byte on disk is found by the checksum; the block is forgotten and counted."""
    tier.store(name(1), (1,), 1)
    os.pwrite(tier._file.fileno(), b"\xff", 5)
    before = kv.export_blocks([6])
    assert not tier.load(name(1), 6)
    assert kv.export_blocks([6]) == before
    assert (tier.errors, tier.n_blocks) == (1, 0)
    assert not tier.load(name(1), 6)


def test_a_truncated_file_is_not_loaded(tier):
    """A short read is a miss, not garbage."""
    tier.store(name(1), (1,), 1)
    os.ftruncate(tier._file.fileno(), 10)
    assert not tier.load(name(1), 6)
    assert tier.errors == 1


def test_nothing_is_left_on_disk(kv, tmp_path):
    """The file has no name, so that a crash leaves nothing either."""
    tier = DiskTier(kv, tmp_path / "new", 2 * kv.block_bytes)
    tier.store(name(1), (1,), 1)
    assert list((tmp_path / "new").iterdir()) == []
    tier.close()
    tier.close()


def test_a_cap_below_one_block_is_refused(kv, tmp_path):
    """The message has both numbers."""
    with pytest.raises(InvalidArgumentError, match=f"{kv.block_bytes - 1}.*{kv.block_bytes}"):
        DiskTier(kv, tmp_path, kv.block_bytes - 1)


def request(number, text):
    how = SamplingParams(temperature=0.0, seed=0, max_tokens=8, ignore_eos=True)
    return EngineRequest(request_id=str(number), prompt_token_ids=tuple(text), sampling=how)


def test_evicted_prefixes_are_found_on_disk_again(tmp_path):
    """With room for one prompt in memory, a second visit to the first finds its blocks on disk and gives the same text."""
    engine = mock_engine(n_blocks=8, n_ctx=128, spill_dir=tmp_path, spill_blocks=64)
    texts = [bytes([65 + number]) * 100 for number in range(4)]
    first = [collect(engine, [request(i, text)])[str(i)] for i, text in enumerate(texts)]
    again = [collect(engine, [request(i, text)])[str(i)] for i, text in enumerate(texts)]
    engine.check_integrity()
    assert [o.token_ids for o in again] == [o.token_ids for o in first]
    assert [o.deltas[0].cached_tokens for o in again] == [96] * 4
    status = engine.status()
    assert status.spill_hits >= 18
    assert status.evict_seconds > 0
    engine.close()


def test_a_damaged_prefix_is_computed_again(tmp_path):
    """When the disk fails, the text is still right."""
    engine = mock_engine(n_blocks=8, n_ctx=128, spill_dir=tmp_path, spill_blocks=64)
    texts = [bytes([65 + number]) * 100 for number in range(3)]
    first = [collect(engine, [request(i, text)])[str(i)] for i, text in enumerate(texts)]
    os.ftruncate(engine._spill._file.fileno(), 100)
    again = [collect(engine, [request(i, text)])[str(i)] for i, text in enumerate(texts)]
    engine.check_integrity()
    assert [o.token_ids for o in again] == [o.token_ids for o in first]
    assert engine.status().spill_errors > 0
    engine.close()
