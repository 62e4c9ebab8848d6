"""What the kit asks of a backend that runs encoders."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, get_args

import numpy as np
import numpy.typing as npt

from sagellm_backend.conformance_specs import random_weights
from sagellm_backend.encoder import EncodeBatch, EncodeOutput, EncoderBackend, EncoderSpec
from sagellm_backend.reference import ReferenceBackend

if TYPE_CHECKING:
    from sagellm_backend.conformance import Kit

__all__ = ["encoders_match_reference"]

Float32 = npt.NDArray[np.float32]

_BERT = EncoderSpec(
    architecture="bert", n_layers=2, d_model=64, n_heads=4, d_ff=128, vocab_size=96, context_length=64, n_positions=64,
    norm_eps=1e-12,
)  # fmt: skip
_ROBERTA = EncoderSpec(
    architecture="roberta", n_layers=2, d_model=96, n_heads=3, d_ff=128, vocab_size=96, context_length=60, n_positions=64,
    norm_eps=1e-5, position_offset=2, token_types=0, activation="gelu_tanh", n_labels=3,
)  # fmt: skip
_OUTPUTS: tuple[EncodeOutput, ...] = get_args(EncodeOutput)


def encoders_match_reference(kit: Kit) -> None:
    """Every output of an encoder equals the reference's, inputs of all lengths in one batch and each alone.

    A backend that is no `EncoderBackend` has nothing to show.
    """
    if not isinstance(kit.backend, EncoderBackend):
        return
    for spec in (_BERT, _ROBERTA):
        weights = random_weights(spec)
        runner = kit.backend.load_encoder(spec, weights, kit.options)
        reference = ReferenceBackend().load_encoder(spec, weights, kit.options)
        assert runner.spec == spec, "the encoder reports another spec"
        assert runner.weight_bytes > 0, "weight_bytes is 0"
        for output in _OUTPUTS:
            if output == "labels" and not spec.n_labels:
                continue
            for lengths in ((7,), (1, 33, 60, 2), (5, 5, 5)):
                batch = _batch(spec, lengths, output)
                want = reference.encode(batch)
                _near(kit, runner.encode(batch), want, f"{spec.architecture}, {output} of inputs of {lengths} tokens")
                for i, one in enumerate(_singles(batch)):
                    _near(kit, runner.encode(one), want[i : i + 1], f"{spec.architecture}, {output} of input {i} alone")
        runner.close()
        runner.close()


def _batch(spec: EncoderSpec, lengths: tuple[int, ...], output: EncodeOutput) -> EncodeBatch:
    rng = np.random.default_rng(sum(lengths))
    return EncodeBatch(
        token_ids=rng.integers(0, spec.vocab_size, sum(lengths)).astype(np.int32),
        token_types=rng.integers(0, max(1, spec.token_types), sum(lengths)).astype(np.int32),
        lengths=np.array(lengths, np.int32),
        output=output,
    )


def _singles(batch: EncodeBatch) -> list[EncodeBatch]:
    borders = [0, *np.cumsum(batch.lengths).tolist()]
    assert batch.token_types is not None
    return [
        EncodeBatch(batch.token_ids[a:b], np.array([b - a], np.int32), batch.output, batch.token_types[a:b])
        for a, b in pairwise(borders)
    ]


def _near(kit: Kit, got: Float32, want: Float32, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {got.shape} instead of {want.shape}"
    gap = float(np.abs(got - want).max() / np.abs(want).max())
    assert gap <= kit.tolerance, (
        f"{what}: differs by {gap:.2e} of the largest value, the tolerance is {kit.tolerance:.0e}"
    )
