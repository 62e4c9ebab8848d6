"""What the native backend can do here, and how a model gets onto it."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from sagellm_backend.base import Capability, LoadOptions, MemoryInfo
from sagellm_backend.checks import check_weights
from sagellm_backend.cpu.interface import other_build
from sagellm_backend.host import host_memory
from sagellm_backend.spec import DecoderSpec
from sagellm_backend.tensors import Weights
from sagellm_protocol.errors import UnsupportedError

if TYPE_CHECKING:  # it needs the extension, which an installation may lack
    from sagellm_backend.cpu.runner import CpuRunner

__all__ = ["ISA_VARIABLE", "CpuBackend"]

ISA_VARIABLE = "SAGELLM_CPU_ISA"
"""Environment variable that forces an instruction set; for tests and for comparisons."""

_KV_DTYPES = ("bf16", "int8", "f32")


class CpuBackend:
    """Packed weights, int8 or bf16 dot products, paged KV; AVX-512, AVX2 or portable code, chosen at run time.

    A row's result is a function of its own sequence, bit for bit: of neither the other rows nor the number of threads.
    """

    @property
    def name(self) -> str:
        """``cpu``."""
        return "cpu"

    def available(self) -> str | None:
        """Return None if the extension is there, of this version, and has the forced instruction set, else what is wrong."""
        if importlib.util.find_spec("sagellm_backend.cpu._native") is None:
            return "isagellm was installed without its compiled extension"
        if (other := other_build()) is not None:
            return other
        forced = os.environ.get(ISA_VARIABLE, "")
        isas = _isas()
        if forced and forced not in isas:
            return f"{ISA_VARIABLE} is {forced!r}, this machine runs {', '.join(isas)}: unset it or name one of those"
        return None

    def capability(self) -> Capability:
        """Return what it can do on this machine."""
        return Capability(
            device="cpu",
            formats=("q4", "q8", "bf16", "f32"),
            kv_dtypes=_KV_DTYPES,
            instruction_set=_isa(),
            batch_invariant=True,
        )

    def memory(self) -> MemoryInfo:
        """Return total and free main memory in bytes."""
        return host_memory()

    def kv_block_bytes(self, spec: DecoderSpec, kv_dtype: str) -> int:
        """Return the bytes of one KV block; each head's K and V are padded to 16 dimensions.

        Raises:
            UnsupportedError: `kv_dtype` is not a precision of this backend's cache.
        """
        from sagellm_backend.cpu import _native

        return spec.n_layers * spec.n_kv_heads * 2 * _native.kv_head_bytes(_kv_dtype(kv_dtype), spec.head_dim)

    def load(self, spec: DecoderSpec, weights: Weights, options: LoadOptions) -> CpuRunner:
        """Pack the weights for this machine and allocate the cache.

        Raises:
            ValueError: a slot of the spec is missing or has another shape.
            UnsupportedError: the spec needs an operation, or the options a precision, that this backend lacks.
        """
        from sagellm_backend.cpu.runner import CpuRunner

        check_weights(spec, weights)
        return CpuRunner(spec, weights, options, isa=_isa(), kv_dtype=_kv_dtype(options.kv_dtype))


def _kv_dtype(name: str) -> str:
    chosen = "bf16" if name == "auto" else name
    if chosen not in _KV_DTYPES:
        raise UnsupportedError(
            f"the cpu backend keeps KV in {' or '.join(_KV_DTYPES)}, not {name}: change --kv-dtype", param="kv_dtype"
        )
    return chosen


def _isas() -> list[str]:
    from sagellm_backend.cpu import _native

    return _native.supported_isas()


def _isa() -> str:
    return os.environ.get(ISA_VARIABLE) or _isas()[0]
