"""A LoRA adapter on disk, as PEFT writes it: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm_backend.adapter import ADAPTED, Adapter, check_adapter
from sagellm_backend.spec import DecoderSpec
from sagellm_core.loader.safetensors import SafetensorsFile, load_json, open_safetensors
from sagellm_core.models.base import Family, Source
from sagellm_core.models.registry import FAMILIES
from sagellm_core.models.views import Config
from sagellm_protocol.errors import ModelFileError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Float32 = npt.NDArray[np.float32]

__all__ = ["open_adapter"]

_FACTOR = re.compile(r"(?P<module>.*)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight")
_REFUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
}
"""Keys of adapter_config.json with the values that change nothing; with others the adapter would be more than B·A."""


def open_adapter(path: str | Path, name: str, spec: DecoderSpec) -> Adapter:
    """Read a PEFT directory for the model that `spec` describes.

    The factors come under the slots of `spec`: fused projections are cut, and rows of Q and K are permuted where the model's
    file has them interleaved (GGUF of the llama family).

    Raises:
        ModelFileError: missing, malformed, for another model, or of a kind other than plain LoRA.
    """
    directory = Path(path)
    config = Config(load_json(directory / "adapter_config.json"))
    _check_kind(config)
    file = open_safetensors(directory / "adapter_model.safetensors")
    modules = _modules(file)
    factors: dict[str, tuple[Float32, Float32]] = {}
    used: set[str] = set()
    for slot, source in _sources(spec, modules).items():
        module = _key(source.names[0].removesuffix(".weight"))
        if module in modules:
            used.add(module)
            factors[slot] = _factors(slot, source, spec, _read(file, modules[module]), _scale(config, modules[module]))
    left = sorted(set(modules) - used)
    if left or not factors:
        raise ModelFileError(
            f"adapter {name!r} changes {left[0] if left else 'nothing'}, which cannot be adapted in a {spec.architecture} "
            f"model here: {', '.join(ADAPTED)} of its layers can be"
        )
    adapter = Adapter(name, factors)
    try:
        check_adapter(spec, adapter)
    except ValueError as error:
        raise ModelFileError(f"the adapter is for another model: {error}") from error
    return adapter


def _check_kind(config: Config) -> None:
    kind = config.text("peft_type")
    if kind != "LORA":
        raise ModelFileError(f"the adapter is of the kind {kind!r}: LORA is supported")
    for key, harmless in _REFUSED.items():
        value = config.values.get(key)
        if value not in harmless:
            raise ModelFileError(
                f"adapter_config.json has {key} = {value!r}, which is not supported: retrain without it"
            )


def _key(module: str) -> str:
    """A module's name from ``layers.`` on: what stands before it differs between wrappers of the same model."""
    at = module.find("layers.")
    return module[at:] if at >= 0 else module


def _modules(file: SafetensorsFile) -> dict[str, dict[str, str]]:
    """Module -> names of its factors A and B."""
    out: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise ModelFileError(f"tensor {name!r} is no factor of a LoRA adapter: it is not supported")
        out.setdefault(_key(match["module"]), {})[match["side"]] = name
    for module, sides in out.items():
        if set(sides) != {"A", "B"}:
            raise ModelFileError(f"{module} has only one of the factors A and B: the file is incomplete")
    return out


def _sources(spec: DecoderSpec, modules: Mapping[str, object]) -> dict[str, Source]:
    """Slot -> where transformers keeps it, of the slots that can be adapted."""
    family = _family(spec)
    sources = family.hf_slots(spec, [f"model.{module}.weight" for module in modules])
    return {slot: source for slot, source in sources.items() if slot.partition(".")[2] in ADAPTED}


def _family(spec: DecoderSpec) -> Family:
    for family in FAMILIES:
        if spec.architecture in (*family.hf, *family.gguf):
            return family
    raise ModelFileError(f"models of the kind {spec.architecture!r} take no adapters here")


def _read(file: SafetensorsFile, names: dict[str, str]) -> tuple[Float32, Float32]:
    from sagellm_backend.quant import dequantize

    a, b = (dequantize(file.tensor(names[side])) for side in "AB")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise ModelFileError(
            f"{names['A']} and {names['B']} have the shapes {a.shape} and {b.shape}: they do not multiply"
        )
    return a, b


def _scale(config: Config, names: dict[str, str]) -> float:
    """lora_alpha over the rank (Hu et al., 2021), or over its root (Kalajdzievski, 2023); patterns name exceptions."""
    module = names["A"].partition(".lora_A")[0]
    rank = _patterned(config, "rank_pattern", module, config.number("r"))
    alpha = _patterned(config, "alpha_pattern", module, config.number("lora_alpha"))
    if rank < 1:
        raise ModelFileError(f"the adapter's rank is {rank:g}: the file is malformed")
    return alpha / (math.sqrt(rank) if config.flag("use_rslora", False) else rank)


def _patterned(config: Config, key: str, module: str, default: float) -> float:
    table = config.table(key)
    for pattern in table.values if table is not None else ():
        # PEFT matches a pattern against the end of the module's name, as a regular expression; names are enough here.
        if module.endswith(f".{pattern.lstrip('^').replace(chr(92), '')}") and table is not None:
            return table.number(pattern)
    return default


def _factors(
    slot: str, source: Source, spec: DecoderSpec, pair: tuple[Float32, Float32], scale: float
) -> tuple[Float32, Float32]:
    import numpy as np

    a, b = pair
    if source.rows is not None:
        b = b[slice(*source.rows)]
    leaf = slot.partition(".")[2]
    if leaf in ("q", "k") and spec.rope.layout == "interleaved":
        heads = spec.n_heads if leaf == "q" else spec.n_kv_heads
        if b.shape[0] == heads * spec.head_dim:
            b = b.reshape(heads, spec.head_dim, -1)[:, _interleaved(spec)].reshape(b.shape)
    return a, np.ascontiguousarray(b * np.float32(scale))


def _interleaved(spec: DecoderSpec) -> list[int]:
    """For each row of a head as GGUF orders them, its row as transformers does."""
    half = spec.rope.dim // 2
    pairs = [row for i in range(half) for row in (i, i + half)]
    return [*pairs, *range(spec.rope.dim, spec.head_dim)]
