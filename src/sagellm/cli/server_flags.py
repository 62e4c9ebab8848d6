"""Options that ``serve`` and ``gateway`` share: where to listen, how requests find engines, who may call."""

from __future__ import annotations

from typing import Annotated

import typer

_NETWORK, _CONTROL, _ACCESS = "Network", "Control plane", "Access"

Host = Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].", rich_help_panel=_NETWORK)]
Port = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Port; 0 takes a free one [8889].", rich_help_panel=_NETWORK)
]
Grace = Annotated[
    float | None,
    typer.Option(min=0.0, help="Seconds for running requests after SIGTERM [30].", rich_help_panel=_NETWORK),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Gateway processes that share the port [1].", rich_help_panel=_CONTROL)
]
Policy = Annotated[str | None, typer.Option(help="Scheduling policy [adaptive].", rich_help_panel=_CONTROL)]
Routing = Annotated[
    str | None,
    typer.Option(help="Which engine takes a request, such as load_balanced or kv_aware.", rich_help_panel=_CONTROL),
]
EngineFile = Annotated[
    str | None,
    typer.Option(
        help="JSON or TOML list of engines that others run; followed while it changes.", rich_help_panel=_CONTROL
    ),
]
Discover = Annotated[
    bool | None,
    typer.Option(
        "--discover/--no-discover", help="Look for servers of other makers on local ports.", rich_help_panel=_CONTROL
    ),
]
State = Annotated[
    str | None,
    typer.Option(
        help="SQLite file for keys, sessions, stored responses; none keeps them in memory.", rich_help_panel=_ACCESS
    ),
]
ApiKeyFile = Annotated[
    str | None, typer.Option(help="File of API keys (role user), one a line.", rich_help_panel=_ACCESS)
]
RequireKey = Annotated[
    bool | None,
    typer.Option(
        "--require-key/--no-require-key", help="Demand an API key even if none was made.", rich_help_panel=_ACCESS
    ),
]
AllowedHosts = Annotated[
    list[str] | None,
    typer.Option("--allowed-host", help="Further name that Host may hold; repeatable.", rich_help_panel=_ACCESS),
]
Cors = Annotated[
    list[str] | None, typer.Option("--cors", help="Web origin that may call; repeatable.", rich_help_panel=_ACCESS)
]
AccessLog = Annotated[
    bool | None,
    typer.Option("--access-log/--no-access-log", help="One line for each request on stderr.", rich_help_panel=_ACCESS),
]
