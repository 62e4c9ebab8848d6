"""The memory plan: numbers that add up, sizes that follow from what is free, refusals that say what fits."""

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_backend.base import MemoryInfo
from sagellm_backend.mock import mock_spec
from sagellm_backend.reference import ReferenceBackend
from sagellm_core.build import build_engine, plan_engine
from sagellm_core.config import CacheOptions, DeviceOptions, EngineConfig, Limits, MockOptions, SpeculationOptions
from sagellm_core.plan import human, plan_memory
from sagellm_protocol.errors import InvalidArgumentError, ResourceExhaustedError

MIB = 1 << 20


class Machine(ReferenceBackend):
    """The numpy backend on a machine of a given size."""

    def __init__(self, free):
        self.free = free

    def memory(self):
        return MemoryInfo(total=1 << 40, free=self.free)


class Quantising(Machine):
    """The same with weights in 4 bits and a KV cache in 8."""

    def capability(self):
        return dataclasses.replace(super().capability(), formats=("q4", "f32"), kv_dtypes=("f32", "int8"))

    def kv_block_bytes(self, spec, kv_dtype):
        return super().kv_block_bytes(spec, "f32") // (4 if kv_dtype == "int8" else 1)


SPEC = msgspec.structs.replace(
    mock_spec(8192), d_model=256, n_heads=4, n_kv_heads=2, head_dim=64, d_ff=1024, n_layers=12
)
BLOCK = ReferenceBackend().kv_block_bytes(SPEC, "auto")


def plan(free_mib=4096, **groups):
    return plan_memory(EngineConfig(model="some.gguf", **groups), SPEC, 10 * MIB, Machine(free_mib * MIB))


def test_the_parts_add_up_and_the_table_shows_them():
    """Total is weights + KV + activations + scratch, and each stands in the table."""
    got = plan()
    assert got.total_bytes == got.weight_bytes + got.kv_bytes + got.activation_bytes + got.scratch_bytes
    assert got.kv_bytes == got.n_blocks * got.block_bytes
    assert got.fits
    for value in (got.weight_bytes, got.kv_bytes, got.total_bytes, got.free_bytes):
        assert human(value) in got.render()


def test_with_room_enough_every_sequence_has_its_full_context():
    """There are parallel × n_ctx tokens and one block for a copy."""
    got = plan(65536, limits=Limits(n_ctx=1024, parallel=4))
    assert got.n_blocks == 4 * 64 + 1


def test_an_unsized_cache_takes_at_most_half_of_what_is_free():
    """The rest of the machine is left to others."""
    got = plan(1024)
    assert got.n_ctx == 8192
    rest = got.free_bytes - got.weight_bytes - got.activation_bytes - got.scratch_bytes
    assert got.kv_bytes <= rest / 2


def test_a_backend_that_measures_may_grow_the_cache_to_what_parallel_sequences_need():
    """Planned and further blocks make parallel full sequences and a block for a copy; a size that was given is not passed."""
    limits = Limits(n_ctx=1024, parallel=8)
    got = plan(200, limits=limits)
    assert 64 < got.n_blocks < 8 * 64 + 1
    assert got.n_blocks + got.more_blocks == 8 * 64 + 1
    assert plan(65536, limits=limits).more_blocks == 0
    assert plan(200, limits=limits, cache=CacheOptions(kv_bytes=got.kv_bytes)).more_blocks == 0
    assert plan(1024, limits=limits, device=DeviceOptions(memory_bytes=200 * MIB)).more_blocks == 0


def test_an_unsized_context_shrinks_until_it_fits():
    """On a small machine the context becomes what fits."""
    got = plan(200)
    assert got.fits
    assert 256 <= got.n_ctx < 8192


def test_an_impossible_context_is_refused_with_the_numbers_and_the_flag_that_fits():
    """The message has need, free and a --ctx that works."""
    with pytest.raises(ResourceExhaustedError) as caught:
        plan(200, limits=Limits(n_ctx=8192))
    message = caught.value.message
    assert human(200 * MIB) in message
    fitting = int(message.split("--ctx ")[1].split()[0])
    assert plan(200, limits=Limits(n_ctx=fitting)).fits
    with pytest.raises(ResourceExhaustedError):
        plan(200, limits=Limits(n_ctx=fitting + 17))


def test_weights_that_do_not_fit_ask_for_a_smaller_precision_or_model():
    """No context helps when the weights alone are too large: 4 bits do, on a device that has them."""
    config = EngineConfig(model="some.gguf", limits=Limits(n_ctx=512))
    with pytest.raises(ResourceExhaustedError, match=r"pass --quant q4$"):
        plan_memory(config, SPEC, 200 * MIB, Quantising(120 * MIB))
    with pytest.raises(ResourceExhaustedError, match=r"take a smaller model$"):
        plan_memory(config, SPEC, 200 * MIB, Machine(120 * MIB))


FLAGS = {
    "--ctx": ("limits", "n_ctx", int),
    "--kv-dtype": ("device", "kv_dtype", str),
    "--quant": ("device", "quant", str),
}


@given(st.integers(50, 2000), st.one_of(st.none(), st.integers(2, 8192)), st.integers(1, 32), st.integers(1, 400))
def test_every_flag_of_a_refusal_makes_it_fit(free_mib, n_ctx, parallel, file_mib):
    """Whatever does not fit: each of the ways out that the message names is one."""
    config = EngineConfig(model="some.gguf", limits=Limits(n_ctx=n_ctx, parallel=parallel))
    machine = Quantising(free_mib * MIB)
    try:
        plan_memory(config, SPEC, file_mib * MIB, machine)
    except ResourceExhaustedError as error:
        cure = error.message.rpartition("is free: ")[2]
    else:
        return
    for way in [] if cure == "take a smaller model" else cure.removeprefix("pass ").split(" or "):
        changed = config
        words = way.split()
        for flag, value in zip(words[::2], words[1::2], strict=True):
            group, name, kind = FLAGS[flag]
            part = msgspec.structs.replace(getattr(changed, group), **{name: kind(value)})
            changed = msgspec.structs.replace(changed, **{group: part})
        assert plan_memory(changed, SPEC, file_mib * MIB, machine).fits, way


def test_the_byte_cap_of_the_cache_is_hard():
    """The cap is never exceeded; too little for one sequence is refused with the number that is enough."""
    got = plan(cache=CacheOptions(kv_bytes=100 * BLOCK), limits=Limits(n_ctx=1024))
    assert got.kv_bytes <= 100 * BLOCK
    with pytest.raises(ResourceExhaustedError, match=f"--kv-size {65 * BLOCK}"):
        plan(cache=CacheOptions(kv_bytes=10 * BLOCK), limits=Limits(n_ctx=1024))


def test_the_memory_cap_counts_where_it_is_lower():
    """The cap memory_bytes stands for what is free."""
    assert plan(65536, device=DeviceOptions(memory_bytes=300 * MIB)).total_bytes <= 300 * MIB


def test_drafts_need_logit_rows():
    """Every guessed row may be drawn from."""
    plain = plan(limits=Limits(parallel=8))
    guessing = plan(limits=Limits(parallel=8), speculation=SpeculationOptions(method="ngram", max_draft=5))
    assert guessing.max_logit_rows - plain.max_logit_rows == 8 * 5


@given(st.integers(64, 20000), st.one_of(st.none(), st.integers(2, 8192)), st.integers(1, 32))
def test_a_plan_fits_or_is_refused(free_mib, n_ctx, parallel):
    """Whatever is asked for: what is planned fits, holds a whole sequence, and never exceeds what is free."""
    try:
        got = plan(free_mib, limits=Limits(n_ctx=n_ctx, parallel=parallel))
    except ResourceExhaustedError:
        return
    assert got.fits
    assert got.n_blocks * 16 > got.n_ctx


def test_an_engine_has_the_sizes_of_its_plan():
    """Both build_engine and plan_engine use the same numbers."""
    config = EngineConfig(model="mock", limits=Limits(n_ctx=512, parallel=3), mock=MockOptions(scale=0.0))
    got, engine = plan_engine(config), build_engine(config)
    described = engine.describe()
    assert (described.n_blocks, described.context_length, described.max_sequences) == (got.n_blocks, 512, 3)
    engine.close()


def test_a_configuration_survives_json():
    """The engine process gets its configuration as JSON."""
    config = EngineConfig(model="mock", limits=Limits(n_ctx=512), cache=CacheOptions(kv_bytes=4096))
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"model": "mock", "paralel": 3}', type=EngineConfig)


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: Limits(parallel=0), "parallel"),
        (lambda: Limits(parallel=16, max_batch_tokens=16), "max_batch_tokens"),
        (lambda: Limits(n_ctx=1), "n_ctx"),
        (lambda: SpeculationOptions(method="draft"), "draft_model"),
        (lambda: SpeculationOptions(draft_model="x.gguf"), "draft_model"),
        (lambda: MockOptions(scale=-1), "scale"),
        (lambda: EngineConfig(model=""), "model"),
        (lambda: build_engine(EngineConfig(model="mock", backend="cpu")), "backend"),
        (lambda: build_engine(EngineConfig(model="mock", device=DeviceOptions(quant="q4"))), "quant"),
        (lambda: build_engine(EngineConfig(model="mock", mock=MockOptions(script="/nowhere"))), "script"),
        (lambda: build_engine(EngineConfig(model="a.gguf", backend="mock", mock=MockOptions(script="s"))), "script"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(make, param):
    """A wrong option names itself."""
    with pytest.raises(InvalidArgumentError) as caught:
        make()
    assert caught.value.param == param
