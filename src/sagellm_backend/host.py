"""The machine that we run on, as far as we may use it."""

from __future__ import annotations

import os
from pathlib import Path

from sagellm_backend.base import MemoryInfo

__all__ = ["host_memory", "host_threads"]


def host_memory(root: Path = Path("/")) -> MemoryInfo:
    """Return total and free bytes of main memory; a cgroup's limit (v1 or v2) counts where it is lower.

    Free is what can be had without swapping: page cache that the kernel would give up counts as free.
    """
    total, free = _meminfo(root / "proc/meminfo")
    for limit, used, cache in _cgroups(root):
        total = min(total, limit)
        free = min(free, max(0, limit - max(0, used - cache)))
    return MemoryInfo(total=total, free=free)


def host_threads(root: Path = Path("/")) -> int:
    """Return how many threads can run at once: the CPUs of the affinity mask, fewer where a cgroup (v1 or v2) above us has a quota.

    Part of a CPU counts as one: with a quota of 1.5 it is 2.
    """
    threads = len(os.sched_getaffinity(0))
    for folder, version in _cgroup_folders(root, "cpu"):
        quota, period = _quota(folder, version)
        if quota is not None and period:
            threads = min(threads, -(-quota // period))
    return max(1, threads)


def _quota(folder: Path, version: int) -> tuple[int | None, int | None]:
    """Microseconds of all CPUs together in each period; None where there is no limit."""
    if version == 1:
        return _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    path = folder / "cpu.max"
    words = path.read_text().split() if path.exists() else []
    if len(words) != 2 or not words[0].isdigit():
        return None, None
    return int(words[0]), int(words[1])


def _meminfo(path: Path) -> tuple[int, int]:
    fields = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    return fields["MemTotal"], fields.get("MemAvailable", fields["MemFree"])


_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def _cgroups(root: Path) -> list[tuple[int, int, int]]:
    """(limit, used, reclaimable cache) of every cgroup above this process that has a limit."""
    out = []
    for folder, version in _cgroup_folders(root, "memory"):
        limit_name, used_name, cache_name = _MEMORY_FILES[version]
        limit = _number(folder / limit_name)
        used = _number(folder / used_name)
        if limit is not None and used is not None:
            out.append((limit, used, _stat(folder / "memory.stat", cache_name)))
    return out


def _cgroup_folders(root: Path, controller: str) -> list[tuple[Path, int]]:
    """Every cgroup of this process for a controller, outermost first, and its version."""
    listing = root / "proc/self/cgroup"
    if not listing.exists():
        return []
    out = []
    for line in listing.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, version = root / "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            base, version = root / "sys/fs/cgroup" / controller, 1
        else:
            continue
        folder = base / path.lstrip("/")
        # In a container the path may be the host's: then only the mount's root exists.
        chain = [base, *(p for p in [*reversed(folder.parents), folder] if base in p.parents)]
        out += [(part, version) for part in chain if part.is_dir()]
    return out


def _number(path: Path) -> int | None:
    if not path.exists():
        return None
    text = path.read_text().strip()
    return int(text) if text.isdigit() else None


def _stat(path: Path, name: str) -> int:
    if not path.exists():
        return 0
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
