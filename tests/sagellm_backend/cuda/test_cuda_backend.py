"""What the backend says before anything of torch is needed; these run in every environment."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from sagellm_backend.base import Backend, LoadOptions
from sagellm_backend.conformance_specs import SPECS, random_weights
from sagellm_backend.cuda import CudaBackend
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.registry import load
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError

SPEC = SPECS["llama"]
HAS_TORCH = importlib.util.find_spec("torch") is not None


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find(name))


def test_it_is_a_backend_and_imports_nothing_heavy() -> None:
    """The registry constructs it by name, without torch or triton."""
    assert isinstance(load("cuda"), Backend)
    code = "import sys; from sagellm_backend.registry import load; load('cuda'); print(*({'torch', 'triton'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Without torch or triton it says which, and the command that installs it; loading is refused with the same words."""
    if missing == "triton" and not HAS_TORCH:
        pytest.skip("torch is looked for first, and is not installed")
    without(monkeypatch, missing)
    backend = CudaBackend(CudaSettings())
    reason = backend.available()
    assert reason is not None
    assert reason.startswith(f"{missing} is not installed: pip install 'isagellm[cuda]'")
    with pytest.raises(UnsupportedError, match=f"{missing} is not installed"):
        backend.load(SPEC, random_weights(SPEC), LoadOptions(n_blocks=4))


@pytest.mark.cuda
def test_a_machine_without_a_gpu_is_refused() -> None:
    """With torch but no GPU it says so, and whether torch was built for one."""
    torch = pytest.importorskip("torch", reason="torch is not installed: make test-cuda")
    pytest.importorskip("triton", reason="triton is not installed: make test-cuda")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = CudaBackend(CudaSettings()).available()
    assert reason is not None
    assert "built without CUDA" in reason or "sees no GPU" in reason


def test_settings_come_from_the_environment() -> None:
    """Every field has a variable; what is not set keeps its default."""
    found = CudaSettings.from_environment(
        {"SAGELLM_CUDA_DEVICE": "cuda:1", "SAGELLM_CUDA_GRAPHS": "0", "SAGELLM_CUDA_DTYPE": "f16", "HOME": "/"}
    )
    assert found == CudaSettings(device="cuda:1", graphs=False, dtype="f16")
    assert found.triton
    assert not CudaSettings(device="cpu").triton
    assert CudaSettings(device="cpu", kernels="triton").triton


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SAGELLM_CUDA_GRAPHS", "yes", "'yes': use one of 0, 1"),
        ("SAGELLM_CUDA_DTYPE", "fp8", "'fp8': use one of auto, f32, bf16, f16"),
        ("SAGELLM_CUDA_GRAPH", "1", "SAGELLM_CUDA_GRAPH is unknown.*SAGELLM_CUDA_GRAPHS"),
    ],
)
def test_wrong_settings_are_refused_by_name(variable: str, value: str, message: str) -> None:
    """A value that a variable cannot have, and a variable that does not exist, are errors."""
    with pytest.raises(InvalidArgumentError, match=message):
        CudaSettings.from_environment({variable: value})


def test_blocks_are_known_before_loading() -> None:
    """The bytes of a block follow from the spec and the cache's precision; what the cache cannot hold is refused."""
    backend = CudaBackend(CudaSettings(device="cpu"))
    numbers = SPEC.n_layers * 2 * 16 * SPEC.n_kv_heads * SPEC.head_dim
    assert backend.kv_block_bytes(SPEC, "auto") == backend.kv_block_bytes(SPEC, "bf16") == 2 * numbers
    assert backend.kv_block_bytes(SPEC, "f32") == 4 * numbers
    assert CudaBackend(CudaSettings(device="cpu", dtype="f32")).kv_block_bytes(SPEC, "auto") == 4 * numbers
    with pytest.raises(UnsupportedError, match="keeps KV in bf16 or f32, not int8"):
        backend.kv_block_bytes(SPEC, "int8")


def test_invariance_is_promised_only_where_it_is_kept() -> None:
    """Batch invariance is claimed for our own kernels with fixed tiles, not for torch's library."""
    assert CudaBackend(CudaSettings(device="cpu", kernels="triton", invariant=True)).capability().batch_invariant
    assert not CudaBackend(CudaSettings(device="cpu", invariant=True)).capability().batch_invariant
    assert not CudaBackend(CudaSettings(device="cpu", kernels="triton")).capability().batch_invariant


@pytest.mark.cuda
def test_threads_are_refused() -> None:
    """An option that means nothing here is refused by name."""
    pytest.importorskip("torch", reason="torch is not installed: make test-cuda")
    with pytest.raises(UnsupportedError, match="no threads to set"):
        CudaBackend(CudaSettings(device="cpu")).load(SPEC, random_weights(SPEC), LoadOptions(n_blocks=4, threads=2))
