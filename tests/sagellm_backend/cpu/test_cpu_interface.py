"""An extension of another version is found out before the first request."""

from __future__ import annotations

import pytest

from sagellm.doctor import CHECKS
from sagellm_backend.auto import pick
from sagellm_backend.cpu import CpuBackend, _native
from sagellm_backend.cpu.interface import expected, other_build
from sagellm_protocol.errors import UnsupportedError


def test_the_build_here_belongs_to_these_files() -> None:
    """The extension carries the hash of the declaration that stands beside it."""
    assert expected() == _native.INTERFACE
    assert other_build() is None


@pytest.mark.parametrize("built", ["0123456789", None])
def test_a_build_of_another_version_is_refused_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, built: str | None
) -> None:
    """Another hash, and a build from before there was one, are refused by name and by auto, and fail in the doctor."""
    if built is None:
        monkeypatch.delattr(_native, "INTERFACE")
    else:
        monkeypatch.setattr(_native, "INTERFACE", built)
    assert "pip install --force-reinstall" in (CpuBackend().available() or "")
    for name in ("cpu", "auto"):
        with pytest.raises(UnsupportedError, match=r"built for another version.*pip install"):
            pick(name)
    state, fact, cure = CHECKS["native backend"]()
    assert state == "fail"
    assert "another version" in fact
    assert cure.startswith("pip install --force-reinstall")
