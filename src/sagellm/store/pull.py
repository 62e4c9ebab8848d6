"""Bring a model onto this machine: fetch into staging, hash every file, put it in place by one rename.

An interrupted pull (Ctrl-C, kill -9, a full disk) leaves only staging behind; the next pull of the same model goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sagellm.store import remote
from sagellm.store.catalog import CATALOG
from sagellm.store.layout import MANIFEST, ModelName, StoredModel, find, home, looks_like_path
from sagellm.store.remote import is_remote
from sagellm.store.wheels import fetch_wheels
from sagellm_protocol.errors import InvalidArgumentError, ModelFileError, ModelNotFoundError, ResourceExhaustedError

__all__ = ["Fetched", "Progress", "pull", "unfinished"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all (0 where not known)."""

_CHUNK = 1 << 20
DEFAULTS = "generation_config.json"
_ASKED = "asked"


@dataclass(frozen=True)
class Fetched:
    """What a source left in staging.

    Attributes:
        files: file name in the store -> where it lies now.
        sha256: file name -> what the source says it hashes to; names that are absent are hashed without comparison.
        facts: goes into the manifest (source, licence, kind, …).
    """

    files: dict[str, Path]
    sha256: dict[str, str]
    facts: dict[str, Any]


def pull(
    model: str, *, name: str | None = None, sha256: str | None = None, progress: Progress | None = None
) -> StoredModel:
    """Make `model` available under `name` and return it; nothing is fetched when it is already there.

    Args:
        model: a name of the catalogue, a path to a GGUF file or a directory of safetensors, or a remote name
            (see `sagellm.store.remote`).
        name: what to call it in the store; the default is derived from `model`.
        sha256: what the (only) weight file must hash to.
        progress: told how far it is.

    Raises:
        ModelNotFoundError: nothing of that name can be pulled.
        ModelFileError: what arrived, or is here already, does not hash to what it should.
        InvalidArgumentError: something else has the name, or `sha256` is given for several files.
        ResourceExhaustedError: the disk is full.
        UnavailableError: the index cannot be reached.
    """
    report = progress or (lambda _what, _done, _total: None)
    target = ModelName.parse(name or _default_name(model))
    with _locked(target), _disk_errors(target):
        if (found := find(str(target))) is not None and (is_remote(model) or not looks_like_path(model)):
            _check_same(found, model, sha256)
            if not _lacks_defaults(found):
                return found
        target.staging.mkdir(parents=True, exist_ok=True)
        (target.staging / _ASKED).write_text(model, encoding="utf-8")
        try:
            fetched = _expecting(_fetch(model, target, report), sha256)
            fetched.facts["pulled_as"] = model
            return _commit(target, fetched, report)
        finally:
            if not _parts(target.staging) or find(str(target)) is not None:
                shutil.rmtree(target.staging, ignore_errors=True)


def unfinished() -> dict[str, str]:
    """Return the pulls that were interrupted and can go on: name in the store -> what was asked for."""
    folders = [folder for folder in (home() / "staging").glob("*/*") if _parts(folder)]
    return {f"{folder.parent.name}:{folder.name}": _asked(folder) for folder in folders}


def _asked(folder: Path) -> str:
    note = folder / _ASKED
    return note.read_text(encoding="utf-8") if note.is_file() else f"{folder.parent.name}:{folder.name}"


def _parts(folder: Path) -> list[Path]:
    """Return the files in `folder` that are worth going on from: not the notes about them."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != _ASKED and path.suffix != ".origin"]


def _check_same(found: StoredModel, model: str, sha256: str | None) -> None:
    """Refuse to take what is here for `model` if it is known to be something else."""
    before = found.manifest.get("pulled_as", model)
    if before != model:
        raise InvalidArgumentError(
            f"{found.name} exists: sage-llm rm {found.name} first, or choose another --name (it was pulled as {before})",
            param="name",
        )
    hashes = [facts["sha256"] for name, facts in found.manifest["files"].items() if _is_weights(name)]
    if sha256 is not None and hashes != [sha256.lower()]:
        raise ModelFileError(
            f"{found.name} is here and hashes to {', '.join(hashes)}, {sha256} was expected: check it, or sage-llm rm {found.name}"
        )


def _is_weights(name: str) -> bool:
    return name.endswith((".gguf", ".safetensors"))


def _expecting(fetched: Fetched, sha256: str | None) -> Fetched:
    if sha256 is None:
        return fetched
    weights = [name for name in fetched.files if _is_weights(name)]
    if len(weights) != 1:
        raise InvalidArgumentError(f"--sha256 is of one file, {len(weights)} were fetched: drop it", param="sha256")
    return replace(fetched, sha256={**fetched.sha256, weights[0]: sha256.lower()})


def _default_name(model: str) -> str:
    if is_remote(model):
        return remote.default_name(model)
    if not looks_like_path(model):
        return model
    stem = Path(model).expanduser().resolve().name.removesuffix(".gguf").lower()
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in stem).strip("-._") or "model"


def _fetch(model: str, target: ModelName, report: Progress) -> Fetched:
    if is_remote(model):
        return _fetch_remote(model, target, report)
    if looks_like_path(model):
        return _fetch_local(Path(model).expanduser())
    entry = CATALOG.get(str(ModelName.parse(model)))
    if entry is None:
        raise ModelNotFoundError(
            f"model {model!r} is not in the catalogue: pull one of {', '.join(CATALOG)}, or a path such as ./model.gguf",
            param="model",
        )
    target.staging.mkdir(parents=True, exist_ok=True)
    found = find(str(target))
    if found is not None:  # pulled by a version that did not write the sampling defaults
        folder = target.directory
        files = {name: folder / name for name in found.manifest["files"]}
    else:
        files = fetch_wheels(entry, target.staging, report)
    if entry.sampling:
        files[DEFAULTS] = target.staging / DEFAULTS
        files[DEFAULTS].parent.mkdir(parents=True, exist_ok=True)
        files[DEFAULTS].write_text(
            json.dumps({**entry.sampling, "_source": entry.sampling_source}) + "\n", encoding="utf-8"
        )
    facts = {"source": "index", "requirements": list(entry.requirements), "license": entry.license, "kind": entry.kind}
    return Fetched(files, entry.sha256, facts)


def _lacks_defaults(stored: StoredModel) -> bool:
    entry = CATALOG.get(stored.name)
    return entry is not None and bool(entry.sampling) and DEFAULTS not in stored.manifest["files"]


def _fetch_remote(model: str, target: ModelName, report: Progress) -> Fetched:
    folder = target.staging / "files"
    folder.mkdir(parents=True, exist_ok=True)
    if model.startswith("hf:"):
        return Fetched(*remote.fetch_hub(model, folder, report))
    if model.startswith("ms:"):
        files, facts = remote.fetch_modelscope(model, folder, report)
        return Fetched(files, {}, facts)
    return Fetched(remote.fetch_url(model, folder, report), {}, {"source": model, "license": "", "kind": "llm"})


def _fetch_local(path: Path) -> Fetched:
    if not path.exists():
        raise ModelNotFoundError(f"{path}: no such file or directory: check the path", param="model")
    if path.is_file():
        files = {path.name: path}
    else:
        files = {
            str(f.relative_to(path)): f for f in sorted(path.rglob("*")) if f.is_file() and not f.name.startswith(".")
        }
        if not any(map(_is_weights, files)):
            raise InvalidArgumentError(f"{path} holds no .gguf and no .safetensors file", param="model")
    return Fetched(files, {}, {"source": str(path.resolve()), "license": "", "kind": "llm"})


def _commit(target: ModelName, fetched: Fetched, report: Progress) -> StoredModel:
    """Hash, link into the content store, and publish the model's directory by one rename."""
    blobs = home() / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    view = target.staging / "view"
    shutil.rmtree(view, ignore_errors=True)
    files: dict[str, dict[str, Any]] = {}
    for name, source in fetched.files.items():
        size = source.stat().st_size
        digest = _sha256(source, partial(report, f"verifying {name}"))
        expected = fetched.sha256.get(name, digest)
        if digest != expected:
            source_is_ours = source.is_relative_to(target.staging)
            if source_is_ours:
                source.unlink()  # so that the next pull fetches it again
            raise ModelFileError(
                f"{name} hashes to {digest}, {expected} was expected: pull again; if it stays, the source is damaged"
            )
        _store_blob(source, blobs / digest, move=source.is_relative_to(target.staging))
        (view / name).parent.mkdir(parents=True, exist_ok=True)
        _link(blobs / digest, view / name)
        files[name] = {"sha256": digest, "size": size}
    manifest = {"name": str(target), "pulled_at": int(time.time()), "files": files, **fetched.facts}
    (view / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _publish(view, target.directory)
    found = find(str(target))
    if found is None:
        raise ModelFileError(f"{target} vanished while it was pulled: pull again")
    return found


def _publish(view: Path, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.exists():
        old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
        directory.rename(old)
        view.rename(directory)
        shutil.rmtree(old)
    else:
        view.rename(directory)


def _store_blob(source: Path, blob: Path, *, move: bool) -> None:
    if blob.exists() and blob.stat().st_size == source.stat().st_size:
        return
    if move:
        source.replace(blob)
        return
    fresh = blob.with_name(f"{blob.name}.partial-{os.getpid()}")
    try:
        shutil.copyfile(source, fresh)
        fresh.replace(blob)
    finally:
        fresh.unlink(missing_ok=True)


def _link(blob: Path, path: Path) -> None:
    try:
        os.link(blob, path)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK}:
            raise
        path.symlink_to(blob)  # a file system without hard links


def _sha256(path: Path, report: Callable[[int, int], None]) -> str:
    digest = hashlib.sha256()
    done, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            report(done, size)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(target: ModelName) -> Iterator[None]:
    """Hold the model's lock; a second pull of the same model waits here and then finds it done."""
    target.lock.parent.mkdir(parents=True, exist_ok=True)
    with target.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _disk_errors(target: ModelName) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        free = shutil.disk_usage(home()).free
        raise ResourceExhaustedError(
            f"the disk of {home()} is full ({free / 1e6:.0f} MB free) while pulling {target}: free some space, or set SAGELLM_HOME to "
            "another disk, and pull again: what was fetched so far is kept"
        ) from error
