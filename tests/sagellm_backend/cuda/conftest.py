"""Kernels run under Triton's interpreter here: it must be chosen before the first kernel is defined."""

from __future__ import annotations

import importlib.util
import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Tiny products: threads that wait for each other cost more than the work."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)
