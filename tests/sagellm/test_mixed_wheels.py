import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sagellm._version import __version__
from sagellm.mixed_wheels import cure, old_distributions


def test_old_distributions_are_found_by_their_folders(tmp_path: Path) -> None:
    """Wheels of 0.1 - 0.5 and of the old packages count; this release, its shims and other people's packages do not."""
    for name in (
        "isagellm_core-0.5.4.26",
        "isagellm_control_plane-0.5.4.14",
        "isage_llm_core-0.2.0",
        f"isage_llm_gateway-{__version__}",
        f"isagellm-{__version__}",
        "isagellm_plugin-1.0",
    ):
        (tmp_path / f"{name}.dist-info").mkdir()
    assert old_distributions([str(tmp_path), str(tmp_path / "nowhere")]) == [
        "isage-llm-core 0.2.0",
        "isagellm-control-plane 0.5.4.14",
        "isagellm-core 0.5.4.26",
    ]


def test_the_cure_takes_the_companions_along_and_installs_the_version(tmp_path: Path) -> None:
    """What needs the old wheels goes with them; the release that comes back is named, so that no index can answer with an older one."""
    (tmp_path / "isagellm_kv_cache-0.5.4.15.dist-info").mkdir()
    remove, install = cure(["isagellm-core 0.5.4.26"], [str(tmp_path)]).split(" && ")
    assert remove == f"{sys.executable} -m pip uninstall -y isagellm isagellm-core isagellm-kv-cache"
    assert install == f"{sys.executable} -m pip install 'isagellm=={__version__}'"


@pytest.mark.parametrize(("editable", "flag"), [(False, []), (True, ["-e"])])
def test_the_cure_installs_from_where_this_release_came(tmp_path: Path, editable: bool, flag: list[str]) -> None:
    """A wheel or a source tree is not on an index: what was installed from a path is installed from it again, while it is there."""
    source = tmp_path / "a folder" / "isagellm.whl"
    source.parent.mkdir()
    source.touch()
    record = tmp_path / f"isagellm-{__version__}.dist-info" / "direct_url.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"url": source.as_uri(), "dir_info": {"editable": editable}}))
    install = shlex.split(cure(["isagellm-core 0.5.4.26"], [str(tmp_path)]).split(" && ")[1])
    assert install[-1] == str(source)
    assert install[4:-1] == flag
    source.unlink()
    assert cure([], [str(tmp_path)]).endswith(f"'isagellm=={__version__}'")


def test_without_pip_the_cure_is_of_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment made by uv has no pip: there the command is one of uv, for this interpreter."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    remove, install = cure(["isagellm-core 0.5.4.26"], []).split(" && ")
    assert remove == f"uv pip uninstall --python {sys.executable} isagellm isagellm-core"
    assert install.startswith(f"uv pip install --python {sys.executable} ")


def test_every_command_prints_the_cure_on_a_mixed_machine(tmp_path: Path) -> None:
    """No command runs on imports that may be theirs: one line says what is mixed and the command that cures it, without a traceback."""
    (tmp_path / "isagellm_protocol-0.5.4.16.dist-info").mkdir()
    (tmp_path / "sagellm_protocol" / "kv").mkdir(parents=True)
    (tmp_path / "sagellm_protocol" / "__init__.py").write_text("raise RuntimeError('theirs')\n")
    source = Path(__file__).resolve().parents[2] / "src"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(source)])}
    argv = [sys.executable, "-m", "sagellm", "doctor"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "isagellm-protocol 0.5.4.16" in done.stderr
    assert cure(["isagellm-protocol 0.5.4.16"]).split(" && ")[1] in done.stderr
    assert "Traceback" not in done.stderr
