"""A GPU by torch and Triton. Importing this package imports neither: `CudaBackend` says what is missing when it is asked."""

from sagellm_backend.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
