"""Backends by name: our own, and whatever is installed under the entry-point group ``sagellm.backends``.

Nothing is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module

from sagellm_backend.base import Backend
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["GROUP", "available", "known", "load"]

GROUP = "sagellm.backends"

_BUILT_IN = {
    "cpu": "sagellm_backend.cpu:CpuBackend",
    "cuda": "sagellm_backend.cuda:CudaBackend",
    "reference": "sagellm_backend.reference:ReferenceBackend",
    "mock": "sagellm_backend.mock:MockBackend",
}


def known() -> dict[str, str]:
    """Name -> ``module:class`` of every backend, our own first; an installed one cannot take a name of ours."""
    from importlib.metadata import entry_points

    installed = {point.name: point.value for point in sorted(entry_points(group=GROUP))}
    return {**_BUILT_IN, **{name: value for name, value in installed.items() if name not in _BUILT_IN}}


def available() -> list[str]:
    """Names of the backends that can be used here; one whose package does not load is left out."""
    out = []
    for name in known():
        try:
            reason = load(name).available()
        except InvalidArgumentError:
            continue
        if reason is None:
            out.append(name)
    return out


def load(name: str) -> Backend:
    """Construct the backend `name`; whether it can run here is `Backend.available`'s to say.

    Raises:
        InvalidArgumentError: there is no backend of that name, or its package does not import or is no backend.
    """
    # An installed backend cannot take a name of ours, so ours need no look through all that is installed.
    place = _BUILT_IN.get(name) or known().get(name)
    if place is None:
        raise InvalidArgumentError(
            f"backend {name!r} is unknown: use auto or one of {', '.join(sorted(known()))}", param="backend"
        )
    module, _, attribute = place.partition(":")
    try:
        backend = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise InvalidArgumentError(
            f"backend {name!r} does not load from {place}: {error}. Reinstall the package that provides it",
            param="backend",
        ) from error
    if not isinstance(backend, Backend):
        raise InvalidArgumentError(f"{place} is not a Backend: see sagellm_backend.base", param="backend")
    return backend
