"""``sage-llm engine``: start, stop and drain engines of a running server."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer

from sagellm.cli.admin import ApiKey, Url, call
from sagellm.cli.common import JsonOption, new_app, print_json
from sagellm.cli.ps import ps

app = new_app()

Engine = Annotated[str, typer.Argument(help="Engine id, as `sage-llm ps` shows it.")]


@app.callback()
def engine() -> None:
    """Engines of a running server."""


app.command("list")(ps)


@app.command()
def start(
    model: Annotated[str, typer.Argument(help="A model of the server's store.")],
    engine_id: Annotated[
        str | None, typer.Option("--id", help="Engine id; the default follows from the model.")
    ] = None,
    role: Annotated[
        str | None, typer.Option(help="What it is for where prefill and decode are apart: prefill, decode or any.")
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Start an engine for a model, and wait until it serves."""
    body: dict[str, Any] = {"model_id": model, **({"engine_id": engine_id} if engine_id else {})}
    if role is not None:
        body["options"] = {"role": role}
    info = call("POST", "/management/engines", body, url=url, api_key=api_key)
    print(f"{info['engine_id']} serves {info['model_id']}, pid {info['pid']}")


@app.command()
def register(
    model: Annotated[str, typer.Argument(help="What it serves, as it names it.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")],
    host: Annotated[str, typer.Option(help="Where it runs.")] = "127.0.0.1",
    engine_id: Annotated[str | None, typer.Option("--id", help="Engine id [host:port].")] = None,
    kind: Annotated[str, typer.Option(help="llm or embedding.")] = "llm",
    flavour: Annotated[
        str | None, typer.Option(help="What kind of server it is, such as openai, vllm or llamacpp.")
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Join an engine that runs elsewhere: any OpenAI-compatible server."""
    body = {
        "engine_id": engine_id or f"{host}:{port}",
        "model_id": model,
        "host": host,
        "port": port,
        "engine_kind": kind,
    }
    metadata = {"flavour": flavour} if flavour else {}
    info = call("POST", "/management/engines/register", {**body, "metadata": metadata}, url=url, api_key=api_key)
    print(f"{info['engine_id']} is {info['state']}; it serves as soon as it answers")


@app.command()
def stop(engine_id: Engine, url: Url = None, api_key: ApiKey = None) -> None:
    """Drain an engine and stop it; its requests finish, or go on elsewhere."""
    call("DELETE", f"/management/engines/{quote(engine_id, safe='')}", url=url, api_key=api_key)
    print(f"{engine_id} is stopped")


@app.command()
def drain(engine_id: Engine, url: Url = None, api_key: ApiKey = None) -> None:
    """Give an engine no new requests."""
    call("POST", f"/management/engines/{quote(engine_id, safe='')}/drain", {}, url=url, api_key=api_key)
    print(f"{engine_id} is draining")


@app.command()
def show(
    engine_id: Engine, url: Url = None, api_key: ApiKey = None, as_json: Annotated[bool, JsonOption] = False
) -> None:
    """Show one engine and its health."""
    info = call("GET", f"/management/engines/{quote(engine_id, safe='')}", url=url, api_key=api_key)
    if as_json:
        print_json(info)
        return
    for name, value in info.items():
        print(f"{name:<22}{value}")
