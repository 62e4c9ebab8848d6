"""What the arguments of `ControlPlaneManager` mean together: refused where one has no effect, else made into a configuration."""

from __future__ import annotations

from typing import Any

import msgspec

from sagellm_control_plane.config import CoreConfig
from sagellm_control_plane.policies import policy_named
from sagellm_control_plane.routing import route_named
from sagellm_control_plane.types import PDSeparationConfig
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["ROLES", "check_mode", "check_role", "check_scaling", "configured", "separated"]


ROLES = ("any", "prefill", "decode")


def check_role(role: object) -> None:
    """Raise `InvalidArgumentError` for a role that no engine can have."""
    if role not in ROLES:
        raise InvalidArgumentError(f"the role is {role!r}: use one of {', '.join(ROLES)}", param="role")


def check_mode(mode: str, engine_file: object, *, discover: bool) -> None:
    """Raise `InvalidArgumentError` for an unknown mode, or for engines by address where it takes none."""
    if mode not in ("http", "local"):
        raise InvalidArgumentError(f"mode is {mode!r}: use http or local", param="mode")
    if mode == "local" and (engine_file is not None or discover):
        raise InvalidArgumentError(
            "engine_file and discover need mode='http': they register engines by address", param="engine_file"
        )


def check_scaling(driver: object, catalog: object, config: object, *, enabled: bool) -> None:
    """Raise `InvalidArgumentError` for an autoscaler that could not act, or whose settings would have no effect."""
    if enabled and (driver is None or catalog is None):
        raise InvalidArgumentError(
            "enable_auto_scaling needs a lifecycle driver and a model catalogue to act through",
            param="enable_auto_scaling",
        )
    if config is not None and not enabled:
        raise InvalidArgumentError(
            "autoscaler_config has no effect without enable_auto_scaling=True", param="autoscaler_config"
        )


def separated(core: CoreConfig, pd: PDSeparationConfig | None, *, enabled: bool) -> CoreConfig:
    """Return the configuration with prefill and decode apart, where that is wanted."""
    if not enabled:
        if pd is not None:
            raise InvalidArgumentError("pd_config has no effect without enable_pd_separation=True", param="pd_config")
        return core
    return msgspec.structs.replace(core, pd=pd or core.pd or PDSeparationConfig())


def configured(config: CoreConfig, scheduling: str | None, routing: str | None, interval: float | None) -> CoreConfig:
    """Return the configuration with what was named beside it.

    Raises:
        InvalidArgumentError: an unknown policy or strategy, or an interval that is none.
    """
    changes: dict[str, Any] = {
        "scheduling_policy": policy_named(scheduling or config.scheduling_policy).name,
        "routing_strategy": routing or config.routing_strategy,
    }
    route_named(changes["routing_strategy"])
    if interval is not None:
        if interval <= 0.0:
            raise InvalidArgumentError(
                f"health_check_interval is {interval}: it must be above 0 seconds", param="health_check_interval"
            )
        changes["health"] = msgspec.structs.replace(config.health, interval_s=interval)
    return msgspec.structs.replace(config, **changes)
