"""A model on disk, whatever its format: spec, lazily viewed weights, size."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sagellm_backend.spec import DecoderSpec
from sagellm_core.loader.gguf import GGUFHeader, read_header
from sagellm_core.loader.safetensors import load_json, open_safetensors
from sagellm_core.models.base import Slots, Source, check_spec
from sagellm_core.models.registry import family_of_gguf, family_of_hf
from sagellm_core.models.views import Config, Metadata
from sagellm_protocol.errors import ModelFileError

if TYPE_CHECKING:
    from sagellm_backend.tensors import Tensor

__all__ = ["LazyWeights", "ModelFiles", "open_model"]

_GGUF_SUFFIX = ".gguf"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MAX_PARTS = 1000


class LazyWeights(Mapping[str, "Tensor"]):
    """Slot -> tensor. Names and shapes are checked when it is made, bytes are viewed when a slot is asked for.

    `identity` names the files and their state (path, size, time of change); empty where there are none.
    """

    identity: str = ""

    def __init__(
        self,
        slots: Slots,
        shapes: Mapping[str, tuple[int, ...]],
        stored: Mapping[str, tuple[int, ...]],
        view: Callable[[str], Tensor],
    ) -> None:
        """Check `slots` against the shapes that the spec wants and those that the file has.

        Raises:
            ModelFileError: a tensor is missing or has another shape.
        """
        self._slots, self._view = slots, view
        for slot, want in shapes.items():
            have = _stored_shape(slot, slots[slot], stored)
            if have != want:
                raise ModelFileError(
                    f"tensor {slots[slot].names[0]!r} has the shape {have}, the metadata says {want}: the file is malformed"
                )

    def __getitem__(self, slot: str) -> Tensor:
        source = self._slots[slot]
        parts = [self._view(name) for name in source.names]
        tensor = _stack(parts) if len(parts) > 1 else parts[0]
        if source.rows is not None:
            tensor = _rows(tensor, *source.rows)
        return _plus_one(tensor) if source.plus_one else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


@dataclass(slots=True)
class ModelFiles:
    """An open model. Closing lets go of the files; views that are still in use keep them mapped.

    Attributes:
        spec: what to execute.
        weights: slot -> tensor, lazily.
        quantization: format that most weights are stored in, e.g. ``Q4_1``.
        file_bytes: size of all weight files.
        metadata: GGUF metadata, or the content of config.json.
    """

    path: Path
    spec: DecoderSpec
    weights: Mapping[str, Tensor]
    quantization: str
    file_bytes: int
    metadata: Mapping[str, Any] = field(repr=False)

    def close(self) -> None:
        """Let go of the files. Idempotent."""
        self.weights = {}
        self.metadata = {}

    def __enter__(self) -> ModelFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_model(path: str | Path, *, context_length: int | None = None) -> ModelFiles:
    """Open a .gguf file, a .safetensors file with config.json beside it, or a directory with config.json and its shards.

    Args:
        path: where the model lies.
        context_length: positions that are wanted; only longrope models choose their rotation by it.

    Raises:
        ModelFileError: missing, malformed, or of an architecture that is not supported.
    """
    place = Path(path)
    if place.is_dir():
        files = sorted(place.glob(f"*{_GGUF_SUFFIX}"))
        if files and not (place / "config.json").is_file():
            if len(files) > 1:
                raise ModelFileError(f"{place} holds {len(files)} .gguf files: pass one of them")
            return _open_gguf(files[0], context_length)
        return _open_hf(place, place, context_length)
    if place.suffix == ".safetensors":
        return _open_hf(place.parent, place, context_length)
    return _open_gguf(place, context_length)


def _open_gguf(path: Path, context_length: int | None) -> ModelFiles:
    parts = _parts(path)
    home = {name: header for header in parts for name in header.tensors}
    if len(home) != sum(len(header.tensors) for header in parts):
        raise ModelFileError(f"a tensor stands in two parts of {path.name}: fetch the parts again")
    stored = {name: header.tensors[name].shape for name, header in home.items()}
    meta = Metadata(parts[0].metadata, stored, lambda name: home[name].vector(name), context_length)
    family = family_of_gguf(meta.architecture)
    spec = family.gguf_spec(meta)
    check_spec(spec)
    weights = LazyWeights(family.gguf_slots(spec), spec.slots(), stored, lambda name: home[name].tensor(name))
    weights.identity = _identity([header.path for header in parts])
    formats = {n: (h.tensors[n].format, h.tensors[n].nbytes) for n, h in home.items()}
    size = sum(header.file_bytes for header in parts)
    return ModelFiles(path, spec, weights, _main_format(formats), size, parts[0].metadata)


def _parts(path: Path) -> list[GGUFHeader]:
    """Headers of all parts of a split file (``…-00001-of-00003.gguf``), in order; of the file itself if it is whole."""
    header = read_header(path)
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return [header]
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count or count > _MAX_PARTS:
        raise ModelFileError(
            f"{path.name} is one of {count} parts of a split file, but not named like one: name them "
            "NAME-00001-of-000NN.gguf, or merge them with llama-gguf-split"
        )
    return [read_header(path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf")) for i in range(1, count + 1)]


def _open_hf(directory: Path, path: Path, context_length: int | None) -> ModelFiles:
    values = load_json(directory / "config.json")
    files = open_safetensors(path)
    config = Config(values, files.tensors.keys(), context_length)
    text = config.table("text_config")
    if text is not None:
        config = text
    family = family_of_hf(config.text("model_type"))
    spec = family.hf_spec(config)
    check_spec(spec)
    stored = {name: info.shape for name, info in files.tensors.items()}
    weights = LazyWeights(family.hf_slots(spec, files.tensors.keys()), spec.slots(), stored, files.tensor)
    weights.identity = _identity([path] if path.is_file() else sorted(path.glob("*.safetensors")))
    formats = {name: (info.format, info.nbytes) for name, info in files.tensors.items()}
    return ModelFiles(path, spec, weights, _main_format(formats), files.file_bytes, values)


def _identity(files: list[Path]) -> str:
    """Which files these are, as a backend's cache of converted weights tells them apart."""
    stats = [(str(file.resolve()), file.stat()) for file in files]
    return "\n".join(f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}\t{stat.st_ino}" for name, stat in stats)


def _main_format(tensors: Mapping[str, tuple[str, int]]) -> str:
    """Format of most bytes, the embedding and the head left out: files often keep these in more bits."""
    size: Counter[str] = Counter()
    for name, (form, nbytes) in tensors.items():
        outer = any(part in name for part in ("token_embd", "output.weight", "embed_tokens", "lm_head"))
        size[form] += 0 if outer else nbytes
    return size.most_common(1)[0][0] if size else ""


def _stored_shape(slot: str, source: Source, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    missing = [name for name in source.names if name not in stored]
    if missing:
        raise ModelFileError(
            f"tensor {missing[0]!r} (slot {slot}) is missing in the file: it is incomplete; fetch it again"
        )
    shapes = {stored[name] for name in source.names}
    if len(shapes) > 1:
        raise ModelFileError(f"tensors of slot {slot} differ in shape: {sorted(shapes)}; the file is malformed")
    shape = shapes.pop()
    if source.rows is not None:
        start, stop = source.rows
        if stop > shape[0]:
            raise ModelFileError(
                f"tensor {source.names[0]!r} has {shape[0]} rows, {stop} are needed for slot {slot}: the file is malformed"
            )
        shape = (stop - start, *shape[1:])
    return (len(source.names), *shape) if len(source.names) > 1 else shape


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    from sagellm_backend.tensors import Tensor

    row_bytes = tensor.data.size // tensor.shape[0]
    data = tensor.data[start * row_bytes : stop * row_bytes]
    return Tensor((stop - start, *tensor.shape[1:]), tensor.format, data)


def _stack(parts: Collection[Tensor]) -> Tensor:
    import numpy as np

    from sagellm_backend.tensors import Tensor

    first = next(iter(parts))
    if any(part.format is not first.format for part in parts):
        raise ModelFileError(f"experts of one layer differ in format: {sorted({p.format.name for p in parts})}")
    return Tensor((len(parts), *first.shape), first.format, np.concatenate([part.data for part in parts]))


def _plus_one(tensor: Tensor) -> Tensor:
    import numpy as np

    from sagellm_backend.quant import dequantize
    from sagellm_backend.tensors import Tensor

    return Tensor.of(dequantize(tensor) + np.float32(1.0))
