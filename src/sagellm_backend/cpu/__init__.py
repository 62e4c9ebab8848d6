"""The native CPU backend: kernels in C++ (`native/`), one call a step."""

from sagellm_backend.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
