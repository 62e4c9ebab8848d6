"""``sage-llm keys``: add, list, revoke API keys in the server's state file. A running server sees the change."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sagellm import settings
from sagellm.cli.common import JsonOption, new_app, print_json, print_table
from sagellm.cli.own_key import own_name
from sagellm_protocol.errors import InvalidArgumentError

if TYPE_CHECKING:
    from sagellm_gateway.store.keys import KeyStore

app = new_app()

State = Annotated[str | None, typer.Option(help="The server's state file [the one that serve uses].")]


@app.callback()
def keys() -> None:
    """API keys of the server. With a good key in the file, every request needs one."""


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What you call it.")],
    role: Annotated[
        str, typer.Option(help="user calls models, metrics reads metrics, admin does everything.")
    ] = "user",
    requests_per_minute: Annotated[int | None, typer.Option("--rpm", help="Requests a minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option("--tpm", help="Tokens a minute.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option("--tpd", help="Tokens a day (UTC).")] = None,
    state: State = None,
) -> None:
    """Make a key. The secret is shown this once; only its hash is kept."""
    with _store(state) as store:
        key, secret = store.add(
            name,
            cast("Any", role),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            tokens_per_day=tokens_per_day,
        )
    print(f"{key.id} ({key.name}, {key.role})\n{secret}")


@app.command("list")
def list_keys(state: State = None, as_json: Annotated[bool, JsonOption] = False) -> None:
    """Show the keys, without their secrets."""
    with _store(state) as store:
        found = store.all()
    rows = [
        {
            "id": key.id,
            "name": key.name,
            "role": key.role,
            "created": int(key.created),
            "revoked": key.revoked,
            "rpm": key.requests_per_minute,
            "tpm": key.tokens_per_minute,
            "tpd": key.tokens_per_day,
        }
        for key in found
    ]
    if as_json:
        print_json(rows)
    elif not rows:
        print("no keys: whoever reaches the server may call; sage-llm keys add NAME makes one")
    else:
        table = [
            (
                str(r["id"]),
                str(r["name"]),
                str(r["role"]),
                time.strftime("%Y-%m-%d", time.localtime(int(str(r["created"])))),
                "revoked" if r["revoked"] else "good",
            )
            for r in rows
        ]
        print_table(("ID", "NAME", "ROLE", "MADE", "STATE"), table)


@app.command()
def revoke(key: Annotated[str, typer.Argument(help="Id or name.")], state: State = None) -> None:
    """End a key."""
    with _store(state) as store:
        if not store.revoke(key):
            raise InvalidArgumentError(f"no good key is called {key!r}: sage-llm keys list shows them", param="key")
        left = {each.name for each in store.all() if each.revoked is None}
        if left == {own_name()}:  # made because there were others: alone it would keep the door shut
            store.revoke(own_name())
    print(
        f"{key} is revoked" + ("" if left - {own_name()} else "; no key is left: whoever reaches the server may call")
    )


@contextmanager
def _store(state: str | None) -> Iterator[KeyStore]:
    from sagellm_gateway.store.database import Database
    from sagellm_gateway.store.keys import KeyStore

    configured = settings.resolve({"state": state})["state"].value
    if configured == "none":
        raise InvalidArgumentError(
            "the state is kept in memory (state = none), so no key can be kept: set --state FILE", param="state"
        )
    path = Path(configured).expanduser() if configured else settings.state_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    database = Database(str(path))
    try:
        yield KeyStore(database)
    finally:
        database.close()
