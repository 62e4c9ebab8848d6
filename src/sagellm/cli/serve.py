"""``sage-llm serve``: gateway and control plane in this process, each engine in one of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sagellm import settings
from sagellm.cli import engine_flags as flags
from sagellm.cli import server_flags as shared
from sagellm.cli.common import single
from sagellm_protocol.errors import InvalidArgumentError

_CONTROL = "Control plane"


def serve(
    models: Annotated[
        list[str] | None, typer.Argument(help="Names or paths; NAME=PATH serves a path under a name [smollm2:135m].")
    ] = None,
    host: shared.Host = None,
    port: shared.Port = None,
    grace: shared.Grace = None,
    name: Annotated[str | None, typer.Option(help="Serve the (only) model under this name.")] = None,
    engines: Annotated[
        int | None, typer.Option(min=1, help="Engine processes for each model [1].", rich_help_panel=_CONTROL)
    ] = None,
    keep_alive: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Idle seconds before an engine unloads its model; 0 is never [0].", rich_help_panel=_CONTROL
        ),
    ] = None,
    workers: shared.Workers = None,
    policy: shared.Policy = None,
    routing: shared.Routing = None,
    auto_scale: Annotated[
        bool | None,
        typer.Option(
            "--auto-scale/--no-auto-scale",
            help="Start and stop engines by demand; load stored models on request.",
            rich_help_panel=_CONTROL,
        ),
    ] = None,
    pd_separation: Annotated[
        bool | None,
        typer.Option(
            "--pd-separation/--no-pd-separation",
            help="Prefill on one engine, decode on another where that is faster.",
            rich_help_panel=_CONTROL,
        ),
    ] = None,
    engine_file: shared.EngineFile = None,
    discover: shared.Discover = None,
    roles: Annotated[
        list[str] | None,
        typer.Option(
            "--role",
            help="What an engine of each model is for: prefill, decode or any; once for each of --engines.",
            rich_help_panel=_CONTROL,
        ),
    ] = None,
    state: shared.State = None,
    api_key_file: shared.ApiKeyFile = None,
    require_key: shared.RequireKey = None,
    allowed_hosts: shared.AllowedHosts = None,
    cors: shared.Cors = None,
    access_log: shared.AccessLog = None,
    mock: flags.Mock = False,
    ctx: flags.Ctx = None,
    parallel: flags.Parallel = None,
    max_batch_tokens: flags.MaxBatchTokens = None,
    memory: flags.Memory = None,
    backend: flags.Backend = None,
    threads: flags.Threads = None,
    quant: flags.Quant = None,
    kv_dtype: flags.KvDtype = None,
    kv_size: flags.KvBytes = None,
    spill: flags.Spill = None,
    spill_size: flags.SpillBytes = None,
    no_prefix_cache: flags.NoPrefixCache = False,
    spec: flags.Spec = None,
    draft_model: flags.DraftModel = None,
    lora: flags.Lora = None,
    mock_scale: flags.MockSpeed = None,
    script: flags.Script = None,
) -> None:
    """Serve models over HTTP: OpenAI-compatible, http://127.0.0.1:8889/v1.

    Every option can also be set in the configuration file and by a variable: `sage-llm config show --origin`.
    """
    given = {key: value for key, value in locals().items() if key in settings.SETTINGS}
    # No flag takes these back: without it they are what the file or the environment says.
    given |= {"mock": mock or None, "no_prefix_cache": no_prefix_cache or None}
    start({key: str(value) if isinstance(value, Path) else value for key, value in given.items()}, name)


def start(given: dict[str, Any], name: str | None = None, *, no_models: bool = False) -> None:
    """Resolve the settings (flags over environment over file over default) and serve until a signal.

    Raises:
        SageError: a setting is wrong, or a model is missing.
    """
    from sagellm.cli.server_process import ServeOptions, serve_until_stopped

    values = {key: value.value for key, value in settings.resolve(given).items()}
    wanted = [] if no_models else _models(given, values)
    if name is not None and len(wanted) != 1:
        raise InvalidArgumentError(
            f"--name names one model, {len(wanted)} are given: write NAME=PATH for each", param="name"
        )
    chosen = [_split(model, name) for model in wanted]
    for _, model in chosen:
        flags.ensure_model(model)
    serve_until_stopped(
        ServeOptions(
            host=values["host"],
            port=values["port"],
            models=tuple(chosen),
            engines=values["engines"],
            roles=_roles(values),
            policy=values["policy"],
            control={
                "routing_strategy": values["routing"],
                "enable_auto_scaling": values["auto_scale"],
                "enable_pd_separation": values["pd_separation"],
                "engine_file": values["engine_file"],
                "discover": values["discover"],
            },
            changes=_changes(values, "mock" if wanted == ["mock"] else ""),
            gateway=_gateway(values),
            grace_s=values["grace"],
            access_log=values["access_log"],
            workers=values["workers"],
            keep_alive_s=values["keep_alive"],
        )
    )


def _roles(values: dict[str, Any]) -> tuple[str, ...]:
    """Return the roles of each model's engines.

    Raises:
        InvalidArgumentError: an unknown one, another number than there are engines, or nothing that would heed them.
    """
    from sagellm_control_plane.live.arguments import check_role

    roles = tuple(values["roles"])
    for role in roles:
        check_role(role)
    if roles and not values["pd_separation"]:
        raise InvalidArgumentError("--role has no effect without --pd-separation: add it", param="roles")
    if roles and len(roles) != values["engines"]:
        raise InvalidArgumentError(
            f"--role is given {len(roles)} times for {values['engines']} engines: give it once for each", param="roles"
        )
    return roles


def _models(given: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Return what to serve: ``--mock`` without a model named in the same way means the mock model."""
    if values["mock"] and not given.get("models"):
        return ["mock"]
    return list(values["models"])


def _changes(values: dict[str, Any], model: str) -> dict[str, Any]:
    return flags.engine_changes(
        model=model,
        mock=values["mock"],
        ctx=values["ctx"],
        parallel=values["parallel"],
        max_batch_tokens=values["max_batch_tokens"],
        memory=values["memory"],
        backend=values["backend"],
        threads=values["threads"],
        quant=values["quant"],
        kv_dtype=values["kv_dtype"],
        kv_bytes=values["kv_size"],
        spill=Path(values["spill"]) if values["spill"] else None,
        spill_bytes=values["spill_size"],
        no_prefix_cache=values["no_prefix_cache"],
        spec=values["spec"],
        draft_model=values["draft_model"],
        lora=values["lora"],
        mock_scale=values["mock_scale"],
        script=Path(values["script"]) if values["script"] else None,
    )


def _gateway(values: dict[str, Any]) -> dict[str, Any]:
    state = values["state"]
    if state == "none":
        path = None
    else:
        file = Path(state).expanduser() if state else settings.state_path()
        file.parent.mkdir(parents=True, exist_ok=True)
        path = str(file)
    if values["api_key_file"]:
        _add_keys(Path(values["api_key_file"]).expanduser(), path)
    return {
        "state_path": path,
        "require_key": values["require_key"] or None,
        "access_log": values["access_log"],
        "origins": {"hosts": values["allowed_hosts"], "cors": values["cors"]},
    }


def _add_keys(file: Path, state: str | None) -> None:
    """Keep the hashes of the file's keys in the state, those that are not there yet."""
    from sagellm_gateway.store.database import Database
    from sagellm_gateway.store.keys import KeyStore

    if state is None:
        raise InvalidArgumentError(
            "--api-key-file needs a state to keep the keys' hashes: drop --state none", param="api_key_file"
        )
    secrets = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    secrets = [line for line in secrets if line and not line.startswith("#")]
    if not secrets:
        raise InvalidArgumentError(f"{file} has no key: write one a line", param="api_key_file")
    database = Database(state)
    try:
        for k, secret in enumerate(secrets):
            KeyStore(database).ensure(secret, f"{file.name}-{k + 1}")
    finally:
        database.close()


def _split(text: str, name: str | None) -> tuple[str | None, str]:
    given, equals, path = text.partition("=")
    return (given, path) if equals else (name, text)


app = single(serve)
