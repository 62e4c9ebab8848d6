"""The machine that we run on, as far as we may use it."""

from __future__ import annotations

from pathlib import Path

from sagellm_backend.base import MemoryInfo

__all__ = ["host_memory"]


def host_memory(root: Path = Path("/")) -> MemoryInfo:
    """Return total and free bytes of main memory; a cgroup's limit (v1 or v2) counts where it is lower.

    Free is what can be had without swapping: page cache that the kernel would give up counts as free.
    """
    total, free = _meminfo(root / "proc/meminfo")
    for limit, used, cache in _cgroups(root):
        total = min(total, limit)
        free = min(free, max(0, limit - max(0, used - cache)))
    return MemoryInfo(total=total, free=free)


def _meminfo(path: Path) -> tuple[int, int]:
    fields = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    return fields["MemTotal"], fields.get("MemAvailable", fields["MemFree"])


def _cgroups(root: Path) -> list[tuple[int, int, int]]:
    """(limit, used, reclaimable cache) of every cgroup above this process that has a limit."""
    out = []
    for folder, limit_name, used_name, cache_name in _cgroup_folders(root):
        limit = _number(folder / limit_name)
        used = _number(folder / used_name)
        if limit is not None and used is not None:
            out.append((limit, used, _stat(folder / "memory.stat", cache_name)))
    return out


def _cgroup_folders(root: Path) -> list[tuple[Path, str, str, str]]:
    listing = root / "proc/self/cgroup"
    if not listing.exists():
        return []
    out = []
    for line in listing.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        # In a container the path may be the host's: then only the mount's root exists.
        chain = [base, *(p for p in [*reversed(folder.parents), folder] if base in p.parents)]
        out += [(part, *names) for part in chain if part.is_dir()]
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
