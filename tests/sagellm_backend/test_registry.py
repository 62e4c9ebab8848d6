from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from sagellm_backend import auto, registry
from sagellm_backend.auto import SlowBackendWarning, pick
from sagellm_backend.reference import ReferenceBackend
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError


class Third(ReferenceBackend):
    """A backend as another package would bring it."""


class Missing(ReferenceBackend):
    """A native backend without its extension."""

    def available(self) -> str | None:
        """Say why not."""
        return "the extension is not built"


def install(monkeypatch: pytest.MonkeyPatch, **places: str) -> None:
    points = EntryPoints(EntryPoint(name, place, registry.GROUP) for name, place in places.items())
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points.select(group=group))


def test_built_in_backends_need_no_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own backends are known although the distribution is not installed."""
    install(monkeypatch)
    assert list(registry.known()) == ["cpu", "cuda", "reference", "mock"]
    assert pick("reference").name == "reference"


def test_installed_backends_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of another package is loaded by its entry point's name."""
    monkeypatch.setattr("sagellm_backend.reference.Third", Third, raising=False)
    install(monkeypatch, third="sagellm_backend.reference:Third")
    assert isinstance(pick("third"), Third)


def test_our_names_cannot_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point named like a built-in backend does not replace it."""
    install(monkeypatch, reference="somewhere.else:Thing")
    assert pick("reference").name == "reference"


def test_unknown_name_lists_the_known() -> None:
    """An unknown backend is refused with the names of those that exist."""
    with pytest.raises(InvalidArgumentError, match=r"'tpu' is unknown.*cpu.*mock.*reference"):
        pick("tpu")


@pytest.mark.parametrize("place", ["no.such.module:X", "sagellm_backend.reference:Nothing"])
def test_broken_entry_point_is_named(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """A backend whose package does not import is refused with its place, not with a traceback."""
    install(monkeypatch, broken=place)
    with pytest.raises(InvalidArgumentError, match=f"'broken' does not load from {place}"):
        pick("broken")


def test_not_a_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point to something else is refused."""
    install(monkeypatch, odd="collections:OrderedDict")
    with pytest.raises(InvalidArgumentError, match="is not a Backend"):
        pick("odd")


def test_unavailable_backend_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking by name for a backend that cannot run here is an error with its reason; nothing else serves instead."""
    monkeypatch.setattr(auto, "load", lambda name: Missing())
    with pytest.raises(UnsupportedError, match="'cpu' cannot run here: the extension is not built"):
        pick("cpu")


def test_auto_falls_back_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the native extension auto serves with numpy and warns once, naming what to install."""
    backends = {"cpu": Missing, "reference": ReferenceBackend}
    monkeypatch.setattr(auto, "load", lambda name: backends[name]())
    monkeypatch.setattr(auto, "find_spec", lambda name: None)
    with pytest.warns(SlowBackendWarning, match=r"extension is not built.*compiler") as caught:
        assert pick().name == "reference"
    assert len(caught) == 1


def test_auto_refuses_a_build_that_is_there_and_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a native extension that cannot run auto is an error with the reason, not a slow answer."""
    monkeypatch.setattr(auto, "load", lambda name: Missing())
    monkeypatch.setattr(auto, "find_spec", lambda name: name)
    with pytest.raises(UnsupportedError, match="'cpu' cannot run here: the extension is not built"):
        pick()


def test_auto_prefers_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the native extension auto takes it."""
    backends = {"cpu": Third}
    monkeypatch.setattr(auto, "load", lambda name: backends[name]())
    assert isinstance(pick("auto"), Third)


def test_available_leaves_out_what_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only backends that load and can run here are listed as available."""
    monkeypatch.setattr("sagellm_backend.reference.Missing", Missing, raising=False)
    install(monkeypatch, broken="no.such:Thing", missing="sagellm_backend.reference:Missing")
    names = registry.available()
    assert "reference" in names
    assert not {"broken", "missing"} & set(names)


def test_known_imports_no_backend() -> None:
    """Listing the backends imports none of them."""
    code = "import sys; from sagellm_backend.registry import known; known(); print('sagellm_backend.reference' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
