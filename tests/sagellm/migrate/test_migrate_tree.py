"""`sage-llm migrate` over files and folders."""

import json
import subprocess

import pytest

pytest.importorskip("libcst", reason="pip install 'isagellm[migrate]'")

from sagellm.migrate.cli import migrate
from sagellm.migrate.tree import migrate_file, migrate_tree

OLD = "from sage.llm import UnifiedInferenceClient\n"
NEW = "from sagellm import UnifiedInferenceClient\n"


def test_writes_files_and_keeps_their_mode(tmp_path):
    """A rewritten file has its old permissions, and no other file is left behind."""
    file = tmp_path / "a.py"
    file.write_text(OLD)
    file.chmod(0o751)
    assert migrate([str(tmp_path)]) == 0
    assert file.read_text() == NEW
    assert file.stat().st_mode & 0o777 == 0o751
    assert [p.name for p in tmp_path.iterdir()] == ["a.py"]


def test_check_changes_nothing_and_fails_while_something_is_left(tmp_path, capsys):
    """--check exits 1 before the migration and 0 after it."""
    file = tmp_path / "a.py"
    file.write_text(OLD)
    assert migrate([str(tmp_path), "--check"]) == 1
    assert file.read_text() == OLD
    assert migrate([str(tmp_path)]) == 0
    assert migrate([str(tmp_path), "--check"]) == 0


def test_diff_prints_and_changes_nothing(tmp_path, capsys):
    """--diff shows the change as a unified diff."""
    (tmp_path / "a.py").write_text(OLD)
    assert migrate([str(tmp_path), "--diff"]) == 0
    out = capsys.readouterr().out
    assert f"-{OLD}+{NEW}" in out
    assert (tmp_path / "a.py").read_text() == OLD


def test_a_dirty_git_tree_is_only_looked_at(tmp_path, capsys):
    """With uncommitted changes nothing is written until --write is given."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    (tmp_path / "a.py").write_text("x = 1\n")
    for command in (["init", "-q"], ["add", "a.py"], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "a.py").write_text(OLD)
    assert migrate([str(tmp_path)]) == 1
    assert "--write" in capsys.readouterr().out
    assert (tmp_path / "a.py").read_text() == OLD
    assert migrate([str(tmp_path), "--write"]) == 0
    assert (tmp_path / "a.py").read_text() == NEW


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("py2.py", b"import sage.llm\nprint 'old'\n"),
        ("broken.py", b"from sage.llm import (\n"),
        ("latin.py", b"# coding: utf-8\nfrom sage.llm import x  # \xe9\n"),
        ("lies.py", b"# coding: no-such-codec\nfrom sage.llm import x\n"),
        ("pyproject.toml", b'[project\nx = "isage-llm-core"\n'),
        ("a.ipynb", b"{sage.llm"),
    ],
)
def test_what_cannot_be_parsed_is_reported_and_left(tmp_path, name, content):
    """A file that is not what it claims is never written, and the report says why."""
    file = tmp_path / name
    file.write_bytes(content)
    report = migrate_file(file, write=True)
    assert report.unparsed
    assert file.read_bytes() == content
    assert migrate([str(tmp_path)]) == 1


def notebook(source) -> dict:
    return {
        "cells": [
            {"cell_type": "markdown", "metadata": {}, "source": ["from sage.llm import x"]},
            {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": source},
        ],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


@pytest.mark.parametrize("style", [{"indent": 1}, {"indent": 4, "ensure_ascii": False}, {}])
def test_notebook_code_cells_are_rewritten(tmp_path, style):
    """Code cells change, magics and Markdown stay, and the JSON keeps its layout."""
    file = tmp_path / "n.ipynb"
    file.write_text(json.dumps(notebook(["%pip install é\n", OLD, "x = 1"]), **style) + "\n")
    report = migrate_file(file, write=True)
    assert report.changes == 1
    assert file.read_text() == json.dumps(notebook(["%pip install é\n", NEW, "x = 1"]), **style) + "\n"


def test_environments_and_links_are_skipped(tmp_path):
    """Virtual environments, build folders and symbolic links are not walked into."""
    for folder in ("env", ".git", "node_modules"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(OLD)
    (tmp_path / "env" / "pyvenv.cfg").write_text("")
    (tmp_path / "link.py").symlink_to(tmp_path / "env" / "a.py")
    assert list(migrate_tree(tmp_path, write=True)) == []


def test_many_files_give_the_same_result_with_several_processes(tmp_path):
    """The parallel walk rewrites every file once."""
    for i in range(100):
        (tmp_path / f"m{i}.py").write_text(OLD * 2)
    reports = list(migrate_tree(tmp_path, write=True, jobs=2))
    assert sum(r.changes for r in reports) == 200
    assert all((tmp_path / f"m{i}.py").read_text() == NEW * 2 for i in range(100))


def test_json_report_lists_what_is_left(tmp_path, capsys):
    """--json gives counts, lines and whether anything was written."""
    (tmp_path / "a.py").write_text("from sage.llm.engines import X\n" + OLD)
    assert migrate([str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["written"] is True
    assert report["reports"][0]["changes"] == 1
    assert report["reports"][0]["left"][0]["line"] == 1


def test_a_path_that_does_not_exist_is_wrong_usage(tmp_path, capsys):
    """The error names the path and the exit code is 2."""
    with pytest.raises(SystemExit) as caught:
        migrate([str(tmp_path / "nope")])
    assert caught.value.code == 2
    assert "nope does not exist" in capsys.readouterr().err
