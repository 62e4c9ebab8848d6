"""The store on disk.

::

    <home>/                            $SAGELLM_HOME, else $XDG_CACHE_HOME/isagellm, else ~/.cache/isagellm
      blobs/<sha256>                   content, written once
      models/<family>/<tag>/           one model: plain files (hard links into blobs) and manifest.json
      staging/<family>/<tag>/          a pull in progress; what is there lets an interrupted pull go on
      locks/<family>-<tag>.lock        one pull of a model at a time

A model exists when its directory does: it is put there by one rename after every file was hashed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagellm.store.catalog import CATALOG
from sagellm_protocol.errors import InvalidArgumentError, ModelFileError, ModelNotFoundError

__all__ = [
    "MANIFEST",
    "ModelName",
    "StoredModel",
    "collect_garbage",
    "find",
    "home",
    "installed",
    "looks_like_path",
    "remove",
    "resolve",
]

MANIFEST = "manifest.json"
_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


def home() -> Path:
    """Return the directory that holds everything we keep on this machine; it need not exist yet."""
    if explicit := os.environ.get("SAGELLM_HOME"):
        return Path(explicit).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "isagellm"


@dataclass(frozen=True)
class ModelName:
    """``family:tag``, lower case; both parts are safe as directory names."""

    family: str
    tag: str

    @staticmethod
    def parse(text: str) -> ModelName:
        """Read ``family[:tag]``; the tag defaults to the catalogue's only one of that family, else ``latest``.

        Raises:
            InvalidArgumentError: a character that a name cannot have.
        """
        family, _, tag = text.strip().lower().partition(":")
        if not tag:
            tags = [name.partition(":")[2] for name in CATALOG if name.partition(":")[0] == family]
            tag = tags[0] if len(tags) == 1 else "latest"
        for part in (family, tag):
            if not _PART.fullmatch(part) or ".." in part:
                raise InvalidArgumentError(
                    f"{text!r} is not a model name: use family:tag of letters, digits, '.', '_' and '-', or a path that "
                    "starts with './' or '/'",
                    param="model",
                )
        return ModelName(family, tag)

    @property
    def directory(self) -> Path:
        """Where the model's files are, or would be."""
        return home() / "models" / self.family / self.tag

    @property
    def staging(self) -> Path:
        """Where a pull of the model collects its pieces."""
        return home() / "staging" / self.family / self.tag

    @property
    def lock(self) -> Path:
        """The file that a pull holds locked."""
        return home() / "locks" / f"{self.family}-{self.tag}.lock"

    def __str__(self) -> str:
        return f"{self.family}:{self.tag}"


@dataclass(frozen=True)
class StoredModel:
    """A model on disk.

    Attributes:
        name: as served.
        path: what the loader opens: a GGUF file, or a directory of safetensors.
        size_bytes: of all its files.
        manifest: source, licence, kind, files with hashes; empty for a plain path.
    """

    name: str
    path: Path
    size_bytes: int
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        """``llm`` or ``embedding``."""
        return str(self.manifest.get("kind", "llm"))


def _load(directory: Path) -> StoredModel:
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    files: dict[str, dict[str, Any]] = manifest["files"]
    weights = [name for name in files if name.endswith(".gguf")]
    path = directory / weights[0] if len(weights) == 1 else directory
    for name, facts in files.items():
        size = (directory / name).stat().st_size if (directory / name).is_file() else -1
        if size != facts["size"]:
            raise ModelFileError(
                f"{manifest['name']}: {name} has {size} bytes, {facts['size']} were pulled: "
                f"sage-llm rm {manifest['name']} && sage-llm pull {manifest['name']}"
            )
    return StoredModel(manifest["name"], path, sum(f["size"] for f in files.values()), manifest)


def find(name: str) -> StoredModel | None:
    """Return the stored model of that name, or None if it was never pulled.

    Raises:
        InvalidArgumentError: not a model name.
        ModelFileError: a file of it is gone or has another size than was pulled.
    """
    directory = ModelName.parse(name).directory
    return _load(directory) if (directory / MANIFEST).is_file() else None


def resolve(model: str) -> StoredModel:
    """Return what `model` names: a path to a file or directory, or a stored model.

    Raises:
        ModelNotFoundError: neither; the message says how to get it.
        ModelFileError: the stored model is damaged.
    """
    path = Path(model).expanduser()
    if looks_like_path(model) or path.is_file():
        if not path.exists():
            raise ModelNotFoundError(
                f"{model}: no such file or directory: check the path, or pull a model by name", param="model"
            )
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size
        return StoredModel(path.stem if path.is_file() else path.resolve().name, path.resolve(), size, {})
    if found := find(model):
        return found
    name = ModelName.parse(model)
    if str(name) in CATALOG:
        cure = f"sage-llm pull {name}"
    else:
        cure = f"pull one of {', '.join(CATALOG)}, or give a path such as ./model.gguf"
    raise ModelNotFoundError(f"model {model!r} is not on this machine: {cure}", param="model")


def looks_like_path(model: str) -> bool:
    """Whether `model` is meant as a path: it starts like one, or names a weight file."""
    return model.startswith(("./", "../", "/", "~")) or model.endswith((".gguf", ".safetensors"))


def installed() -> list[StoredModel]:
    """Return every stored model, by name; one that is damaged is left out (`find` says what is wrong with it)."""
    return sorted(_each(), key=lambda model: model.name)


def _each() -> Iterator[StoredModel]:
    for manifest in (home() / "models").glob(f"*/*/{MANIFEST}"):
        with contextlib.suppress(ModelFileError, ValueError, KeyError):
            yield _load(manifest.parent)


def remove(name: str) -> int:
    """Delete a stored model and the content that no other model uses; return the bytes freed.

    Raises:
        ModelNotFoundError: it is not stored.
    """
    directory = ModelName.parse(name).directory
    if not directory.is_dir():
        raise ModelNotFoundError(f"model {name!r} is not on this machine: sage-llm list shows what is", param="model")
    doomed = directory.with_name(f".{directory.name}.removed-{os.getpid()}")
    directory.rename(doomed)  # gone in one step, whatever happens to the deletion
    shutil.rmtree(doomed)
    return collect_garbage()


def copy(source: str, destination: str) -> StoredModel:
    """Give a stored model a second name; the content is shared.

    Raises:
        ModelNotFoundError: `source` is not stored.
        InvalidArgumentError: `destination` is no name, or taken.
    """
    found = find(source)
    if found is None:
        raise ModelNotFoundError(
            f"model {source!r} is not on this machine: sage-llm list shows what is", param="source"
        )
    target = ModelName.parse(destination)
    if target.directory.exists():
        raise InvalidArgumentError(f"{target} exists: sage-llm rm {target} first", param="destination")
    fresh = target.directory.with_name(f".{target.directory.name}.copy-{os.getpid()}")
    shutil.copytree(ModelName.parse(source).directory, fresh, copy_function=os.link)
    manifest = {**found.manifest, "name": str(target)}
    (fresh / MANIFEST).unlink()
    (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    fresh.rename(target.directory)
    return _load(target.directory)


def collect_garbage() -> int:
    """Delete blobs that no model refers to; return the bytes freed."""
    used = {
        facts["sha256"]
        for manifest in (home() / "models").glob(f"*/*/{MANIFEST}")
        for facts in json.loads(manifest.read_text(encoding="utf-8"))["files"].values()
    }
    freed = 0
    for blob in (home() / "blobs").glob("*"):
        if blob.name not in used:
            freed += blob.stat().st_size
            blob.unlink()
    return freed
