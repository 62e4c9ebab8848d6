"""`__all__` is the public interface of every module."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import sagellm

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "sagellm_protocol",
    "sagellm_backend",
    "sagellm_core",
    "sagellm_control_plane",
    "sagellm_gateway",
    "sagellm",
)
# Modules that run on import by design, or that need an extra that is not part of the default installation.
NOT_IMPORTED = re.compile(r"(__main__$|\.cuda\b|\.ray_driver$|\.triton\b|_native$|\._bpe$)")


def modules() -> list[str]:
    found = []
    for package in PACKAGES:
        folder = ROOT / "src" / package
        found.append(package)
        found += [
            m.name for m in pkgutil.walk_packages([str(folder)], f"{package}.") if not NOT_IMPORTED.search(m.name)
        ]
    return found


@pytest.mark.parametrize("name", modules())
def test_every_exported_name_exists_once_and_in_order(name: str) -> None:
    """What `__all__` lists can be imported, is listed once, and everything else that is public there is from elsewhere."""
    module = importlib.import_module(name)
    exported = list(getattr(module, "__all__", ()))
    assert len(exported) == len(set(exported))
    for entry in exported:
        assert hasattr(module, entry), entry


def test_the_umbrella_offers_the_client_and_the_version() -> None:
    """``from sagellm import UnifiedInferenceClient`` works, and nothing else is promised."""
    assert sorted(sagellm.__all__) == ["AsyncUnifiedInferenceClient", "UnifiedInferenceClient", "__version__"]
    assert sagellm.UnifiedInferenceClient.__name__ == "UnifiedInferenceClient"


def test_the_version_is_written_once() -> None:
    """The version of the package and of pyproject.toml are the same."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert match is not None
    assert match[1] == sagellm.__version__
