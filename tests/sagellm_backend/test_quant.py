from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_backend import quant
from sagellm_backend.quant import dequantize, quantize, round_trip
from sagellm_backend.tensors import Format, Tensor
from sagellm_protocol.errors import UnsupportedError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "quant.json").read_text())


def raw(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8)


@pytest.mark.parametrize("name", GOLDEN["decode"])
def test_decode_matches_gguf_package(name: str) -> None:
    """Random blocks of every format decode to the very float32 values that the gguf package gives."""
    want = raw(GOLDEN["decode"][name]["values"]).view("<f4")
    got = dequantize(Tensor(want.shape, Format[name], raw(GOLDEN["decode"][name]["blocks"])))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", GOLDEN["encode"])
def test_encode_matches_gguf_package(name: str) -> None:
    """Quantising gives the same bytes as the gguf package, zero and constant blocks included."""
    source = raw(GOLDEN["encode"][name]["source"]).view("<f4")
    got = quantize(source, Format[name])
    np.testing.assert_array_equal(got.data, raw(GOLDEN["encode"][name]["blocks"]))


def test_slices_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of many slices decodes like one of a single slice."""
    array = np.random.default_rng(1).standard_normal((7, 64)).astype(np.float32)
    want = round_trip(array, Format.Q4_1)
    monkeypatch.setattr(quant, "SLICE_BLOCKS", 3)
    np.testing.assert_array_equal(round_trip(array, Format.Q4_1), want)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["Q4_0", "Q4_1", "Q8_0", "BF16", "F16"]), st.floats(1e-3, 1e3))
def test_error_is_bounded_by_the_step(seed: int, name: str, scale: float) -> None:
    """A quantised value lies within one step of the original (ggml's Q4_0 clips one end by up to a step)."""
    array = (np.random.default_rng(seed).standard_normal((3, 64)) * scale).astype(np.float32)
    got = round_trip(array, Format[name])
    blocks = array.reshape(-1, 32)
    peak, span = np.abs(blocks).max(1, keepdims=True), np.ptp(blocks, 1)[:, None]
    step = {"Q4_0": peak / 8, "Q4_1": span / 15, "Q8_0": peak / 127, "BF16": peak / 128, "F16": peak / 1024}[name]
    assert np.all(np.abs(got.reshape(-1, 32) - blocks) <= step * 1.01 + peak * 2e-3)


def test_f32_is_copied() -> None:
    """Decoding an F32 tensor gives an array that does not alias the file."""
    source = np.arange(4, dtype=np.float32)
    got = dequantize(Tensor.of(source))
    got[0] = 9
    assert source[0] == 0


def test_bf16_rounds_to_even_and_keeps_nan() -> None:
    """BF16 rounds halves to even, and a NaN stays one."""
    bits = np.array([0x3F808000, 0x3F818000, 0x7F800001, 0xFF800000], np.uint32)
    got = round_trip(bits.view(np.float32), Format.BF16)
    assert got.view(np.uint32)[:2].tolist() == [0x3F800000, 0x3F820000]
    assert np.isnan(got[2])
    assert got[3] == -np.inf


def test_unknown_target_is_refused() -> None:
    """A format without a quantiser is refused by name, with those that exist."""
    with pytest.raises(UnsupportedError, match=r"Q6_K.*Q8_0"):
        quantize(np.zeros((1, 256), np.float32), Format.Q6_K)


def test_ragged_rows_are_refused() -> None:
    """An axis that no whole number of blocks covers is refused with both numbers."""
    with pytest.raises(ValueError, match=r"\(2, 33\).*32"):
        quantize(np.zeros((2, 33), np.float32), Format.Q8_0)
