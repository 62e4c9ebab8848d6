"""A model's weights on the device, in the form in which a step uses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sagellm_backend.cuda.formats import plain, unpack
from sagellm_backend.cuda.matrix import GROUP, Matrix, concatenate, expand, to_fp8, to_q4, to_q8
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.cuda.stream import Uploader
from sagellm_backend.encoder import EncoderSpec
from sagellm_backend.spec import DecoderSpec
from sagellm_backend.tensors import Format, Tensor, Weights
from sagellm_protocol.errors import UnsupportedError

__all__ = ["DTYPES", "Loader", "Projection", "WeightSet", "compute_dtype", "load_weights"]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

_FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up"), "experts.gate_up": ("experts.gate", "experts.up")}


@dataclass(frozen=True, slots=True)
class Projection:
    """Matrices that read the same input, their outputs side by side; one matrix wherever they are of one kind.

    Attributes:
        slots: names that the outputs belong to, for adapters, with their numbers of outputs.
        bias: (outputs,) in the compute dtype, or None.
    """

    parts: tuple[Matrix, ...]
    slots: tuple[tuple[str, int], ...]
    bias: torch.Tensor | None = None

    @property
    def outputs(self) -> int:
        """Outputs of all parts."""
        return sum(part.outputs for part in self.parts)


@dataclass(frozen=True, slots=True)
class WeightSet:
    """Everything of one model.

    Attributes:
        dtype: of activations.
        vectors: slot -> float32 (norms).
        projections: ``L.qkv``, ``L.o``, ``L.gate_up``, ``L.down``, ``L.router``, ``L.experts.gate_up``, ``L.experts.down``.
        embed, head: one object where they are tied.
    """

    dtype: torch.dtype
    vectors: dict[str, torch.Tensor]
    projections: dict[str, Projection]
    embed: Matrix
    head: Matrix

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        matrices = [self.embed] if self.head is self.embed else [self.embed, self.head]
        matrices += [part for projection in self.projections.values() for part in projection.parts]
        vectors = [*self.vectors.values(), *(p.bias for p in self.projections.values() if p.bias is not None)]
        return sum(m.nbytes for m in matrices) + sum(int(v.numel() * v.element_size()) for v in vectors)


def compute_dtype(spec: DecoderSpec | EncoderSpec, weights: Weights, settings: CudaSettings, quant: str) -> torch.dtype:
    """Return the dtype of activations.

    Half precision overflows at 65504, which decoders with a norm on each branch's output are known to pass.
    """
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    fmt = weights["0.q"].format if spec.n_layers else Format.F32
    if quant == "f32" or (quant == "auto" and fmt is Format.F32 and not settings.fp8):
        return torch.float32
    bounded = isinstance(spec, EncoderSpec) or spec.norm_placement != "both"
    return torch.float16 if quant == "auto" and fmt is Format.F16 and bounded else torch.bfloat16


def load_weights(spec: DecoderSpec, weights: Weights, settings: CudaSettings, quant: str) -> WeightSet:
    """Stream all slots of `spec` to the device, in the order of their use.

    Raises:
        UnsupportedError: a matrix cannot be brought to `quant`.
    """
    loader = Loader(spec, weights, settings, quant)
    projections: dict[str, Projection] = {}
    vectors: dict[str, torch.Tensor] = {}
    for layer in range(spec.n_layers):
        names = ["qkv", "o"]
        moe = spec.experts is not None and layer in spec.expert_layers
        names += ["router", "experts.gate_up", "experts.down"] if moe else ["gate_up", "down"]
        for name in names:
            projections[f"{layer}.{name}"] = loader.projection(f"{layer}.{name}")
    for slot, shape in spec.slots().items():
        if len(shape) == 1 and not slot.endswith("bias"):
            vectors[slot] = loader.vector(slot)
    head = None if spec.tied_head else loader.matrix("head")
    embed = loader.matrix("embed")
    return WeightSet(loader.dtype, vectors, projections, embed, embed if head is None else head)


class Loader:
    """Brings single weights to the device, in the precision that the settings and `quant` ask for.

    Args:
        spec: the model.
        weights: its weights.
        settings: how to run.
        quant: of `LoadOptions`.

    Attributes:
        dtype: of activations.
    """

    def __init__(self, spec: DecoderSpec | EncoderSpec, weights: Weights, settings: CudaSettings, quant: str) -> None:
        self.dtype = compute_dtype(spec, weights, settings, quant)
        self._spec, self._weights, self._quant = spec, weights, quant
        self._fp8 = settings.fp8
        self._uploader = Uploader(settings.device)

    def vector(self, slot: str) -> torch.Tensor:
        """A norm's weights, or whatever else is small, in float32."""
        tensor = self._weights[slot]
        return _numbers(tensor, self._upload(tensor)).float().contiguous()

    def projection(self, name: str) -> Projection:
        """The matrix ``L.name``, or what is fused under that name, with its bias if it has one."""
        layer, dot, part = name.partition(".")
        slots = [f"{layer}.{each}" for each in _FUSED.get(part, (part,))] if dot else [name]
        matrices = [self.matrix(slot) for slot in slots]
        joined = concatenate(matrices)
        biases = [self.vector(f"{slot}_bias") for slot in slots if f"{slot}_bias" in self._spec.slots()]
        return Projection(
            parts=tuple(matrices) if joined is None else (joined,),
            slots=tuple((slot, matrix.outputs) for slot, matrix in zip(slots, matrices, strict=True)),
            bias=torch.cat(biases).to(self.dtype) if biases else None,
        )

    def matrix(self, slot: str) -> Matrix:
        """A matrix that stands alone."""
        tensor = self._weights[slot]
        data = self._upload(tensor)
        if slot.endswith(".router"):  # tiny, and its errors send rows to other experts
            return Matrix("dense", _numbers(tensor, data).float())
        numbers = plain(data, tensor.format, tensor.shape)
        target = self._target(slot, numbers is not None)
        if target is not None:
            return target(slot, _numbers(tensor, data) if numbers is None else numbers)
        return unpack(data, tensor.format, tensor.shape) if numbers is None else self._dense(slot, numbers)

    def _upload(self, tensor: Tensor) -> torch.Tensor:
        return self._uploader.upload(tensor.data)

    def _target(self, slot: str, is_plain: bool) -> Callable[[str, torch.Tensor], Matrix] | None:
        """What a matrix has to become; None keeps it as it is."""
        if self._quant == "auto":
            return self._to_fp8 if self._fp8 and is_plain and slot not in ("embed", "head") else None
        if self._quant == "q4":  # the vocabulary's matrix decides quality: 8 bits, as on the CPU
            return self._to_q8 if slot in ("embed", "head") else self._to_q4
        if self._quant == "q8":
            return self._to_q8
        return self._to_bf16 if self._quant == "bf16" else self._dense

    def _dense(self, slot: str, numbers: torch.Tensor) -> Matrix:  # noqa: ARG002  one signature for all targets
        return Matrix("dense", numbers.to(self.dtype))

    def _to_bf16(self, slot: str, numbers: torch.Tensor) -> Matrix:
        return self._dense(slot, numbers.bfloat16())  # rounded also where activations are forced to 32 bits

    def _to_fp8(self, slot: str, numbers: torch.Tensor) -> Matrix:  # noqa: ARG002
        return to_fp8(numbers)

    def _to_q4(self, slot: str, numbers: torch.Tensor) -> Matrix:
        _check_groups(slot, numbers, "q4")
        return to_q4(numbers)

    def _to_q8(self, slot: str, numbers: torch.Tensor) -> Matrix:
        _check_groups(slot, numbers, "q8")
        return to_q8(numbers)


def _check_groups(slot: str, numbers: torch.Tensor, quant: str) -> None:
    if numbers.shape[-1] % GROUP:
        raise UnsupportedError(
            f"rows of {numbers.shape[-1]} weights ({slot}) cannot be quantised to {quant} in groups of {GROUP}",
            param="quant",
        )


def _numbers(tensor: Tensor, data: torch.Tensor) -> torch.Tensor:
    """The values of a tensor whatever its format."""
    numbers = plain(data, tensor.format, tensor.shape)
    return expand(unpack(data, tensor.format, tensor.shape), torch.float32) if numbers is None else numbers
