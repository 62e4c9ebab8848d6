"""The codemod on dependency files."""

import pytest

from sagellm.migrate.dependencies import is_dependency_file, rename_requirements


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("requirements.txt", "isage-llm-core==0.2.1\n", "isagellm>=0.6.0\n"),
        ("requirements-dev.txt", "  Isage_LLM_Gateway[x] >=0.2, <1 ; python_version<'3.12' # c\n", None),
        (
            "pyproject.toml",
            'dependencies = ["isage-llm-gateway>=0.2", "x>=1"]\n',
            'dependencies = ["isagellm[gateway]>=0.6.0", "x>=1"]\n',
        ),
        ("pyproject.toml", 'isage-llm-core = "^0.2"  # c\n', 'isagellm = "^0.6.0"  # c\n'),
        ("pyproject.toml", 'isage-llm-gateway = "^0.2"\n', 'isagellm = { version = "^0.6.0", extras = ["gateway"] }\n'),
        ("setup.cfg", "install_requires =\n    isagellm-core>=0.5\n", "install_requires =\n    isagellm>=0.6.0\n"),
        ("setup.py", 'install_requires=["isage-llm-core"],\n', 'install_requires=["isagellm>=0.6.0"],\n'),
        ("environment.yml", "  - pip:\n    - isage-llm-core\r\n", "  - pip:\n    - isagellm>=0.6.0\r\n"),
    ],
)
def test_renames_in_every_kind_of_file(path, old, new):
    """Name, extras and range are replaced; indent, markers, comments and line ends stay."""
    assert is_dependency_file(path)
    if new is None:
        new = "  isagellm[gateway]>=0.6.0 ; python_version<'3.12' # c\n"
    assert rename_requirements(old, path) == (new, 1)
    assert rename_requirements(new, path) == (new, 0)


@pytest.mark.parametrize(
    "line",
    [
        "# isage-llm-core",
        "isage-llm-corex",
        "my-isage-llm-core",
        "isagellm>=0.5",
        "-e ./isage-llm-core",
        "isage-llm-core-extras==1",
    ],
)
def test_leaves_other_lines_alone(line):
    """Comments, other distributions and paths are not touched."""
    assert rename_requirements(line + "\n", "requirements.txt") == (line + "\n", 0)
