"""What every old name is called now."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "DISTRIBUTIONS",
    "KEYWORDS",
    "MODULES",
    "NAMES",
    "OLD_ROOTS",
    "REMOVAL_VERSION",
    "REMOVED",
    "Removed",
    "Target",
    "resolve_name",
    "resolve_path",
]

REMOVAL_VERSION = "1.0"
"""The release that drops the old names."""

NEW_VERSION = "0.6.0"

OLD_ROOTS = ("sage.llm", "sagellm_control")

MODULES: dict[str, str] = {
    "sage.llm": "sagellm",
    "sage.llm.unified_client": "sagellm.client",
    "sage.llm.control_plane": "sagellm_control_plane",
    "sage.llm.control_plane.manager": "sagellm_control_plane.manager",
    "sage.llm.control_plane.types": "sagellm_control_plane.types",
    "sage.llm.control_plane.policies": "sagellm_control_plane.policies",
    "sage.llm.control_plane.autoscaler": "sagellm_control_plane.autoscaler",
    "sage.llm.gateway": "sagellm_gateway",
    "sage.llm.gateway.server": "sagellm_gateway.server",
    "sagellm_control": "sagellm_control_plane",
    "sagellm_control.manager": "sagellm_control_plane.manager",
    "sagellm_control.types": "sagellm_control_plane.types",
    "sagellm_control.policies": "sagellm_control_plane.policies",
}
"""Old module -> new module. A name that `NAMES` does not list keeps its name in the new module."""

_MANAGER = "sagellm_control_plane.manager"
_TYPES = "sagellm_control_plane.types"

NAMES: dict[tuple[str, str], tuple[str, str]] = {
    ("sage.llm", "ControlPlaneManager"): (_MANAGER, "ControlPlaneManager"),
    ("sage.llm", "create_app"): ("sagellm_gateway.server", "create_app"),
    ("sage.llm.control_plane", "ControlPlaneManager"): (_MANAGER, "ControlPlaneManager"),
    ("sagellm_control", "ControlPlaneManager"): (_MANAGER, "ControlPlaneManager"),
    ("sage.llm.gateway", "create_app"): ("sagellm_gateway.server", "create_app"),
    ("sage.llm.control_plane.pd_routing", "PDSeparationConfig"): (_TYPES, "PDSeparationConfig"),
    ("sage.llm.control_plane.autoscaler", "AutoscalerConfig"): (_TYPES, "AutoscalerConfig"),
    ("sage.llm.control_plane.engine_lifecycle", "EngineState"): (_TYPES, "EngineState"),
    ("sage.llm.control_plane.engine_lifecycle", "EngineInfo"): (_TYPES, "EngineInfo"),
} | {
    (module, name): (_TYPES, name)
    for module in ("sage.llm", "sage.llm.control_plane", "sage.llm.control_plane.manager", "sagellm_control")
    for name in (
        "AutoscalerConfig",
        "EngineInfo",
        "EngineState",
        "ExecutionInstance",
        "PDSeparationConfig",
        "PerformanceMetrics",
        "RequestMetadata",
        "RequestPriority",
        "RequestStatus",
        "RequestType",
        "SchedulingDecision",
        "SchedulingMetrics",
    )
}
"""(old module, name) -> (new module, new name), where the name moved to another module or is called otherwise."""

REMOVED: dict[str, str] = {
    "sage.llm.control_plane.parallelism": (
        "engines plan their own placement: pass --threads, --parallel and --backend to `sage-llm serve`"
    ),
    "sage.llm.control_plane.pd_routing": (
        "prefill/decode separation is a routing matter of the manager: ControlPlaneManager(enable_pd_separation=True), "
        "configured by sagellm_control_plane.types.PDSeparationConfig"
    ),
    "sage.llm.control_plane.engine_lifecycle": (
        "engines are started by ControlPlaneManager.request_engine_startup and ended by request_engine_shutdown"
    ),
    "sage.llm.engines": (
        "an engine is described by sagellm_core.config.EngineConfig and made by sagellm_core.build.build_engine; "
        "from an application use UnifiedInferenceClient.create(embedded=True)"
    ),
}
"""Old module or ``module.name`` without a successor -> what to use instead."""

DISTRIBUTIONS: dict[str, str] = {
    "isage-llm-core": "isagellm",
    "isage-llm-gateway": "isagellm[gateway]",
    "isagellm-protocol": "isagellm",
    "isagellm-backend": "isagellm",
    "isagellm-core": "isagellm",
    "isagellm-control-plane": "isagellm",
    "isagellm-gateway": "isagellm[gateway]",
}
"""Old distribution -> what to require now."""

_CLIENT_KEYWORDS = {"mock_mode": "mock", "model": "default_llm_model", "timeout_s": "timeout"}

KEYWORDS: dict[str, dict[str, str]] = {
    "UnifiedInferenceClient": _CLIENT_KEYWORDS,
    "UnifiedInferenceClient.create": _CLIENT_KEYWORDS,
}
"""Callable (by its old name) -> old keyword -> new keyword."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where an old thing is now: a module (`name` None), or a name in it."""

    module: str
    name: str | None = None

    @property
    def path(self) -> str:
        """Dotted path."""
        return self.module if self.name is None else f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Removed:
    """An old thing without successor, and what to do instead."""

    old: str
    hint: str


def resolve_name(module: str, name: str) -> Target | Removed | None:
    """Return what ``from module import name`` means now; None if `module` is not an old one."""
    if (module, name) in NAMES:
        return Target(*NAMES[module, name])
    path = f"{module}.{name}"
    for removed in (path, module):
        if removed in REMOVED:
            return Removed(path, REMOVED[removed])
    if path in MODULES:
        return Target(MODULES[path])
    if module in MODULES:
        return Target(MODULES[module], name)
    return None


def resolve_path(path: str) -> tuple[Target | Removed, str] | None:
    """Resolve a dotted path; return its target and the attributes that follow (with their dot), or None if it is not old."""
    if not any(path == root or path.startswith(root + ".") for root in OLD_ROOTS):
        return None
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        head = ".".join(parts[:cut])
        if head in REMOVED and (cut == len(parts) or (head, parts[cut]) not in NAMES):
            return Removed(path, REMOVED[head]), ""
        if cut < len(parts) and (head, parts[cut]) in NAMES:
            return Target(*NAMES[head, parts[cut]]), "".join(f".{p}" for p in parts[cut + 1 :])
        if head in MODULES:
            if cut == len(parts):
                return Target(MODULES[head]), ""
            return Target(MODULES[head], parts[cut]), "".join(f".{p}" for p in parts[cut + 1 :])
    return None
