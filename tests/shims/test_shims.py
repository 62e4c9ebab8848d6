"""The old import paths, as a user's process sees them: each test starts a fresh interpreter."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from sagellm.migrate.table import MODULES, NAMES

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "shims/isage-llm-core/src"
GATEWAY = ROOT / "shims/isage-llm-gateway/src"


def python(code: str, *path: Path, mode: str | None = None, flags: tuple[str, ...] = ("-Walways",)):
    env = {k: v for k, v in os.environ.items() if k != "SAGELLM_DEPRECATIONS"}
    env["PYTHONPATH"] = os.pathsep.join(str(p) for p in (*path, ROOT / "src"))
    if mode:
        env["SAGELLM_DEPRECATIONS"] = mode
    return subprocess.run([sys.executable, *flags, "-c", code], env=env, capture_output=True, text=True, check=False)


THREE = """
from sage.llm import UnifiedInferenceClient
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.gateway.server import create_app
import sagellm, sagellm_control_plane.manager, sagellm_gateway.server
assert UnifiedInferenceClient is sagellm.UnifiedInferenceClient
assert ControlPlaneManager is sagellm_control_plane.manager.ControlPlaneManager
assert create_app is sagellm_gateway.server.create_app
"""


def test_the_three_old_imports_give_the_new_objects():
    """`old is new` for the client, the manager and the app, and each old module warns exactly once."""
    done = python(THREE + THREE, CORE, GATEWAY)
    assert done.returncode == 0, done.stderr
    warned = [
        line.split(": DeprecationWarning: ")[1].split(" ")[0]
        for line in done.stderr.splitlines()
        if "Deprecation" in line
    ]
    assert sorted(warned) == [
        "sage.llm",
        "sage.llm.control_plane",
        "sage.llm.control_plane.manager",
        "sage.llm.gateway",
        "sage.llm.gateway.server",
    ]


def test_the_warning_stands_at_the_line_that_imports(tmp_path):
    """The warning names the importing file and line, the new path and the removal version."""
    (tmp_path / "caller.py").write_text("import os\n\nimport sage.llm.unified_client\n")
    done = python("import caller", CORE, tmp_path)
    lines = [line for line in done.stderr.splitlines() if "sage.llm.unified_client is" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{tmp_path / 'caller.py'}:3: DeprecationWarning")
    assert "sagellm.client" in lines[0]
    assert "1.0" in lines[0]


@pytest.mark.parametrize(
    ("mode", "code", "text"), [("silent", 0, ""), ("error", 1, "DeprecationWarning: sage.llm is deprecated")]
)
def test_the_switch_silences_or_raises(mode, code, text):
    """SAGELLM_DEPRECATIONS=silent says nothing; =error makes the import fail."""
    done = python("import sage.llm", CORE, mode=mode)
    assert done.returncode == code
    assert text in done.stderr
    assert bool(done.stderr) == bool(text)


@pytest.mark.parametrize(
    ("statement", "hint"),
    [
        ("import sage.llm.control_plane.parallelism", "sage-llm serve"),
        ("from sage.llm.engines import VLLMEngine", "UnifiedInferenceClient"),
        ("from sage.llm.control_plane.engine_lifecycle import EngineLifecycleManager", "request_engine_startup"),
    ],
)
def test_a_name_without_successor_says_what_to_use(statement, hint):
    """The ImportError names the replacement."""
    done = python(statement, CORE, mode="silent")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert hint in last


def test_an_unknown_name_is_an_import_error():
    """A name that no version had fails as in any module."""
    done = python("from sage.llm import Nothing", CORE, mode="silent")
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: cannot import name 'Nothing'")


def test_patching_an_old_path_reaches_the_new_module():
    """mock.patch on an old path replaces the real attribute and puts it back."""
    code = """
from unittest import mock
import sagellm_gateway.server as new
real = new.create_app
with mock.patch("sage.llm.gateway.server.create_app", 1):
    assert new.create_app == 1
assert new.create_app is real
"""
    done = python(code, CORE, GATEWAY, mode="silent")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layout", ["namespace", "pkgutil"])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_the_namespace_merges_with_another_sage(tmp_path, layout, first):
    """A `sage` package from elsewhere, with or without __init__.py, and ours are importable together in any order."""
    other = tmp_path / "sage" / "kernel"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("here = True\n")
    if layout == "pkgutil":
        (tmp_path / "sage" / "__init__.py").write_text(
            '__path__ = __import__("pkgutil").extend_path(__path__, __name__)\n'
        )
    path = (CORE, GATEWAY, tmp_path) if first == "ours" else (tmp_path, GATEWAY, CORE)
    done = python("import sage.kernel\nassert sage.kernel.here\n" + THREE, *path, mode="silent")
    assert done.returncode == 0, done.stderr


def test_the_alias_package_of_the_control_plane():
    """`sagellm_control` of isagellm 0.1 - 0.5 gives the objects of `sagellm_control_plane`."""
    code = """
from sagellm_control import ControlPlaneManager, EngineInfo
from sagellm_control.manager import ControlPlaneManager as M
import sagellm_control_plane.manager as new, sagellm_control_plane.types as types
assert ControlPlaneManager is M is new.ControlPlaneManager
assert EngineInfo is types.EngineInfo
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("DeprecationWarning: sagellm_control is") == 1


@pytest.mark.parametrize("old", sorted(MODULES))
def test_every_old_module_imports_and_has_the_new_names(old):
    """Each name that a successor exports is the same object through the old module."""
    code = f"""
import importlib
old, new = importlib.import_module({old!r}), importlib.import_module({MODULES[old]!r})
names = [n for n in getattr(new, "__all__", []) if not n.startswith("_")]
for name in names:
    try:
        there = getattr(new, name)
    except ImportError:
        continue
    assert getattr(old, name) is there, name
"""
    done = python(code, CORE, GATEWAY, mode="silent")
    assert done.returncode == 0, done.stderr


def test_every_name_that_moved_is_the_same_object():
    """Each row of the guide's table of moved names: `old is new`."""
    code = f"""
import importlib
for (old, name), (new, new_name) in {NAMES!r}.items():
    there = getattr(importlib.import_module(new), new_name)
    assert getattr(importlib.import_module(old), name) is there, (old, name)
"""
    done = python(code, CORE, GATEWAY, mode="silent")
    assert done.returncode == 0, done.stderr


def test_the_old_console_script_serves(tmp_path):
    """`sage-llm-gateway` with its old variables starts the gateway on the old port, and warns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (CORE, GATEWAY, ROOT / "src"))),
        "SAGE_GATEWAY_PORT": str(port),
        "SAGELLM_STATE": str(tmp_path / "state.db"),
    }
    errors = tmp_path / "errors"
    with errors.open("w") as stream:
        argv = [sys.executable, "-Walways", "-m", "sage.llm.gateway"]
        process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=stream)
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/live", timeout=5) as answer:
                    assert answer.status == 200
                    break
            except urllib.error.URLError:
                assert process.poll() is None, errors.read_text()
                time.sleep(0.1)
    finally:
        process.terminate()
        assert process.wait(30) == 0, errors.read_text()
    assert "SAGE_GATEWAY_PORT is deprecated" in errors.read_text()
    assert "sage-llm-gateway is deprecated" in errors.read_text()
