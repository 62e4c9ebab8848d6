"""The terminal of ``sage-llm run``: history, completion, several lines, Ctrl-C that stops the answer and not the program."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.keys import Keys

from sagellm import store
from sagellm.cli.common import human_bytes
from sagellm.cli.failures import describe
from sagellm.cli.markdown import Renderer
from sagellm.cli.meter import Meter
from sagellm.cli.session import COMMANDS, Session, SessionOverError
from sagellm_protocol.errors import CancelledRequestError, SageError

if TYPE_CHECKING:
    from sagellm.client import UnifiedInferenceClient

__all__ = ["answer", "talk"]

_QUOTES = '"""'


class CtrlC:
    """While it is entered, Ctrl-C cancels what the client is asked instead of raising in the middle of anything.

    Between two calls it only leaves its mark. Where an exception is right, in a command that takes long, `raising` says so. At
    the prompt Ctrl-C is a key, and a signal only what is left of one that came before.
    """

    def __init__(self, client: UnifiedInferenceClient, reader: PromptSession[str]) -> None:
        self._client = client
        self._reader = reader
        self.pressed = self.raising = False

    def __enter__(self) -> CtrlC:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        if self._reader.app.is_running and not self._reader.app.is_done:
            return
        self.pressed = True
        if self.raising:
            self.raising = False
            raise KeyboardInterrupt
        self._client.cancel()

    def prompt(self, sign: str) -> str:
        """Read a line; `pressed` says then whether Ctrl-C came right behind it.

        Raises:
            KeyboardInterrupt: Ctrl-C instead of a line.
            EOFError: Ctrl-D.
        """
        text = self._reader.prompt(sign, handle_sigint=False, pre_run=self._forget)
        # Behind Enter it may still have come as a key: it takes back what was typed ahead, as terminals do; later keys stay.
        keys = [*get_typeahead(self._reader.input), *self._reader.input.read_keys()]
        last = max((k for k, press in enumerate(keys) if press.key == Keys.ControlC), default=-1)
        store_typeahead(self._reader.input, keys[last + 1 :])
        self.pressed = self.pressed or last >= 0
        return text

    def _forget(self) -> None:
        self.pressed = False


def talk(client: UnifiedInferenceClient, session: Session, *, verbose: bool, markdown: bool) -> None:
    """Read, answer, repeat, until ``/bye`` or Ctrl-D."""
    store.home().mkdir(parents=True, exist_ok=True)
    reader: PromptSession[str] = PromptSession(
        history=FileHistory(str(store.home() / "history")),
        completer=WordCompleter([name.split()[0] for name in COMMANDS], sentence=True),
        complete_while_typing=False,
    )
    print(f"{session.model}: /help lists the commands, /bye leaves")
    with CtrlC(client, reader) as ctrl_c:
        while _turn(client, session, ctrl_c, verbose=verbose, markdown=markdown):
            pass


def _turn(client: UnifiedInferenceClient, session: Session, ctrl_c: CtrlC, *, verbose: bool, markdown: bool) -> bool:
    """Read one line and act on it; return whether to go on."""
    try:
        text = _read(ctrl_c)
        if text.startswith("/"):
            print(_command(session, text, ctrl_c))
        elif text:
            answer(client, session, text, verbose=verbose, markdown=markdown, ctrl_c=ctrl_c)
    except (EOFError, SessionOverError):
        return False
    except KeyboardInterrupt:
        pass  # at the prompt, an empty line; in a command, its end
    except (SageError, OSError) as error:
        sys.stderr.write(f"error: {describe(error)}\n")
    return True


def _command(session: Session, text: str, ctrl_c: CtrlC) -> str:
    try:
        ctrl_c.raising = True
        return session.command(text)
    finally:
        ctrl_c.raising = False


def _read(ctrl_c: CtrlC) -> str:
    text = ctrl_c.prompt(">>> ")
    if not text.lstrip().startswith(_QUOTES):
        return text.strip()
    text = text.lstrip()[len(_QUOTES) :]
    while not text.rstrip().endswith(_QUOTES):
        text += "\n" + ctrl_c.prompt("... ")
    return text.rstrip()[: -len(_QUOTES)].strip()


def answer(
    client: UnifiedInferenceClient,
    session: Session,
    text: str,
    *,
    verbose: bool,
    markdown: bool,
    ctrl_c: CtrlC | None = None,
) -> None:
    """Ask, and show the answer as it comes; with `ctrl_c` that stops it, and what was said is kept.

    Raises:
        SageError: what the engine said.
    """
    meter, renderer, said = Meter(conversation=True), Renderer(colour=markdown), ""
    if ctrl_c is not None and ctrl_c.pressed:
        _show("(stopped)\n")
        return
    messages = session.ask(text)
    try:
        with client.chat(
            messages, model=session.model, stream=True, stream_options={"include_usage": True}, **session.options
        ) as deltas:
            for delta in deltas:
                meter.saw(delta)
                said += delta.text
                _show(renderer.push(delta.text))
                if ctrl_c is not None and ctrl_c.pressed:
                    break
    except CancelledRequestError:
        if ctrl_c is None or not ctrl_c.pressed:
            raise
    finally:
        session.answered(said)
        _show(renderer.finish() + ("\n(stopped)\n" if ctrl_c is not None and ctrl_c.pressed else "\n"))
    session.last_report = meter.report(human_bytes)
    if verbose:
        sys.stderr.write(session.last_report + "\n")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
