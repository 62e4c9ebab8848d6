"""An encoder on disk: a directory as sentence-transformers or transformers write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm_backend.encoder import EncoderSpec
from sagellm_core.loader.model import LazyWeights
from sagellm_core.loader.safetensors import load_json, open_safetensors
from sagellm_core.models.bert import MODEL_TYPES, Sentence, encoder_slots, encoder_spec
from sagellm_core.models.views import Config
from sagellm_protocol.errors import ModelFileError

if TYPE_CHECKING:
    from sagellm_backend.tensors import Tensor

__all__ = ["EncoderFiles", "is_encoder", "open_encoder"]

_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}


@dataclass(frozen=True, slots=True)
class EncoderFiles:
    """An open encoder.

    Attributes:
        spec: what to execute.
        weights: slot -> tensor, lazily; views that are in use keep the file mapped.
        file_bytes: size of all weight files.
    """

    path: Path
    spec: EncoderSpec
    weights: Mapping[str, Tensor]
    file_bytes: int


def is_encoder(path: str | Path) -> bool:
    """Whether the model at `path` is an encoder; False for what is no directory with a readable config.json."""
    directory = _directory(Path(path))
    if not (directory / "config.json").is_file():
        return False
    return load_json(directory / "config.json").get("model_type") in MODEL_TYPES


def open_encoder(path: str | Path) -> EncoderFiles:
    """Open a directory with config.json and safetensors.

    Raises:
        ModelFileError: missing, malformed, or not an encoder that is supported.
    """
    place = Path(path)
    directory = _directory(place)
    config = Config(load_json(directory / "config.json"))
    spec = encoder_spec(config, _sentence(directory))
    files = open_safetensors(place)
    stored = {name: info.shape for name, info in files.tensors.items()}
    weights = LazyWeights(encoder_slots(spec, files.tensors.keys()), spec.slots(), stored, files.tensor)
    return EncoderFiles(directory, spec, weights, files.file_bytes)


def _directory(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _sentence(directory: Path) -> Sentence:
    """Read modules.json and what it names; without it: mean pooling, not normalised."""
    modules = _optional(directory / "modules.json")
    if modules is None:
        return Sentence()
    kinds = {str(row.get("type", "")).rpartition(".")[2]: str(row.get("path", "")) for row in modules}
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ModelFileError(f"modules.json names {sorted(unknown)}: Transformer, Pooling and Normalize are supported")
    limits = _optional(directory / "sentence_bert_config.json")
    longest = Config(limits).integer("max_seq_length", 0) if isinstance(limits, dict) else 0
    return Sentence(_pooling(directory / kinds.get("Pooling", "")), "Normalize" in kinds, longest or None)


def _pooling(directory: Path) -> str:
    values = _optional(directory / "config.json")
    if not isinstance(values, dict):
        raise ModelFileError(f"{directory.name}/config.json is missing or no object: fetch the model again")
    if values.get("pooling_mode") in _POOLINGS.values():
        return str(values["pooling_mode"])
    chosen = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise ModelFileError(f"pooling {chosen or 'none'} is not supported: one of {', '.join(_POOLINGS)} is")
    return _POOLINGS[chosen[0]]


def _optional(path: Path) -> Any:
    return _parse(path) if path.is_file() else None


def _parse(path: Path) -> Any:
    import msgspec

    try:
        return msgspec.json.decode(path.read_bytes())
    except msgspec.DecodeError as error:
        raise ModelFileError(f"{path.name} is no JSON ({error}): fetch the model again") from None
