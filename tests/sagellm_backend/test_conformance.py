from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from sagellm_backend.base import LoadOptions, Runner, StepBatch, StepResult
from sagellm_backend.conformance import CHECKS, Kit, draws_match_reference, forward_matches_reference
from sagellm_backend.conformance_specs import SPECS
from sagellm_backend.reference import ReferenceBackend, ReferenceRunner
from sagellm_backend.spec import DecoderSpec
from sagellm_backend.tensors import Weights

KIT = Kit(ReferenceBackend())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_reference_conforms(check: Callable[[Kit], None]) -> None:
    """The reference passes its own kit, bit for bit where it promises that."""
    check(KIT)


@dataclass
class _Wrong(ReferenceBackend):
    """A backend with a fault of choice."""

    fault: str

    def load(self, spec: DecoderSpec, weights: Weights, options: LoadOptions) -> ReferenceRunner:
        """Load a runner that has the fault."""
        runner = super().load(spec, weights, options)
        step = runner.step

        def faulty(batch: StepBatch) -> StepResult:
            result = step(batch)
            if self.fault == "batch" and batch.token_ids.size > 1 and result.logits is not None:
                result.logits[:] += np.linspace(0, 1e-5, result.logits.shape[1], dtype=np.float32)
            if self.fault == "draw":
                result.token_ids[result.token_ids == 3] = 4
                result.token_ids[-1] ^= 1
            if self.fault == "forward" and result.logits is not None:
                result.logits[:] *= 1.01
            return result

        runner.step = faulty  # type: ignore[method-assign]
        return runner


@pytest.mark.parametrize(
    ("fault", "check", "message"),
    [
        ("forward", forward_matches_reference, "differ by"),
        ("draw", draws_match_reference, "the reference"),
        ("batch", next(c for c in CHECKS if c.__name__ == "chunking_does_not_matter"), "promised bit-equal"),
    ],
)
def test_kit_catches_faults(fault: str, check: Callable[[Kit], None], message: str) -> None:
    """A backend with slightly wrong logits, a wrong draw or batch-dependent bits fails the kit."""
    with pytest.raises(AssertionError, match=message):
        check(Kit(_Wrong(fault), specs={"llama": SPECS["llama"]}))


def test_specs_cover_every_field() -> None:
    """The kit's specs give every field of DecoderSpec at least two values."""
    for name in DecoderSpec.__struct_fields__:
        if name in ("n_layers", "d_model", "n_heads", "head_dim", "d_ff", "vocab_size", "context_length", "norm_eps"):
            continue
        assert len({repr(getattr(spec, name)) for spec in SPECS.values()}) > 1, name


def test_runner_is_a_runner() -> None:
    """What the reference loads satisfies the Runner protocol."""
    assert isinstance(KIT.load(SPECS["llama"]), Runner)
