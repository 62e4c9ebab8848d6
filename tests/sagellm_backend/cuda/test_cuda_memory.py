"""The cache gets what is left beside the weights and the largest step, which is measured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-cuda")

from hypothesis import given
from hypothesis import strategies as st

from sagellm_backend.base import LoadOptions
from sagellm_backend.conformance import SequenceRun
from sagellm_backend.conformance_specs import SPECS, random_ids, random_weights
from sagellm_backend.cuda.memory import GRAPH_ROWS, Room, largest_step, trial_blocks
from sagellm_backend.cuda.runner import CudaRunner
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.cuda.weights import load_weights
from sagellm_protocol.errors import ResourceExhaustedError

pytestmark = pytest.mark.cuda

sizes = st.integers(0, 1 << 36)


@given(sizes, sizes, sizes, st.integers(1, 9000), st.integers(1, 500), st.integers(0, 500), st.integers(1, 1 << 22))
def test_what_is_given_fits(
    free: int, total: int, step: int, max_rows: int, n_blocks: int, more: int, block_bytes: int
) -> None:
    """The blocks, the step and the captured steps together are never more than what is free, nor fewer blocks than asked for."""
    options = LoadOptions(n_blocks=n_blocks, more_blocks=more, max_rows=max_rows)
    try:
        blocks = Room(free, total, 0, step).blocks(options, block_bytes)
    except ResourceExhaustedError:
        assert n_blocks * block_bytes + step + total // 50 > free - step * min(max_rows, GRAPH_ROWS) // max_rows - 1
        return
    assert n_blocks <= blocks <= n_blocks + more
    assert blocks * block_bytes + step + total // 50 <= free


@dataclass
class ScriptedMeter:
    """A device of `size` bytes whose steps take `step`."""

    size: int
    step: int
    calls: list[str] = field(default_factory=list)

    def free(self) -> tuple[int, int]:
        self.calls.append("free")
        return self.size, self.size

    def begin(self) -> None:
        self.calls.append("begin")

    def peak(self) -> int:
        self.calls.append("peak")
        return self.step


SPEC = SPECS["llama"]
SETTINGS = CudaSettings(device="cpu", dtype="f32")
OPTIONS = LoadOptions(n_blocks=20, more_blocks=100, max_rows=64, max_logit_rows=8)


def load(meter: ScriptedMeter, options: LoadOptions = OPTIONS) -> CudaRunner:
    weights = load_weights(SPEC, random_weights(SPEC), SETTINGS, "auto")
    return CudaRunner(SPEC, weights, options, SETTINGS, "f32", meter)


def test_a_cache_grows_into_the_room_that_was_measured() -> None:
    """The largest step runs once, beside a cache of its own size; then the cache is as large as it was allowed or as fits."""
    block = SPEC.n_layers * 2 * SPEC.n_kv_heads * 16 * SPEC.head_dim * 4
    meter = ScriptedMeter(size=100 * block, step=10 * block)
    runner = load(meter)
    assert meter.calls == ["begin", "peak", "free"]
    assert runner.peak_step_bytes == 10 * block
    assert runner.kv.n_blocks == 100 - 2 - 2 * 10
    run = SequenceRun(runner, [runner.kv.n_blocks - 1, 0])
    plain = SequenceRun(CudaRunner(SPEC, runner._weights, OPTIONS, SETTINGS, "f32"), [3, 1])
    ids = random_ids(SPEC, 20)
    assert (run.feed(ids) == plain.feed(ids)).all()
    with pytest.raises(ValueError, match="the cache has 0 to 77"):
        SequenceRun(runner, [78]).feed([1])
    assert load(ScriptedMeter(10000 * block, block)).kv.n_blocks == 120


def test_what_does_not_fit_is_refused_with_its_numbers() -> None:
    """A device without room for the blocks that were asked for is refused, with what the step was found to take."""
    with pytest.raises(
        ResourceExhaustedError, match=r"20 KV blocks .* a step of 64 rows, which takes 0\.50 GiB, .*--kv-size"
    ):
        load(ScriptedMeter(size=1 << 29, step=1 << 29))


def test_the_largest_step_is_what_the_options_allow() -> None:
    """As many rows and draws as are allowed, or as the cache holds; beside a cache that holds just those."""
    step = largest_step(replace(OPTIONS, n_blocks=trial_blocks(OPTIONS)))
    assert (step.token_ids.size, len(step.sampling)) == (64, 8)
    small = replace(OPTIONS, n_blocks=2)
    assert trial_blocks(small) == 2
    assert largest_step(small).token_ids.size == 32
