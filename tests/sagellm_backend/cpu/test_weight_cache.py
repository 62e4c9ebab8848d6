"""The cache of packed weights: reuse, damage, identity, bounds, two processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sagellm_backend.base import LoadOptions
from sagellm_backend.conformance import SequenceRun
from sagellm_backend.conformance_specs import SPECS, random_ids, random_weights
from sagellm_backend.cpu import CpuBackend
from sagellm_backend.tensors import Tensor

pytest.importorskip("sagellm_backend.cpu._native", reason="built without the extension")

SPEC = SPECS["llama"]
IDS = random_ids(SPEC, 20)


def logits(folder: Path | None, weights: Mapping[str, Tensor] | None = None) -> np.ndarray:
    options = LoadOptions(n_blocks=4, max_rows=32, cache_dir=None if folder is None else str(folder))
    runner = CpuBackend().load(SPEC, random_weights(SPEC) if weights is None else weights, options)
    out = SequenceRun(runner, [0, 1]).feed(IDS)
    runner.close()
    return out


def test_the_second_load_maps_what_the_first_packed(tmp_path: Path) -> None:
    """One file is written, and its content gives the same bits as packing anew."""
    want = logits(None)
    np.testing.assert_array_equal(logits(tmp_path), want)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_ino
    np.testing.assert_array_equal(logits(tmp_path), want)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_ino == written


@pytest.mark.parametrize("damage", ["byte", "short", "empty", "head"])
def test_a_damaged_file_is_packed_anew(tmp_path: Path, damage: str) -> None:
    """A flipped byte, a truncated file and a foreign header are noticed and replaced."""
    want = logits(tmp_path)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "byte":
        content[len(content) // 2] ^= 1
    elif damage == "head":
        content[0] ^= 1
    else:
        del content[len(content) // 2 if damage == "short" else 0 :]
    file.write_bytes(content)
    np.testing.assert_array_equal(logits(tmp_path), want)
    (file,) = tmp_path.iterdir()
    assert len(file.read_bytes()) > len(content) or damage in ("byte", "head")


def test_other_weights_are_another_file(tmp_path: Path) -> None:
    """Content tells models apart where the loader gives no identity."""
    logits(tmp_path)
    changed = dict(random_weights(SPEC))
    values = changed["1.down"].data.copy()
    values.view(np.float32)[5] += 1
    changed["1.down"] = replace(changed["1.down"], data=values)
    logits(tmp_path, changed)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    """Without a usable folder the weights are packed in memory."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    np.testing.assert_array_equal(logits(blocked), logits(None))


def test_the_folder_stays_within_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest unused files go when a new one needs their room."""
    logits(tmp_path)
    (first,) = tmp_path.iterdir()
    monkeypatch.setattr("sagellm_backend.cpu.weight_cache.MAX_CACHE_BYTES", first.stat().st_size + 100)
    logits(tmp_path, random_weights(SPEC, seed=8))
    (left,) = tmp_path.iterdir()
    assert left != first


def test_two_processes_pack_at_once(tmp_path: Path) -> None:
    """Engines that start together each get whole weights, and one file is left."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; import test_weight_cache as t;"
        "print(t.logits(Path(sys.argv[1])).tobytes().hex())"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    out = {process.communicate()[0] for process in running}
    assert out == {logits(None).tobytes().hex() + "\n"}
    assert len(list(tmp_path.iterdir())) == 1
