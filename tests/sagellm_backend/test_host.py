"""What of the machine is ours: memory and processor time, as the kernel and the cgroups above us say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sagellm_backend.host import host_memory, host_threads


def fake_root(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 600 kB\n"


def test_memory_without_cgroups(tmp_path: Path) -> None:
    """Without a cgroup limit, memory is the kernel's total and available."""
    memory = host_memory(fake_root(tmp_path, {"proc/meminfo": MEMINFO}))
    assert (memory.total, memory.free) == (1000 * 1024, 600 * 1024)


def test_memory_of_cgroup_v2(tmp_path: Path) -> None:
    """The lowest limit of the chain of v2 cgroups counts, page cache that can be dropped is free."""
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "409600\n",
        "sys/fs/cgroup/a/memory.current": "204800\n",
        "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 102400\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "1\n",
    }
    memory = host_memory(fake_root(tmp_path, files))
    assert (memory.total, memory.free) == (409600, 307200)


def test_memory_of_cgroup_v1(tmp_path: Path) -> None:
    """The limit of a v1 memory controller counts, also where the path is the host's and only the mount exists."""
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:cpu:/x\n3:memory:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "512000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
    }
    memory = host_memory(fake_root(tmp_path, files))
    assert (memory.total, memory.free) == (512000, 12000)


def test_memory_of_this_machine() -> None:
    """On the machine at hand, some memory is free."""
    memory = host_memory()
    assert 0 < memory.free <= memory.total


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n",
            },
            2,
        ),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "1000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "9900000 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
    ids=["none", "v2 max", "v2 root", "v2 lowest", "v2 part", "v2 plenty", "v1", "v1 unlimited"],
)
def test_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], threads: int) -> None:
    """There are as many threads as CPUs of the affinity mask, fewer where a cgroup above us has a smaller quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert host_threads(fake_root(tmp_path, files)) == threads


def test_threads_of_this_machine() -> None:
    """On the machine at hand there is one at least, and no more than the affinity mask has."""
    assert 1 <= host_threads() <= len(os.sched_getaffinity(0))
