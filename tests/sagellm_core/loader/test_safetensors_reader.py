"""safetensors files: what is read, and that no file of any content does harm."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_backend.tensors import Format
from sagellm_core.loader.safetensors import open_safetensors
from sagellm_protocol.errors import ModelFileError


def _file(path: Path, header: Any, data: bytes = bytes(64)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _entry(dtype: str = "F32", shape: Any = (2, 4), offsets: Any = (0, 32)) -> dict[str, Any]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_views_have_the_bytes_of_the_file(tmp_path: Path) -> None:
    """F32, F16 and BF16 tensors are views of the right bytes."""
    header = _entry() | {
        "h": {"dtype": "F16", "shape": [4], "data_offsets": [32, 40]},
        "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [40, 48]},
        "i": {"dtype": "I64", "shape": [2], "data_offsets": [48, 64]},
    }
    data = bytes(range(64))
    file = open_safetensors(_file(tmp_path / "a.safetensors", header, data))
    assert file.tensor("t").data.tobytes() == data[:32]
    assert (file.tensor("h").format, file.tensor("h").data.tobytes()) == (Format.F16, data[32:40])
    assert (file.tensor("b").format, file.tensor("b").shape) == (Format.BF16, (2, 2))
    with pytest.raises(ModelFileError, match="I64"):
        file.tensor("i")


@pytest.mark.parametrize(
    ("header", "fact"),
    [
        (b"", "JSON"),
        (b"[1]", "JSON"),
        (b'{"t":', "JSON"),
        (b"\xff\xff", "JSON"),
        (b"[" * 100000, "JSON"),
        ({"t": 5}, "malformed"),
        ({"t": {"dtype": "F32"}}, "malformed"),
        (_entry(offsets=[0, 400]), "cut short"),
        (_entry(offsets=[32, 0]), "cut short"),
        (_entry(offsets=[-8, 24]), "cut short"),
        (_entry(offsets=[0, 28]), "28 bytes"),
        (_entry(shape=[2, -4]), "shape"),
        (_entry(shape=[1] * 9), "9 dimensions"),
        (_entry(shape=[1 << 62, 1 << 62]), "shape"),
        (_entry(shape="2"), "malformed"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, header: Any, fact: str) -> None:
    """A header that lies is refused with what is wrong about it."""
    with pytest.raises(ModelFileError, match=fact):
        open_safetensors(_file(tmp_path / "a.safetensors", header))


def test_an_absurd_header_length_is_refused(tmp_path: Path) -> None:
    """A header longer than the file is refused before anything is allocated."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\xff" * 7 + b"\x7f" + bytes(10))
    with pytest.raises(ModelFileError, match="claims a header"):
        open_safetensors(path)
    path.write_bytes(b"\x80\x02")
    with pytest.raises(ModelFileError, match="2 bytes"):
        open_safetensors(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Which of two tensors of one name is meant cannot be told."""
    _file(tmp_path / "a.safetensors", _entry())
    _file(tmp_path / "b.safetensors", _entry())
    with pytest.raises(ModelFileError, match="two shards"):
        open_safetensors(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 180), patch=st.binary(max_size=8), cut=st.integers(0, 200))
def test_no_mutation_raises_anything_else(tmp_path: Path, at: int, patch: bytes, cut: int) -> None:
    """A file with any bytes changed or cut off opens, or is refused as ModelFileError."""
    path = _file(tmp_path / "m.safetensors", _entry())
    content = bytearray(path.read_bytes())
    content[at : at + len(patch)] = patch
    path.write_bytes(content[: len(content) - cut] if cut % 3 == 0 else content)
    with contextlib.suppress(ModelFileError):
        file = open_safetensors(path)
        for name in file.tensors:
            assert isinstance(file.tensor(name).data, np.ndarray)
