"""``sage-llm explain``: an error of the catalogue, with cause and cure."""

from __future__ import annotations

from typing import Annotated

import typer

from sagellm.catalogue import CATALOGUE, page
from sagellm.cli.common import JsonOption, print_json, print_table, single
from sagellm_protocol.errors import InvalidArgumentError


def explain(
    code: Annotated[str | None, typer.Argument(help="The code that an error names; without it all are listed.")] = None,
    whole: Annotated[bool, typer.Option("--page", help="Print docs/errors.md.")] = False,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Say what an error means and what cures it."""
    if whole and (code or as_json):
        raise InvalidArgumentError("--page prints the whole catalogue as Markdown: drop the rest", param="page")
    if code is not None and code not in CATALOGUE:
        raise InvalidArgumentError(f"no error has the code {code!r}: sage-llm explain lists them", param="code")
    entries = list(CATALOGUE.values()) if code is None else [CATALOGUE[code]]
    rows = [{"code": e.code, "message": e.fragment, "cause": e.cause, "cure": e.cure} for e in entries]
    if whole:
        print(page(), end="")
    elif as_json:
        print_json(rows if code is None else rows[0])
    elif code is None:
        print_table(("CODE", "CAUSE"), [(e.code, e.cause) for e in entries])
    else:
        print(f"{code}: … {entries[0].fragment} …\ncause: {entries[0].cause}\ncure:  {entries[0].cure}")


app = single(explain)
