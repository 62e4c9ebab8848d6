"""How the backend runs, from the environment: what a caller of `Backend` need not know."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["CudaSettings"]

_PREFIX = "SAGELLM_CUDA_"


@dataclass(frozen=True, slots=True)
class CudaSettings:
    """Each field is also an environment variable: ``SAGELLM_CUDA_DEVICE``, ``…_DTYPE`` and so on; booleans are 0 or 1.

    Attributes:
        device: a torch device; ``cpu`` is for tests and for reading along, not for serving.
        dtype: of activations; ``auto`` is f32 for weights in f32, f16 for weights in f16 (where the family bears it), else bf16.
        kernels: ``triton``, plain ``torch``, or ``auto``: Triton on a GPU, torch elsewhere.
        invariant: fix every tile and split, so that a row's bits do not depend on the batch; slower.
        graphs: replay decode steps as CUDA graphs.
        early: launch the kernels of small decode steps while the one before each ends (compute capability 9.0).
        prompts: attention of prompts of some length: torch's own over keys that are gathered first (``sdpa``), or our own over
            the pages (``paged``).
        fp8: keep matrices that the file has in 16 or 32 bits as 8-bit floats (e4m3, one scale a row).
    """

    device: str = "cuda"
    dtype: Literal["auto", "f32", "bf16", "f16"] = "auto"
    kernels: Literal["auto", "triton", "torch"] = "auto"
    invariant: bool = False
    graphs: bool = True
    early: bool = False
    prompts: Literal["sdpa", "paged"] = "sdpa"
    fp8: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def triton(self) -> bool:
        """Whether the kernels are Triton's."""
        return self.kernels == "triton" or (self.kernels == "auto" and self.on_gpu)

    @staticmethod
    def from_environment(environment: Mapping[str, str] | None = None) -> CudaSettings:
        """Return what the environment says.

        Raises:
            InvalidArgumentError: a variable has a value that it cannot have, or is none of ours.
        """
        found = os.environ if environment is None else environment
        hints = get_type_hints(CudaSettings)
        values: dict[str, str | bool] = {}
        for field in fields(CudaSettings):
            variable = _PREFIX + field.name.upper()
            if text := found.get(variable, ""):
                values[field.name] = _value(variable, text, hints[field.name])
        known = {_PREFIX + field.name.upper() for field in fields(CudaSettings)}
        for variable in found:
            if variable.startswith(_PREFIX) and variable not in known:
                raise InvalidArgumentError(
                    f"{variable} is unknown: use one of {', '.join(sorted(known))}", param=variable
                )
        return CudaSettings(**values)  # type: ignore[arg-type]


def _value(variable: str, text: str, hint: object) -> str | bool:
    choices = ("0", "1") if hint is bool else get_args(hint)
    if choices and text not in choices:
        raise InvalidArgumentError(f"{variable} is {text!r}: use one of {', '.join(choices)}", param=variable)
    return text == "1" if hint is bool else text
