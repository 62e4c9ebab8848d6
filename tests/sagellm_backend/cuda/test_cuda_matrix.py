"""Weights on the device hold what the file holds."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-cuda")

from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_backend.cuda.formats import plain, unpack
from sagellm_backend.cuda.matrix import Matrix, concatenate, expand, to_fp8, to_q4, to_q8
from sagellm_backend.cuda.stream import Uploader
from sagellm_backend.quant import dequantize, quantize, round_trip
from sagellm_backend.tensors import Format, Tensor

pytestmark = pytest.mark.cuda

EXACT = [Format.Q4_0, Format.Q4_1, Format.Q5_0, Format.Q5_1, Format.Q8_0]
NEAR = {Format.Q4_K: 2e-3, Format.Q5_K: 2e-3, Format.Q6_K: 2e-3}


def random_blocks(fmt: Format, shape: tuple[int, int], seed: int) -> Tensor:
    """Random bytes with scales of moderate size."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (fmt.nbytes(shape) // fmt.block_bytes, fmt.block_bytes), dtype=np.uint8)
    for at in {
        Format.Q6_K: (208,),
        Format.Q4_K: (0, 2),
        Format.Q5_K: (0, 2),
        Format.Q4_1: (0, 2),
        Format.Q5_1: (0, 2),
    }.get(fmt, (0,)):
        data[:, at : at + 2] = rng.uniform(0.01, 0.1, (len(data), 1)).astype("<f2").view(np.uint8)
    return Tensor(shape, fmt, data.reshape(-1))


def bytes_of(tensor: Tensor) -> torch.Tensor:
    return torch.from_numpy(tensor.data.copy())


@pytest.mark.parametrize("fmt", EXACT, ids=lambda f: f.name)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), groups=st.integers(1, 4))
def test_formats_of_one_scale_a_group_are_kept_exactly(fmt: Format, seed: int, rows: int, groups: int) -> None:
    """What is unpacked on the device equals the numpy decoder's values, bit for bit."""
    tensor = random_blocks(fmt, (rows, groups * 32), seed)
    got = expand(unpack(bytes_of(tensor), fmt, tensor.shape), torch.float32)
    np.testing.assert_array_equal(got.numpy(), dequantize(tensor))


@pytest.mark.parametrize("fmt", NEAR, ids=lambda f: f.name)
def test_formats_of_two_levels_lose_no_more_than_a_rounded_scale(fmt: Format) -> None:
    """Scales of K formats are products; rounded to 16 bits they stay near."""
    tensor = random_blocks(fmt, (8, 512), 3)
    want = dequantize(tensor)
    got = expand(unpack(bytes_of(tensor), fmt, tensor.shape), torch.float32).numpy()
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < NEAR[fmt]


@pytest.mark.parametrize(("pack", "fmt"), [(to_q4, Format.Q4_1), (to_q8, Format.Q8_0)], ids=["q4", "q8"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_quantising_rounds_as_the_reference_does(pack: object, fmt: Format, seed: int) -> None:
    """Matrices that are quantised at load hold exactly the reference's rounded values; a group of zeros stays zero."""
    values = np.random.default_rng(seed).standard_normal((3, 64)).astype(np.float32)
    values[1, :32] = 0
    got = expand(pack(torch.from_numpy(values)), torch.float32)  # type: ignore[operator]
    np.testing.assert_array_equal(got.numpy(), round_trip(values, fmt))


def test_eight_bit_floats_keep_three_bits_of_fraction() -> None:
    """The error of e4m3 with a scale for each output is that of its rounding."""
    values = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    error = (expand(to_fp8(values), torch.float32) - values).norm() / values.norm()
    assert 0.005 < error < 0.04


def test_plain_formats_are_views() -> None:
    """Numbers of 16 and 32 bits are taken as they lie."""
    values = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    for fmt in (Format.F32, Format.F16, Format.BF16):
        tensor = quantize(values, fmt)
        data = bytes_of(tensor)
        numbers = plain(data, fmt, tensor.shape)
        assert numbers is not None
        assert numbers.data_ptr() == data.data_ptr()
        np.testing.assert_array_equal(numbers.float().numpy(), dequantize(tensor))
    assert plain(torch.zeros(20, dtype=torch.uint8), Format.Q4_1, (1, 32)) is None


def test_matrices_of_one_kind_are_joined_and_others_are_not() -> None:
    """Joined matrices give their outputs one below the other; two kinds stay apart."""
    a, b = torch.randn(4, 64), torch.randn(6, 64)
    for make in (to_q4, to_q8, to_fp8, lambda v: Matrix("dense", v)):
        joined = concatenate([make(a), make(b)])
        assert joined is not None
        want = torch.cat([expand(make(a), torch.float32), expand(make(b), torch.float32)])
        assert torch.equal(expand(joined, torch.float32), want)
    assert concatenate([to_q4(a), to_q8(b)]) is None


def test_uploads_arrive_whole() -> None:
    """An array is the same on the device, and later changes of the source do not reach it."""
    source = np.arange(1000, dtype=np.int64).view(np.uint8).copy()
    sent = Uploader("cpu").upload(source)
    source[:] = 0
    assert sent.view(torch.int64).tolist() == list(range(1000))
