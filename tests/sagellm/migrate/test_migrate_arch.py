"""The architecture checker."""

import json
from pathlib import Path

import pytest

import sagellm
from sagellm.migrate.arch import PROFILES, check_tree, load_rules
from sagellm.migrate.cli import arch

RULES = """
[arch]
deprecated = ["sage.llm"]
[[arch.forbidden]]
modules = ["app.cli"]
imports = ["sagellm_core"]
why = "use the client"
[[arch.layers]]
order = [["app.cli"], ["app.service", "app.jobs"], ["app.domain"]]
"""


@pytest.fixture
def app(tmp_path):
    for name, source in {
        "__init__": "",
        "cli": "import sagellm_core.engine\nfrom . import service\n",
        "service": "from app import jobs, domain\nfrom sage.llm.gateway.server import create_app\n",
        "jobs": "x = 'sage.llm.gateway.server:app'\n'''sage.llm.gateway'''\n",
        "domain": "from .cli import x\n",
    }.items():
        (tmp_path / "app").mkdir(exist_ok=True)
        (tmp_path / "app" / f"{name}.py").write_text(source)
    (tmp_path / "rules.toml").write_text(RULES)
    return tmp_path


def test_finds_each_broken_rule_once(app):
    """Deprecated imports and strings, forbidden imports, siblings and upward imports are found, with their lines."""
    found = {(Path(f.path).stem, f.line, f.rule) for f in check_tree(app / "app", load_rules(app / "rules.toml"))}
    assert found == {
        ("cli", 1, "forbidden"),
        ("service", 1, "layers"),
        ("service", 2, "deprecated"),
        ("jobs", 1, "deprecated"),
        ("domain", 1, "layers"),
    }


@pytest.mark.parametrize("form", ["text", "json", "sarif"])
def test_every_format_reports_the_same_findings(app, form, capsys):
    """Text, JSON and SARIF list five findings, and the exit code is 1."""
    assert arch([str(app / "app"), "--rules", str(app / "rules.toml"), "--format", form]) == 1
    out = capsys.readouterr().out
    if form == "text":
        assert out.endswith("5 findings\n")
    else:
        data = json.loads(out)
        assert len(data if form == "json" else data["runs"][0]["results"]) == 5


def test_the_consumer_profile_keeps_engines_out_of_a_command_line(tmp_path):
    """A module in a `cli` package may not import the core."""
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "__init__.py").write_text("from sagellm_core.engine import Engine\n")
    assert [f.rule for f in check_tree(tmp_path, PROFILES["consumer"])] == ["forbidden"]


@pytest.mark.parametrize("text", ["[arch]\nbad = 1\n", "[other]\n", "not toml"])
def test_wrong_rules_are_wrong_usage(tmp_path, text, capsys):
    """A rules file with an unknown key, no table, or no TOML in it exits with 2 and says what is wrong."""
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        arch([str(tmp_path), "--rules", str(tmp_path / "r.toml")])
    assert caught.value.code == 2


def test_our_own_tree_obeys_our_profile():
    """The six packages import downwards only, and nothing deprecated outside the migration table."""
    source = Path(sagellm.__file__).parent.parent
    findings = [
        f
        for package in sorted(source.glob("sagellm*"))
        if package.is_dir()
        for f in check_tree(package, PROFILES["isagellm"])
        if not ("migrate" in f.path and f.rule == "deprecated")
    ]
    assert findings == []
