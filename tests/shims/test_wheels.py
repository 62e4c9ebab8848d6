"""Built wheels of isagellm and of both shims, in clean environments."""

import itertools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sagellm._version import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = {"isagellm": ROOT, "core": ROOT / "shims/isage-llm-core", "gateway": ROOT / "shims/isage-llm-gateway"}
THREE = """
import warnings
warnings.simplefilter("ignore")
from sage.llm import UnifiedInferenceClient
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.gateway.server import create_app
import sagellm, sagellm_control_plane.manager, sagellm_gateway.server
assert UnifiedInferenceClient is sagellm.UnifiedInferenceClient
assert ControlPlaneManager is sagellm_control_plane.manager.ControlPlaneManager
assert create_app is sagellm_gateway.server.create_app
import sagellm_control
assert sagellm_control.ControlPlaneManager is ControlPlaneManager
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run(*argv: object) -> None:
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for project in PROJECTS.values():
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, project)
    return folder


def wheel_of(folder: Path, name: str) -> Path:
    prefix = {"isagellm": "isagellm-", "core": "isage_llm_core-", "gateway": "isage_llm_gateway-"}[name]
    return next(folder.glob(f"{prefix}*.whl"))


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_all_three_install_in_every_order(wheels, tmp_path, tool):
    """Whatever comes first, the three old imports give the new objects, and uninstalling a shim leaves the others whole."""
    if tool == "uv" and shutil.which("uv") is None:
        pytest.skip("uv is not on the path")
    env = tmp_path / "env"
    run(sys.executable, "-m", "venv", env)
    python = env / "bin" / "python"
    install = (
        [python, "-m", "pip", "install", "-q"] if tool == "pip" else ["uv", "pip", "install", "-q", "--python", python]
    )
    remove = (
        [python, "-m", "pip", "uninstall", "-q", "-y"]
        if tool == "pip"
        else ["uv", "pip", "uninstall", "-q", "--python", python]
    )
    run(*install, f"{wheel_of(wheels, 'isagellm')}[gateway,migrate]")
    for order in itertools.permutations(PROJECTS):
        run(*remove, "isagellm", "isage-llm-core", "isage-llm-gateway")
        for name in order:
            run(*install, "--no-deps", wheel_of(wheels, name))
        run(python, "-c", THREE)
    run(*remove, "isage-llm-gateway")
    run(python, "-W", "ignore", "-c", "from sage.llm import UnifiedInferenceClient")
    run(python, "-c", "import importlib.util as u; assert u.find_spec('sage.llm.gateway') is None")


OLD = {
    "isagellm": ("0.5.4.70", ["sagellm/__init__.py", "sagellm/cli.py"]),
    "isagellm-core": ("0.5.4.26", ["sagellm_core/__init__.py", "sagellm_core/engine.py", "sagellm_core/llm_engine.py"]),
    "isagellm-gateway": ("0.5.4.14", ["sagellm_gateway/__init__.py", "sagellm_gateway/rate_limit.py"]),
    "isagellm-kv-cache": ("0.5.4.15", ["sagellm_kv_cache/__init__.py"]),
}


def old_wheel(folder: Path, name: str) -> Path:
    """A wheel with the files of a release before this one, which fail when they are imported."""
    version, files = OLD[name]
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    members = dict.fromkeys(files, "raise RuntimeError('an old module')\n") | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    members[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*members, f"{info}/RECORD"])
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in members.items():
            wheel.writestr(member, text)
    return path


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_the_cure_of_an_upgrade_works_as_printed(wheels, tmp_path, tool):
    """Over wheels of 0.5 this release is mixed: doctor prints a command which, pasted, leaves this release whole and none of theirs."""
    env = tmp_path / "env"
    python = env / "bin" / "python"
    if tool == "uv":
        if shutil.which("uv") is None:
            pytest.skip("uv is not on the path")
        run("uv", "venv", "-q", "--python", sys.executable, env)
        install = ["uv", "pip", "install", "-q", "--python", python]
    else:
        run(sys.executable, "-m", "venv", env)
        install = [python, "-m", "pip", "install", "-q"]
    run(*install, *(old_wheel(tmp_path, name) for name in OLD))
    run(*install, wheel_of(wheels, "isagellm"))
    program = env / "bin" / "sage-llm"
    said = subprocess.run([program, "doctor"], capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert "isagellm-core 0.5.4.26, isagellm-gateway 0.5.4.14" in said.stderr
    run("sh", "-c", said.stderr.splitlines()[-1])
    run(program, "version")
    run(program, "doctor", "--offline")
    site = next((env / "lib").glob("python*/site-packages"))
    left = [name for _, files in OLD.values() for name in files if "an old module" in _read(site / name)]
    assert left == []
    assert sorted(path.name for path in site.glob("*sage*.dist-info")) == [f"isagellm-{__version__}.dist-info"]


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
