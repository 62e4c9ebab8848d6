"""The terminal of ``sage-llm run``: history, completion, several lines, Ctrl-C that stops the answer and not the program."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory

from sagellm import store
from sagellm.cli.common import human_bytes
from sagellm.cli.failures import describe
from sagellm.cli.markdown import Renderer
from sagellm.cli.meter import Meter
from sagellm.cli.session import COMMANDS, Session, SessionOverError
from sagellm_protocol.errors import SageError

if TYPE_CHECKING:
    from sagellm.client import UnifiedInferenceClient

__all__ = ["answer", "talk"]

_QUOTES = '"""'


def talk(client: UnifiedInferenceClient, session: Session, *, verbose: bool, markdown: bool) -> None:
    """Read, answer, repeat, until ``/bye`` or Ctrl-D."""
    store.home().mkdir(parents=True, exist_ok=True)
    reader: PromptSession[str] = PromptSession(
        history=FileHistory(str(store.home() / "history")),
        completer=WordCompleter([name.split()[0] for name in COMMANDS], sentence=True),
        complete_while_typing=False,
    )
    print(f"{session.model}: /help lists the commands, /bye leaves")
    while _turn(client, session, reader, verbose=verbose, markdown=markdown):
        pass


def _turn(
    client: UnifiedInferenceClient, session: Session, reader: PromptSession[str], *, verbose: bool, markdown: bool
) -> bool:
    """Read one line and act on it; return whether to go on."""
    try:
        text = _read(reader)
        if text.startswith("/"):
            print(session.command(text))
        elif text:
            answer(client, session, text, verbose=verbose, markdown=markdown)
    except (EOFError, SessionOverError):
        return False
    except KeyboardInterrupt:
        pass  # at the prompt: an empty line
    except (SageError, OSError) as error:
        sys.stderr.write(f"error: {describe(error)}\n")
    return True


def _read(reader: PromptSession[str]) -> str:
    text = reader.prompt(">>> ")
    if not text.lstrip().startswith(_QUOTES):
        return text.strip()
    text = text.lstrip()[len(_QUOTES) :]
    while not text.rstrip().endswith(_QUOTES):
        text += "\n" + reader.prompt("... ")
    return text.rstrip()[: -len(_QUOTES)].strip()


def answer(client: UnifiedInferenceClient, session: Session, text: str, *, verbose: bool, markdown: bool) -> None:
    """Ask, and show the answer as it comes; Ctrl-C stops it and keeps what was said.

    Raises:
        SageError: what the engine said.
    """
    meter, renderer, said = Meter(), Renderer(colour=markdown), ""
    messages = session.ask(text)
    try:
        with client.chat(
            messages, model=session.model, stream=True, stream_options={"include_usage": True}, **session.options
        ) as deltas:
            for delta in deltas:
                meter.saw(delta)
                said += delta.text
                _show(renderer.push(delta.text))
    except KeyboardInterrupt:
        _show(renderer.finish() + "\n(stopped)")
    finally:
        session.answered(said)
        _show(renderer.finish() + "\n")
    session.last_report = meter.report(human_bytes)
    if verbose:
        sys.stderr.write(session.last_report + "\n")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
