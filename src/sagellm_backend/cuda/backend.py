"""What a GPU can do here, and how a model gets onto it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sagellm_backend.base import BLOCK_SIZE, Capability, LoadOptions, MemoryInfo
from sagellm_backend.checks import check_weights
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.encoder import EncoderSpec
from sagellm_backend.host import host_memory
from sagellm_backend.sampling import MAX_VOCAB
from sagellm_backend.spec import DecoderSpec
from sagellm_backend.tensors import Weights
from sagellm_protocol.errors import ResourceExhaustedError, UnsupportedError

if TYPE_CHECKING:  # they need torch
    from sagellm_backend.cuda.encoder import CudaEncoder
    from sagellm_backend.cuda.runner import CudaRunner

__all__ = ["CudaBackend"]

_INSTALL = "pip install 'isagellm[cuda]'"
_LEAST_CHIP = (8, 0)
_FP8_CHIP = (8, 9)
_EARLY_CHIP = (9, 0)
_KV_BYTES = {"bf16": 2, "f32": 4}


class CudaBackend:
    """torch and Triton on one GPU; the same code on ``SAGELLM_CUDA_DEVICE=cpu`` for tests.

    Args:
        settings: None reads the environment, when it is first needed.
    """

    def __init__(self, settings: CudaSettings | None = None) -> None:
        self._given = settings

    @property
    def name(self) -> str:
        """``cuda``."""
        return "cuda"

    @property
    def settings(self) -> CudaSettings:
        """How it runs."""
        if self._given is None:
            self._given = CudaSettings.from_environment()
        return self._given

    def available(self) -> str | None:
        """Return None if torch, Triton and a GPU are there, else which of them is not and what to do."""
        if importlib.util.find_spec("torch") is None:
            return f"torch is not installed: {_INSTALL}"
        if self.settings.triton and importlib.util.find_spec("triton") is None:
            return f"triton is not installed: {_INSTALL}"
        return _gpu_problem(self.settings) if self.settings.on_gpu else None

    def capability(self) -> Capability:
        """Return what it can do on this machine."""
        settings = self.settings
        return Capability(
            device=settings.device,
            formats=("q4", "q8", "bf16", "f32"),
            kv_dtypes=tuple(_KV_BYTES),
            instruction_set=_chip_name(settings),
            batch_invariant=settings.invariant and settings.triton,
        )

    def memory(self) -> MemoryInfo:
        """Return total and free bytes of the device; what this process's allocator holds unused counts as free."""
        if not self.settings.on_gpu:
            return host_memory()
        import torch

        free, total = torch.cuda.mem_get_info(self.settings.device)
        idle = torch.cuda.memory_reserved(self.settings.device) - torch.cuda.memory_allocated(self.settings.device)
        return MemoryInfo(total=total, free=min(total, free + idle))

    def kv_block_bytes(self, spec: DecoderSpec, kv_dtype: str) -> int:
        """Return the bytes of one KV block.

        Raises:
            UnsupportedError: `kv_dtype` is not a precision of this backend's cache.
        """
        size = _KV_BYTES[self._kv_dtype(kv_dtype)]
        return spec.n_layers * 2 * BLOCK_SIZE * spec.n_kv_heads * spec.head_dim * size

    def load(self, spec: DecoderSpec, weights: Weights, options: LoadOptions) -> CudaRunner:
        """Stream the weights to the device and allocate the cache.

        Raises:
            ValueError: a slot of the spec is missing or has another shape.
            UnsupportedError: the device, the spec or the options need what this backend lacks.
            ResourceExhaustedError: the device has no room for it; the message has the numbers.
        """
        self._check_options(options)
        if spec.vocab_size >= MAX_VOCAB:
            raise UnsupportedError(
                f"a vocabulary of {spec.vocab_size} is not below {MAX_VOCAB}, the limit of sums in 63 bits",
                param="model",
            )
        from sagellm_backend.cuda.device import on_device
        from sagellm_backend.cuda.runner import CudaRunner
        from sagellm_backend.cuda.weights import load_weights

        check_weights(spec, weights)
        kv_dtype = self._kv_dtype(options.kv_dtype)
        with self._loading():
            loaded = load_weights(spec, weights, self.settings, options.quant)
        with on_device(self.settings):
            return CudaRunner(spec, loaded, options, self.settings, kv_dtype)

    def load_encoder(self, spec: EncoderSpec, weights: Weights, options: LoadOptions) -> CudaEncoder:
        """Stream an encoder's weights to the device.

        Raises:
            ValueError: a slot of the spec is missing or has another shape.
            UnsupportedError: the device or the options need what this backend lacks.
            ResourceExhaustedError: the device has no room for it; the message has the numbers.
        """
        self._check_options(options)
        from sagellm_backend.cuda.encoder import CudaEncoder

        check_weights(spec, weights)
        with self._loading():
            return CudaEncoder(spec, weights, self.settings, options.quant)

    def _check_options(self, options: LoadOptions) -> None:
        reason = self.available()
        if reason is not None:
            raise UnsupportedError(f"backend 'cuda' cannot run here: {reason}", param="backend")
        if options.threads:
            raise UnsupportedError("the cuda backend has no threads to set: leave --threads out", param="threads")
        chip = _chip(self.settings) if self.settings.on_gpu else _EARLY_CHIP
        if self.settings.fp8 and chip < _FP8_CHIP:
            raise UnsupportedError(
                "this GPU has no 8-bit floats (it needs 8.9 or newer): unset SAGELLM_CUDA_FP8", param="quant"
            )
        if self.settings.early and chip < _EARLY_CHIP:
            raise UnsupportedError(
                "this GPU cannot launch a kernel before the last one ends (it needs 9.0 or newer): unset SAGELLM_CUDA_EARLY",
                param="backend",
            )

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Work on the device; say so where it has no room for the weights."""
        import torch

        from sagellm_backend.cuda.device import on_device

        with on_device(self.settings):
            try:
                yield
            except torch.OutOfMemoryError as error:
                memory = self.memory()
                raise ResourceExhaustedError(
                    f"the weights do not fit: {memory.free >> 20} MiB of {memory.total >> 20} MiB were free when the device "
                    "refused more: pass --quant q4 or q8, or take a smaller model"
                ) from error

    def _kv_dtype(self, name: str) -> str:
        chosen = ("f32" if self.settings.dtype == "f32" else "bf16") if name == "auto" else name
        if chosen not in _KV_BYTES:
            raise UnsupportedError(
                f"the cuda backend keeps KV in {' or '.join(_KV_BYTES)}, not {name}: change --kv-dtype",
                param="kv_dtype",
            )
        return chosen


def _gpu_problem(settings: CudaSettings) -> str | None:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        if built is None:
            return f"torch {torch.__version__} was built without CUDA: install a build with it, see https://pytorch.org"
        return f"torch {torch.__version__} (CUDA {built}) sees no GPU: check that nvidia-smi lists one"
    index = torch.device(settings.device).index or 0
    if index >= torch.cuda.device_count():
        return (
            f"SAGELLM_CUDA_DEVICE is {settings.device!r}, there are {torch.cuda.device_count()} GPUs: name one of those"
        )
    chip = _chip(settings)
    if chip < _LEAST_CHIP:
        return f"{settings.device} has compute capability {chip[0]}.{chip[1]}, bf16 kernels need 8.0: use --backend cpu"
    return None


def _chip(settings: CudaSettings) -> tuple[int, int]:
    import torch

    found: Any = torch.cuda.get_device_capability(settings.device)
    return int(found[0]), int(found[1])


def _chip_name(settings: CudaSettings) -> str:
    if not settings.on_gpu:
        return "torch"
    import torch

    major, minor = _chip(settings)
    return f"{torch.cuda.get_device_name(settings.device)} (sm_{major}{minor})"
