"""A conversation and its slash commands, without a terminal: what `sage-llm run` is apart from reading keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError

__all__ = ["COMMANDS", "Session", "SessionOverError", "check_no_image", "response_format"]

_TYPES: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "seed": int,
    "max_tokens": int,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "stop": lambda text: [text],
}

COMMANDS = {
    "/set NAME VALUE": "change a sampling option; without arguments, list them",
    "/show": "show the model, the system message and the options",
    "/system TEXT": "set the system message; empty removes it",
    "/model NAME": "talk to another model; the conversation stays",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "go on with a saved conversation",
    "/clear": "forget the conversation",
    "/stats": "what the last answer took",
    "/help": "this list",
    "/bye": "leave (also Ctrl-D)",
}

_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".svg")


class SessionOverError(Exception):
    """The user said goodbye."""


@dataclass
class Session:
    """State of one conversation.

    Attributes:
        model: as it is served.
        system: system message; empty for the template's own.
        options: sampling options of every request.
        turns: user and assistant messages so far.
        switch_model: loads another model and returns its served name.
        last_report: what the last answer took, for ``/stats``.
    """

    model: str
    switch_model: Callable[[str], str]
    system: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    last_report: str = ""

    def messages(self) -> list[dict[str, Any]]:
        """Return what is sent: the system message, then the turns."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def ask(self, text: str) -> list[dict[str, Any]]:
        """Add the user's turn and return what is sent.

        Raises:
            UnsupportedError: the text names an image file.
        """
        check_no_image(text)
        self.turns.append({"role": "user", "content": text})
        return self.messages()

    def answered(self, text: str) -> None:
        """Add the assistant's turn; an answer that never began takes the question back."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns.pop()

    def command(self, line: str) -> str:
        """Carry out a slash command and return what to show.

        Raises:
            SessionOverError: ``/bye``.
            InvalidArgumentError: unknown command, name or value.
        """
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        action = {
            "/set": self._set,
            "/show": self._show,
            "/system": self._system,
            "/model": self._model,
            "/save": self._save,
            "/load": self._load,
            "/clear": self._clear,
            "/stats": self._stats,
            "/help": self._help,
            "/?": self._help,
            "/bye": self._bye,
            "/exit": self._bye,
            "/quit": self._bye,
        }.get(name)
        if action is None:
            raise InvalidArgumentError(f"no command {name}: /help lists them")
        return action(rest)

    def _set(self, rest: str) -> str:
        if not rest:
            return "\n".join(f"{n} = {self.options.get(n, '(the model’s own)')}" for n in _TYPES)
        name, _, value = rest.partition(" ")
        if name not in _TYPES:
            raise InvalidArgumentError(f"no option {name!r}: use one of {', '.join(_TYPES)}")
        if not value.strip():
            self.options.pop(name, None)
            return f"{name} is the model's own again"
        try:
            self.options[name] = _TYPES[name](value.strip())
        except ValueError:
            raise InvalidArgumentError(f"{value.strip()!r} is not a value of {name}") from None
        return f"{name} = {self.options[name]}"

    def _show(self, _rest: str) -> str:
        set_ = ", ".join(f"{k}={v}" for k, v in self.options.items()) or "none"
        return f"model    {self.model}\nsystem   {self.system or '(the template’s own)'}\noptions  {set_}\nturns    {len(self.turns)}"

    def _system(self, rest: str) -> str:
        self.system = rest
        return "system message set" if rest else "system message removed"

    def _model(self, rest: str) -> str:
        if not rest:
            return self.model
        self.model = self.switch_model(rest)
        return f"talking to {self.model}"

    def _save(self, rest: str) -> str:
        path = _path(rest, "/save")
        document = {"model": self.model, "system": self.system, "options": self.options, "messages": self.turns}
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return f"{len(self.turns)} turns saved in {path}"

    def _load(self, rest: str) -> str:
        path = _path(rest, "/load")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            turns = [{"role": str(m["role"]), "content": str(m["content"])} for m in document["messages"]]
            self.turns, self.system, self.options = turns, str(document["system"]), dict(document["options"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgumentError(f"{path} is not a saved conversation ({error})") from error
        return f"{len(self.turns)} turns loaded from {path}"

    def _clear(self, _rest: str) -> str:
        self.turns.clear()
        return "conversation forgotten"

    def _stats(self, _rest: str) -> str:
        return self.last_report or "no answer yet"

    def _help(self, _rest: str) -> str:
        width = max(map(len, COMMANDS))
        lines = [f"{name:<{width}}  {what}" for name, what in COMMANDS.items()]
        return "\n".join([*lines, '""" opens and closes a text of several lines; Ctrl-C stops an answer'])

    def _bye(self, _rest: str) -> str:
        raise SessionOverError


def _path(rest: str, command: str) -> Path:
    if not rest:
        raise InvalidArgumentError(f"{command} needs a file name")
    return Path(rest).expanduser()


def check_no_image(text: str) -> None:
    """Refuse a prompt that names an existing image file.

    Raises:
        UnsupportedError: it does; no model here sees images.
    """
    for word in text.split():
        candidate = word.strip("'\"()[]<>,")
        if candidate.lower().endswith(_IMAGES) and Path(candidate).expanduser().is_file():
            raise UnsupportedError(
                f"{candidate} is an image, and the models here read text only: describe it in words", param="prompt"
            )


def response_format(text: str) -> dict[str, Any]:
    """Return the response format for ``--format``: ``json``, or a file with a JSON schema.

    Raises:
        InvalidArgumentError: neither.
    """
    if text == "json":
        return {"type": "json_object"}
    path = Path(text).expanduser()
    if not path.is_file():
        raise InvalidArgumentError(
            f"--format {text!r}: write json, or the path of a file with a JSON schema", param="format"
        )
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is not JSON: {error}", param="format") from error
    return {"type": "json_schema", "json_schema": {"name": path.stem, "schema": schema, "strict": True}}
