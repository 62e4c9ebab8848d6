"""The codemod on Python source."""

import ast
import random
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("libcst", reason="pip install 'isagellm[migrate]'")

from sagellm.migrate.python_code import mentions_old_names, rewrite_python
from sagellm.migrate.table import MODULES, OLD_ROOTS


def rewritten(source: str) -> str:
    return rewrite_python(source.encode()).source.decode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("from sage.llm import UnifiedInferenceClient\n", "from sagellm import UnifiedInferenceClient\n"),
        (
            "from sage.llm.control_plane.manager import ControlPlaneManager as M  # why\n",
            "from sagellm_control_plane.manager import ControlPlaneManager as M  # why\n",
        ),
        (
            "from sage.llm.gateway.server import create_app, main\n",
            "from sagellm_gateway.server import create_app, main\n",
        ),
        ("import sage.llm.gateway.server as s\n", "import sagellm_gateway.server as s\n"),
        ("import sagellm_control as cp, os\n", "import sagellm_control_plane as cp, os\n"),
        ("from sage.llm import gateway\n", "import sagellm_gateway as gateway\n"),
        ("from sage import llm\n", "import sagellm as llm\n"),
        ("from sage.llm.gateway import server as web\n", "from sagellm_gateway import server as web\n"),
        ("from sage.llm.control_plane import *\n", "from sagellm_control_plane import *\n"),
        (
            "import sage.llm.gateway.server\napp = sage.llm.gateway.server.create_app()\n",
            "import sagellm_gateway.server\napp = sagellm_gateway.server.create_app()\n",
        ),
        ('import_module("sage.llm.gateway.server")\n', 'import_module("sagellm_gateway.server")\n'),
        ("run('sage.llm.gateway.server:app')\n", "run('sagellm_gateway.server:app')\n"),
        (
            "patch('sage.llm.control_plane.manager.ControlPlaneManager.start')\n",
            "patch('sagellm_control_plane.manager.ControlPlaneManager.start')\n",
        ),
        (
            "from sage.llm import UnifiedInferenceClient as C\nc = C.create(mock_mode=True, timeout=3)\n",
            "from sagellm import UnifiedInferenceClient as C\nc = C.create(mock=True, timeout=3)\n",
        ),
        (
            "if x:\r\n\tfrom sage.llm import create_app\r\n",
            "if x:\r\n\tfrom sagellm_gateway.server import create_app\r\n",
        ),
    ],
)
def test_rewrites_each_form_of_an_old_name(old, new):
    """Every way to import or name an old thing becomes the new one, layout kept."""
    assert rewritten(old) == new


def test_splits_an_import_whose_names_moved_apart():
    """Names of one old module that live in several new ones become one import each, with their comments."""
    out = rewritten("from sage.llm import (UnifiedInferenceClient,  # a\n    EngineInfo as E)  # b\nx = 1\n")
    assert out == (
        "# a\nfrom sagellm import UnifiedInferenceClient\nfrom sagellm_control_plane.types import EngineInfo as E  # b\nx = 1\n"
    )


def test_leaves_and_reports_names_without_successor():
    """A removed name stays as it is, and the report says what to use instead."""
    source = b"from sage.llm.engines import VLLMEngine\n"
    result = rewrite_python(source)
    assert result.source is source
    assert result.left[0][0] == 1
    assert "UnifiedInferenceClient" in result.left[0][1]


def test_text_that_mentions_an_old_name_is_noted_not_changed():
    """Docstrings and longer strings are prose: they stay, and are listed."""
    source = b'"""sage.llm"""\nprint("see sage.llm.gateway for more")\n'
    result = rewrite_python(source)
    assert result.source is source
    assert [line for line, _ in result.notes] == [1, 2]


@pytest.mark.parametrize(
    "source",
    [
        "import sage.kernel\nx = sage.kernel.run\n",
        "from sage.kernel import llm\n",
        "from .llm import UnifiedInferenceClient\n",
        "sage = object()\nsage.llm.gateway\n",
        "def f(sage):\n    return sage.llm.gateway.server\n",
        "import sagellm_control_tower\n",
        'x = b"sage.llm.gateway"\n',
    ],
)
def test_leaves_other_code_alone(source):
    """Names that only look old are not touched."""
    data = source.encode()
    assert rewrite_python(data).source is data


OLD_LINES = [
    "from sage.llm import UnifiedInferenceClient",
    "from sage.llm.control_plane.manager import ControlPlaneManager",
    "from sage.llm.gateway.server import create_app",
    "import sage.llm.gateway.server as _server",
    "import sagellm_control",
]


def stdlib_files() -> list[Path]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return random.Random(7).sample([f for f in files if f.stat().st_size < 30_000], 12)


@pytest.mark.parametrize("path", stdlib_files(), ids=lambda p: p.name)
def test_real_files_keep_every_other_line(path):
    """With an old import put on top of a real file, exactly that line changes; a second run changes nothing."""
    body = path.read_bytes()
    if b"from __future__" in body or body.startswith(b"\xef\xbb\xbf"):
        pytest.skip("an import cannot stand above this file's first statement")
    result = rewrite_python("; ".join(OLD_LINES).encode() + b"\n" + body)
    assert result.source.endswith(b"\n" + body)
    assert not mentions_old_names(result.source.removesuffix(body))
    assert rewrite_python(result.source).changes == 0


MODULE = st.sampled_from(sorted(m for m in MODULES if m not in OLD_ROOTS))
NAME = st.from_regex(r"[A-Z][a-z]{1,6}", fullmatch=True)


@given(
    st.lists(st.tuples(MODULE, NAME, st.booleans()), min_size=1, max_size=6),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_generated_files_are_rewritten_once_and_stay_valid(imports, newline, bom):
    """Whatever is imported, the output parses, names nothing old, keeps line ends and BOM, and is a fixed point."""
    lines = ["# -*- coding: utf-8 -*-"]
    for module, name, alias in imports:
        lines.append(f"from {module} import {name}" + (f" as _{name}" if alias else ""))
    source = (b"\xef\xbb\xbf" if bom else b"") + newline.join([*lines, 'x = "é"', ""]).encode()
    result = rewrite_python(source)
    assert result.changes == len(imports)
    assert result.source.startswith(b"\xef\xbb\xbf") == bom
    assert result.source.count(newline.encode()) == source.count(newline.encode())
    ast.parse(result.source)
    assert not mentions_old_names(result.source)
    assert rewrite_python(result.source).source is result.source
