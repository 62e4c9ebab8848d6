"""``sage-llm chat``: the conversation of ``run``, with a running server."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from sagellm.cli.admin import ApiKey, base_url, key_for
from sagellm.cli.common import single
from sagellm.cli.run import DEFAULT_SYSTEM


def chat(
    model: Annotated[str | None, typer.Argument(help="As the server names it [its first chat model].")] = None,
    url: Annotated[str | None, typer.Option("--url", help="The server [the one that is found].")] = None,
    api_key: ApiKey = None,
    system: Annotated[str, typer.Option(help="System message; empty for the template's own.")] = DEFAULT_SYSTEM,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="0 is greedy [the model's own].")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    plain: Annotated[bool, typer.Option("--plain", help="Do not render Markdown.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Report times and rates after each answer.")] = False,
) -> None:
    """Chat with a running server."""
    from sagellm.cli.repl import answer, talk
    from sagellm.cli.session import Session
    from sagellm.client import UnifiedInferenceClient

    given: dict[str, Any] = {"temperature": temperature, "seed": seed, "max_tokens": max_tokens}
    key = key_for(base_url(url), api_key)
    if url is None and key is not None and not api_key:
        url = base_url(None)  # a key is of one server: others on this machine are not asked with it
    with UnifiedInferenceClient.create(url, model, timeout=None, api_key=key) as client:
        served = model or client.first_model()

        def switch(name: str) -> str:
            client.ensure_model(name)
            return name

        options = {name: value for name, value in given.items() if value is not None}
        session = Session(served, switch, system=system, options=options)
        markdown = not plain and sys.stdout.isatty()
        if sys.stdin.isatty():
            talk(client, session, verbose=verbose, markdown=markdown)
        else:
            answer(client, session, sys.stdin.read().strip(), verbose=verbose, markdown=markdown)


app = single(chat)
