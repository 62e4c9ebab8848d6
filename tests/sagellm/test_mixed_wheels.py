import os
import subprocess
import sys
from pathlib import Path

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
