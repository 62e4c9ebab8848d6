"""plan, logs and protocol."""

import json

import pytest

from sagellm.cli.main import main


def test_plan_of_the_mock(capsys):
    """The plan shows each part and whether the total fits; as JSON its parts add up to the total."""
    assert main(["plan", "mock", "--ctx", "1024", "--parallel", "4"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()] == [
        "weights",
        "KV",
        "activations",
        "scratch",
        "total",
        "free",
    ]
    assert main(["plan", "mock", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["total_bytes"] == sum(plan[f"{part}_bytes"] for part in ("weight", "kv", "activation", "scratch"))


def test_plan_that_does_not_fit(capsys):
    """What does not fit is refused with what is needed, what is free and the flag that makes it fit."""
    assert main(["plan", "mock", "--memory", "68.2MB", "--ctx", "100000"]) == 1
    err = capsys.readouterr().err
    assert "is free: pass --ctx" in err
    assert "Traceback" not in err


@pytest.mark.model
def test_plan_of_a_real_model(capsys, default_model_path):
    """A real model's weights are planned from its file."""
    assert main(["plan", str(default_model_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weight_bytes"] > 50e6


def test_schema(capsys, tmp_path):
    """The schema goes to the terminal or to a file, the same in both."""
    assert main(["protocol", "schema"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert main(["protocol", "schema", "-o", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == shown
    assert "Request" in shown["$defs"]


@pytest.fixture
def log_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    directory = tmp_path / "isagellm" / "logs"
    directory.mkdir(parents=True)
    return directory


def test_logs(capsys, log_dir):
    """An engine's last lines are shown, across a rotation; engine ids are found under their file names."""
    (log_dir / "org_model-1.log.1").write_text("one\ntwo\n")
    (log_dir / "org_model-1.log").write_text("three\n")
    assert main(["logs", "org/model-1", "-n", "2"]) == 0
    assert capsys.readouterr().out == "two\nthree\n"
    assert main(["logs", "org/model-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ["one", "two", "three"]
    assert main(["logs"]) == 0
    assert "org_model-1" in capsys.readouterr().out


def test_logs_of_nobody(capsys, log_dir):
    """An engine without a log is an error that lists those with one; no logs at all is said in words."""
    assert main(["logs"]) == 0
    assert "no engine has written" in capsys.readouterr().out
    (log_dir / "a.log").touch()
    assert main(["logs", "b"]) == 1
    assert "'b' has no log here: a have" in capsys.readouterr().err
