"""Random tensors and their comparison, for the tests of the GPU backend; needs torch."""

from __future__ import annotations

import torch


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Assert that ‖got − want‖ / ‖want‖ is below the tolerance."""
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    assert error < tolerance, f"relative error {error:.2e}"
