"""The cache of converted tokenizers: keyed by content, atomic, and never a reason to fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sagellm_core.text.cache import cached_tokenizer, default_cache_dir
from sagellm_core.text.load import load_tokenizer
from sagellm_core.text.tokenizer import TokenizerInfo

_INFO = TokenizerInfo(kind="raw", vocab_size=3)


def test_the_second_time_nothing_is_converted(tmp_path: Path) -> None:
    """Equal content is converted once, other content anew."""
    calls: list[int] = []

    def convert() -> tuple[TokenizerInfo, bytes]:
        calls.append(1)
        return _INFO, b"document"

    for content in ([b"a", b"b"], [b"a", b"b"], [b"ab"]):
        assert cached_tokenizer(content, convert, tmp_path) == (_INFO, b"document")
    assert len(calls) == 2
    assert not list(tmp_path.glob(".tok-*"))


@pytest.mark.parametrize("damage", [b"", b"x", b"cut", b"flip"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: bytes) -> None:
    """A file that is empty, foreign, cut short or altered is replaced."""
    cached_tokenizer([b"a"], lambda: (_INFO, b"document"), tmp_path)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes({b"cut": whole[:-3], b"flip": whole[:-1] + b"!"}.get(damage, damage))
    assert cached_tokenizer([b"a"], lambda: (_INFO, b"document"), tmp_path) == (_INFO, b"document")
    assert entry.read_bytes() == whole


def test_no_place_to_write_is_no_error(tmp_path: Path) -> None:
    """Where nothing can be kept, the conversion is simply done."""
    file = tmp_path / "file"
    file.write_text("")
    assert cached_tokenizer([b"a"], lambda: (_INFO, b"d"), file / "sub") == (_INFO, b"d")


def test_the_default_place_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAGELLM_HOME comes before XDG_CACHE_HOME, which comes before the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SAGELLM_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / ".cache/isagellm/tokenizers"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache_dir() == tmp_path / "x/isagellm/tokenizers"
    monkeypatch.setenv("SAGELLM_HOME", str(tmp_path / "s"))
    assert default_cache_dir() == tmp_path / "s/tokenizers"


def test_cached_and_fresh_tokenizers_are_alike(write_vocabulary: Callable[..., Path], tmp_path: Path) -> None:
    """A tokenizer from the cache has the same facts and gives the same ids."""
    path = write_vocabulary()
    first, second = (load_tokenizer(path, cache_dir=tmp_path / "c") for _ in range(2))
    assert first.info == second.info
    text = "hello w 12 ü<tool><|im_end|>"
    assert first.encode(text) == second.encode(text)


def test_text_needs_no_numpy(write_vocabulary: Callable[..., Path], tmp_path: Path) -> None:
    """Loading a chat model and preparing a chat imports neither numpy nor torch."""
    code = (
        "import sys; from pathlib import Path; from sagellm_core.text import load_chat_model; "
        "from sagellm_protocol.generation import ChatMessage, GenerationRequest; "
        f"m = load_chat_model({str(write_vocabulary())!r}, 'm', cache_dir=Path({str(tmp_path)!r})); "
        "m.prepare(GenerationRequest(request_id='r', model='m', messages=(ChatMessage(role='user', content='hi'),))); "
        "sys.exit(any(name in sys.modules for name in ('numpy', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
