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
    if whole:
        print(page(), end="")
    elif code is not None:
        entry = CATALOGUE.get(code)
        if entry is None:
            raise InvalidArgumentError(f"no error has the code {code!r}: sage-llm explain lists them", param="code")
        print(f"{entry.code}: … {entry.fragment} …\ncause: {entry.cause}\ncure:  {entry.cure}")
    elif as_json:
        print_json([{"code": e.code, "cause": e.cause, "cure": e.cure} for e in CATALOGUE.values()])
    else:
        print_table(("CODE", "CAUSE"), [(e.code, e.cause) for e in CATALOGUE.values()])


app = single(explain)
