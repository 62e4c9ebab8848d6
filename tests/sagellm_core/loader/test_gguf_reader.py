"""GGUF files: what is read, how fast, and that no file of any content does harm."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_backend.tensors import Format, Tensor
from sagellm_core.loader import open_model
from sagellm_core.loader.gguf import GGML_BLOCKS, GGUFArray, read_header
from sagellm_core.loader.gguf_write import write_gguf
from sagellm_protocol.errors import ModelFileError


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    """Every kind of metadata value and the bytes of every format survive a round trip."""
    rng = np.random.default_rng(1)
    metadata = {
        "general.architecture": "x", "x.small": 7, "x.negative": -7, "x.large": 1 << 40, "x.low": -(1 << 40), "x.real": 0.5,
        "x.yes": True, "x.text": "ünï 🙂", "x.words": ["", "a", "🙂" * 100], "x.numbers": [1, 2, 3], "x.reals": [0.5, 2.0],
        "x.flags": [True, False], "x.empty": [],
    }  # fmt: skip
    tensors = {}
    for form in Format:
        shape = (3, 2 * form.block)
        data = rng.integers(0, 256, form.nbytes(shape), dtype=np.uint8)
        tensors[form.name] = Tensor(shape, form, data)
    path = tmp_path / "all.gguf"
    write_gguf(path, metadata, tensors)
    header = read_header(path)
    plain = {k: list(v) if isinstance(v, GGUFArray) else v for k, v in header.metadata.items()}
    assert plain == metadata
    for name, tensor in tensors.items():
        view = header.tensor(name)
        assert (view.shape, view.format) == (tensor.shape, tensor.format)
        assert np.array_equal(view.data, tensor.data)


def test_block_sizes_agree_with_the_backend() -> None:
    """The reader's table of formats, which needs no numpy, is the backend's."""
    assert {name: (block, size) for name, block, size in GGML_BLOCKS.values()} == {
        f.name: (f.block, f.block_bytes) for f in Format
    }


def test_long_vocabularies_are_skipped_and_parsed_alike(tmp_path: Path) -> None:
    """Guessing the end of a vocabulary gives the same header as walking it, also when a token looks like a key."""
    bait = b"\x1a\0\0\0\0\0\0\0tokenizer.ggml.merges".decode()
    words = [f"w{i}" for i in range(5000)]
    for tokens in (words, [*words[:4500], bait, *words[4500:]]):
        path = tmp_path / "long.gguf"
        write_gguf(path, {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.bos": 1, "z.last": tokens}, {})
        header = read_header(path)
        assert list(header.metadata) == ["tokenizer.ggml.tokens", "tokenizer.ggml.bos", "z.last"]
        first, last = header.metadata["tokenizer.ggml.tokens"], header.metadata["z.last"]
        assert isinstance(first, GGUFArray)
        assert isinstance(last, GGUFArray)
        assert first.strings() == last.strings() == tokens


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "0 bytes"),
        (b"GGUF", "4 bytes"),
        (b"PK\3\4" + bytes(60), "not a GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + bytes(40), "key"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2) + b"\xff\xfe" + bytes(40), "UTF-8"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77) + bytes(40), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 60) + bytes(40), "strings"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 62) + bytes(40), "elements"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1) + bytes(40), "array"),
    ],
)
def test_malformed_headers_are_named(tmp_path: Path, content: bytes, fact: str) -> None:
    """A header that cannot be read is refused with what is wrong about it."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=fact):
        read_header(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A path without a file, and a directory, are refused."""
    with pytest.raises(ModelFileError, match="does not exist"):
        read_header(tmp_path / "no.gguf")
    with pytest.raises(ModelFileError, match="not a file"):
        read_header(tmp_path)


def _tensor_file(tmp_path: Path, *infos: bytes, data: int = 4096, alignment: int | None = None) -> Path:
    path = tmp_path / "tensors.gguf"
    pairs = b"" if alignment is None else struct.pack("<Q17sII", 17, b"general.alignment", 4, alignment)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), 1 if pairs else 0) + pairs + b"".join(infos)
    path.write_bytes(head + bytes(data))
    return path


def _info(name: bytes = b"t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return struct.pack(f"<Q{len(name)}sI{len(dims)}QIQ", len(name), name, len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("infos", "alignment", "fact"),
    [
        ([_info(), _info()], None, "twice"),
        ([_info(kind=23)], None, "IQ4_XS"),
        ([_info(kind=99)], None, "type 99"),
        ([_info(kind=2, dims=(33,))], None, "block of 32"),
        ([_info(dims=(1 << 40, 1 << 40))], None, "shape"),
        ([_info(dims=(0,))], None, "shape"),
        ([_info(dims=(1, 1, 1, 1, 1))], None, "5 dimensions"),
        ([_info(offset=16)], None, "multiple of 32"),
        ([_info(offset=1 << 63)], None, "cut short"),
        ([_info(dims=(4096,))], None, "cut short"),
        ([_info()], 3, "alignment"),
        ([_info()], 0, "alignment"),
    ],
)
def test_malformed_tensors_are_named(tmp_path: Path, infos: list[bytes], alignment: int | None, fact: str) -> None:
    """A tensor that does not fit the file or the format is refused with what is wrong about it."""
    with pytest.raises(ModelFileError, match=fact):
        read_header(_tensor_file(tmp_path, *infos, alignment=alignment))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_mutation_raises_anything_else(tiny_gguf: Callable[..., Path], data: st.DataObject) -> None:
    """A file with any bytes changed, inserted or cut off opens, or is refused as ModelFileError."""
    path = tiny_gguf()
    content = bytearray(path.read_bytes())
    header = 1800
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header))
        patch = data.draw(st.binary(min_size=1, max_size=9))
        how = data.draw(st.sampled_from(["overwrite", "insert", "cut", "end"]))
        if how == "overwrite":
            content[at : at + len(patch)] = patch
        elif how == "insert":
            content[at:at] = patch
        elif how == "cut":
            del content[at : at + len(patch)]
        else:
            del content[data.draw(st.integers(0, len(content))) :]
    path.write_bytes(content)
    with contextlib.suppress(ModelFileError), open_model(path) as model:
        for slot in model.weights:
            assert model.weights[slot].shape == model.spec.slots()[slot]


@pytest.mark.model
def test_header_of_a_real_model_takes_milliseconds(default_model_path: Path) -> None:
    """The header of a 49k-token file takes under 30 ms of processor time, without numpy."""
    best = 1.0
    for _ in range(5):
        start = time.thread_time()
        header = read_header(default_model_path)
        best = min(best, time.thread_time() - start)
    assert len(header.tensors) == 272
    assert best < 0.03
    code = (
        "import sys; from sagellm_core.loader.gguf import read_header; "
        f"read_header({str(default_model_path)!r}); sys.exit('numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
