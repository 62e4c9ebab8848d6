"""docs/migration.md says what the table says."""

import re
from pathlib import Path

from sagellm.migrate.table import DISTRIBUTIONS, KEYWORDS, MODULES, NAMES, REMOVED

GUIDE = (Path(__file__).resolve().parents[3] / "docs" / "migration.md").read_text("utf-8")
CELL = re.compile(r"^`([^`]*)`$")
ROWS = [
    tuple(CELL.sub(r"\1", cell.strip()) for cell in line.strip("|").split("|"))
    for line in GUIDE.splitlines()
    if line.startswith("| `")
]


def test_the_guide_lists_every_old_name_once():
    """Each row of the guide is a row of the table, and the other way round."""
    expected = [
        *DISTRIBUTIONS.items(),
        *MODULES.items(),
        *((f"{m}.{n}", f"{t}.{x}") for (m, n), (t, x) in NAMES.items()),
        *REMOVED.items(),
        *((call, old, new) for call, words in KEYWORDS.items() for old, new in words.items()),
    ]
    assert sorted(ROWS) == sorted(expected)


def test_the_guide_names_the_wheels_to_remove():
    """The cure for a mixed machine lists every old distribution."""
    cure = re.search(r"pip uninstall -y(.*?)\npip install", GUIDE, re.DOTALL)
    assert cure is not None
    assert {d for d in DISTRIBUTIONS if d.startswith("isagellm-")} <= set(cure.group(1).split())
