"""The terminal of `sage-llm run`, and that of `top`, in a real pseudo-terminal; its conversation and its Markdown without one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.cli.markdown import Renderer
from sagellm.cli.session import Session, SessionOverError, response_format
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError

# As a shell starts a program: with a controlling terminal, and with Ctrl-C not ignored (a job in the background ignores it).
_WITH_CONTROLLING_TERMINAL = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from sagellm.cli.main import main
sys.exit(main())
"""
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


class Terminal:
    """A command behind a pseudo-terminal of 80 columns."""

    def __init__(self, home: Path, *args: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        env = {**os.environ, "SAGELLM_HOME": str(home), "TERM": "xterm", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WITH_CONTROLLING_TERMINAL, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, pattern: str, timeout: float = 60.0) -> str:
        """Read until the regular expression is on the screen; return what was seen since the last call."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, ANSI.sub("", self.seen)):
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not appear in {ANSI.sub('', self.seen)!r}"
            try:
                chunk = os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                status, screen = self.process.wait(30), ANSI.sub("", self.seen)
                pytest.fail(f"the program ended with status {status} before {pattern!r} appeared; it showed {screen!r}")
            if "\x1b[6n" in chunk:  # the cursor's position is asked for: answer as a terminal does
                os.write(self.master, b"\x1b[1;1R")
            self.seen += chunk
        seen, self.seen = ANSI.sub("", self.seen), ""
        return seen

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                self.process.kill()
        self.process.wait()
        os.close(self.master)
        return self.process.returncode


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    it = Terminal(tmp_path, "run", "mock", "--seed", "1", "--max-tokens", "60", "-v")
    yield it
    it.close()


def leave(terminal: Terminal) -> int:
    terminal.type("/bye\r")
    deadline = time.monotonic() + 60
    while terminal.process.poll() is None and time.monotonic() < deadline:
        ready, _, _ = select.select([terminal.master], [], [], 0.2)
        if ready:
            with contextlib.suppress(OSError):
                os.read(terminal.master, 65536)
    return terminal.process.wait(30)


def test_a_conversation_in_a_terminal(terminal: Terminal) -> None:
    """Question, answer, slash commands, several lines and goodbye work in a real terminal, and status is 0."""
    terminal.wait_for(">>>")
    terminal.type("hello\r")
    assert "decode" in terminal.wait_for("peak resident memory")
    terminal.wait_for(">>>")
    terminal.type("/set temperature 0.5\r")
    terminal.wait_for(r"temperature = 0\.5")
    terminal.type('"""first\r')
    terminal.wait_for(r"\.\.\.")
    terminal.type('second"""\r')
    terminal.wait_for("peak resident memory")
    terminal.type("/show\r")
    assert "turns    4" in terminal.wait_for("turns    4")
    terminal.type("/nonesuch\r")
    terminal.wait_for("no command /nonesuch")
    assert leave(terminal) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    """Ctrl-C in the middle of an answer brings the prompt back; the conversation goes on."""
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"rules": [{"reply": [{"drip_ms": 20}, {"say": "one two three four five " * 200}]}]}))
    terminal = Terminal(tmp_path, "run", "mock", "--max-tokens", "4000", "--script", str(script))
    try:
        terminal.wait_for(">>>")
        terminal.type("talk for long\r")
        terminal.wait_for(r"long\s+[a-z]+ [a-z]+ [a-z]+ ")  # the answer is under way
        terminal.type("\x03")
        terminal.wait_for(r"\(stopped\)")
        terminal.type("/show\r")
        terminal.wait_for("turns    2")
        terminal.wait_for(">>>")
        terminal.type("\x03\x03")  # at the prompt: nothing happens
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.type("never asked\r\x03")  # right behind Enter, where it is a key
        terminal.wait_for(r"\(stopped\)")
        terminal.type("/show\r")
        terminal.wait_for("turns    2")
        terminal.type(
            "/set seed 1\rtyped ahead\r\x03/set seed 2\r"
        )  # what was typed ahead is taken back, what comes later stays
        terminal.wait_for("seed = 2")
        terminal.type("/show\r")
        terminal.wait_for("turns    2")
        terminal.type("/help\r")
        terminal.wait_for("/bye")
        assert leave(terminal) == 0
    finally:
        terminal.close()


def test_a_resized_terminal_goes_on(terminal: Terminal) -> None:
    """A change of the window's size during an answer does not disturb it."""
    terminal.wait_for(">>>")
    terminal.type("hello\r")
    fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 30, 0, 0))
    os.kill(terminal.process.pid, signal.SIGWINCH)
    terminal.wait_for("peak resident memory")
    assert leave(terminal) == 0


def test_top_shows_the_server_until_ctrl_c(mock_server: Any, tmp_path: Path) -> None:
    """The first picture comes at once, later ones have rates, none is wider than the terminal, Ctrl-C leaves with status 0."""
    top = Terminal(tmp_path, "top", "--url", mock_server.root_url, "--every", "0.1")
    first = top.wait_for(r"KV BLOCKS\n.*\] 0 of \d+\n")
    assert "done (-)" in first
    later = top.wait_for(r"done \(\d+\.\d/s\)[^#]*KV BLOCKS\n.*\] 0 of \d+\n")
    assert "mock" in later
    assert max(len(line) for line in (first + later).splitlines()) <= 80
    top.type("\x03")
    assert top.process.wait(30) == 0
    top.close()


def test_output_that_is_no_terminal_has_no_colours() -> None:
    """Into a pipe go plain text and nothing else; the prompt may come from a pipe too."""
    done = subprocess.run(
        [sys.executable, "-m", "sagellm", "run", "mock", "--seed", "1", "--max-tokens", "30"],
        input="hello",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "\x1b" not in done.stdout


def session() -> Session:
    return Session("m", lambda name: name)


def test_a_conversation_survives_save_and_load(tmp_path: Path) -> None:
    """What /save writes /load brings back: turns, system message and options."""
    one = session()
    one.command("/system be brief")
    one.command("/set top_k 5")
    one.ask("hello")
    one.answered("hi")
    one.command(f"/save {tmp_path / 'c.json'}")
    other = session()
    assert "2 turns" in other.command(f"/load {tmp_path / 'c.json'}")
    assert other.messages() == one.messages()
    assert other.options == {"top_k": 5}


@pytest.mark.parametrize("line", ["/nope", "/set nope 1", "/set top_k many", "/save", "/load"])
def test_wrong_commands_are_explained(line: str) -> None:
    """An unknown command, option or value is an error that says what is known."""
    with pytest.raises(InvalidArgumentError):
        session().command(line)


def test_the_other_commands() -> None:
    """/set without a value restores the default, /clear forgets, /model switches, /bye leaves."""
    it = session()
    it.command("/set seed 3")
    it.command("/set seed")
    assert it.options == {}
    it.ask("x")
    it.answered("y")
    it.command("/clear")
    assert it.messages() == []
    assert it.command("/model other") == "talking to other"
    assert "temperature" in it.command("/set")
    assert it.command("/stats") == "no answer yet"
    with pytest.raises(SessionOverError):
        it.command("/bye")


def test_a_question_without_an_answer_is_taken_back() -> None:
    """When an answer never began, the conversation is as before."""
    it = session()
    it.ask("x")
    it.answered("")
    assert it.turns == []


def test_images_are_refused_by_name(tmp_path: Path) -> None:
    """A prompt that names an existing image file is refused; a word that only looks like one is not."""
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"\x89PNG")
    with pytest.raises(UnsupportedError, match=r"cat\.png is an image"):
        session().ask(f"what is in {picture}?".replace("?", " ?"))
    session().ask("what does image.png mean?")


def test_format_is_json_or_a_schema(tmp_path: Path) -> None:
    """--format takes the word json or a file; anything else says so."""
    assert response_format("json") == {"type": "json_object"}
    path = tmp_path / "city.json"
    path.write_text(json.dumps({"type": "object"}))
    assert response_format(str(path))["json_schema"]["schema"] == {"type": "object"}
    path.write_text("{")
    for bad in (str(path), "xml"):
        with pytest.raises(InvalidArgumentError):
            response_format(bad)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_markdown_is_rendered() -> None:
    """Headings, bullets, bold, italic, code and fences lose their marks and gain colours."""
    it = Renderer(colour=True)
    out = it.push("# Title\n- **bold** and *slanted* `code`\n2 * 3\n```python\nx = 1*2\n```\nend") + it.finish()
    assert plain(out) == "Title\n• bold and slanted code\n2 * 3\n```python\nx = 1*2\n```\nend"
    assert "\x1b[1;34m" in out


@given(st.text(alphabet="ab #*`->\n1.", max_size=60), st.integers(1, 5))
def test_markdown_does_not_depend_on_the_pieces(text: str, size: int) -> None:
    """However the text is cut into pieces, the same is shown."""
    whole, pieces = Renderer(colour=True), Renderer(colour=True)
    expected = whole.push(text) + whole.finish()
    got = "".join(pieces.push(text[k : k + size]) for k in range(0, len(text), size)) + pieces.finish()
    assert plain(got) == plain(expected)


@given(st.text(max_size=80))
def test_a_model_cannot_write_escape_codes(text: str) -> None:
    """Control characters of the model never reach the terminal."""
    it = Renderer(colour=False)
    out = it.push("\x1b]0;title\x07" + text) + it.finish()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)
