from __future__ import annotations

import pytest

from sagellm_backend.blas import set_blas_threads


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread() -> None:
    """Tiny products on a busy machine: threads of a BLAS that wait for each other cost a hundred times the work."""
    set_blas_threads(1)
