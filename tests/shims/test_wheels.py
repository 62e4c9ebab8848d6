"""Built wheels of isagellm and of both shims, in clean environments."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
