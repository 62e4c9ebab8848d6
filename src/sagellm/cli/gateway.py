"""``sage-llm gateway``: the server without a model.

Engines are started or registered over ``/v1/management``, listed in a file, or found on local ports.
"""

from __future__ import annotations

from typing import Annotated

import typer

from sagellm.cli.common import single


def gateway(
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 takes a free one [8889].")] = None,
    policy: Annotated[str | None, typer.Option(help="Scheduling policy of the control plane [adaptive].")] = None,
    state: Annotated[str | None, typer.Option(help="SQLite file for keys, sessions, stored responses.")] = None,
    engine_file: Annotated[
        str | None, typer.Option(help="JSON or TOML list of engines that others run; followed while it changes.")
    ] = None,
    discover: Annotated[
        bool | None, typer.Option("--discover/--no-discover", help="Look for servers of other makers on local ports.")
    ] = None,
    require_key: Annotated[
        bool | None, typer.Option("--require-key/--no-require-key", help="Demand an API key even if none was made.")
    ] = None,
) -> None:
    """Serve the gateway and the control plane without a model."""
    given = dict(locals())
    from sagellm.cli.serve import start

    start(given, no_models=True)


app = single(gateway)
