"""Pulling from servers that speak the hubs' HTTP, and onto a disk that is really full; by the command, as a user does."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_CONTENT = b"GGUF" + bytes(range(256)) * 4096
_WAIT_S = 30.0


class Hub:
    """A model hub on this machine: the API of Hugging Face and the file addresses of both hubs, with range requests.

    Attributes:
        stall_at: a transfer stops after so many bytes and stays open until `go_on` is set; None: never.
        stalled: set when one does.
        ranges: the range headers of file requests, in order.
        tokens: their authorization headers.
    """

    def __init__(self) -> None:
        outer = self
        self.files = {"m-Q8_0.gguf": _CONTENT, "m-Q4_0.gguf": b"GGUF other", "README.md": b"# M"}
        self.sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}
        self.stall_at: int | None = None
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.ranges: list[str | None] = []
        self.tokens: list[str | None] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/api/models/org/m":
                    outer.info(self)
                elif path.startswith(("/org/m/resolve/abc123/", "/models/org/m/resolve/master/")):
                    outer.file(self, path.rpartition("/")[2])
                else:
                    self.send_error(404)

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def info(self, handler: Any) -> None:
        rows = [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": "0" * 40,
                "lfs": {"sha256": self.sha256[name], "size": len(content), "pointerSize": 1},
            }
            for name, content in self.files.items()
        ]
        body = {"id": "org/m", "sha": "abc123", "siblings": rows, "cardData": {"license": "mit"}, "tags": []}
        data = json.dumps(body).encode()
        handler.send_response(200)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def file(self, handler: Any, name: str) -> None:
        if name not in self.files:
            handler.send_error(404)
            return
        wanted = handler.headers.get("range")
        self.ranges.append(wanted)
        self.tokens.append(handler.headers.get("authorization"))
        start, whole = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0, len(self.files[name])
        rest = self.files[name][start:]
        handler.send_response(206 if wanted else 200)
        if wanted:
            handler.send_header("content-range", f"bytes {start}-{whole - 1}/{whole}")
        handler.send_header("content-length", str(len(rest)))
        handler.end_headers()
        if self.stall_at is not None:
            handler.wfile.write(rest[: self.stall_at])
            rest = rest[self.stall_at :]
            self.stalled.set()
            self.go_on.wait(_WAIT_S)
        handler.wfile.write(rest)


@pytest.fixture
def hub() -> Iterator[Hub]:
    it = Hub()
    yield it
    it.go_on.set()
    it.http.shutdown()
    it.http.server_close()
    it.thread.join()


def start(hub: Hub, home: Path, *args: str, **env: str) -> subprocess.Popen[str]:
    ours = {"SAGELLM_HOME": str(home), "HF_ENDPOINT": hub.url, "SAGELLM_MODELSCOPE_ENDPOINT": hub.url, **env}
    return subprocess.Popen(
        [sys.executable, "-m", "sagellm", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ours},
    )


def pull(hub: Hub, home: Path, *args: str, **env: str) -> tuple[int, str]:
    process = start(hub, home, "pull", *args, **env)
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def listed(hub: Hub, home: Path) -> list[dict[str, Any]]:
    out, _ = start(hub, home, "list", "--json").communicate(timeout=60)
    rows: list[dict[str, Any]] = json.loads(out)
    return rows


def test_a_repository_is_pulled_with_its_hash_and_licence(hub: Hub, tmp_path: Path) -> None:
    """`pull hf:org/m:Q8_0` asks the mirror that HF_ENDPOINT names, sends HF_TOKEN, and stores what the hub's hash says."""
    status, said = pull(hub, tmp_path, "hf:org/m:Q8_0", HF_TOKEN="hf_secret")
    assert status == 0, said
    (row,) = listed(hub, tmp_path)
    assert row["name"] == "m:q8_0"
    assert row["license"] == "mit"
    assert (tmp_path / "blobs" / hub.sha256["m-Q8_0.gguf"]).read_bytes() == _CONTENT
    assert hub.tokens == ["Bearer hf_secret"]
    assert "hf_secret" not in said


@pytest.mark.parametrize("model", ["hf:org/m:Q8_0", "ms:org/m/m-Q8_0.gguf"])
def test_a_killed_download_goes_on(hub: Hub, tmp_path: Path, model: str) -> None:
    """After kill -9 in the middle nothing is installed; the next pull asks for the rest only, and the whole is right."""
    hub.stall_at = 400_000
    process = start(hub, tmp_path, "pull", model)
    assert hub.stalled.wait(_WAIT_S)
    staged = tmp_path / "staging"
    while not any(path.stat().st_size >= 300_000 for path in staged.rglob("*.partial")):
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert listed(hub, tmp_path) == []
    assert not any((tmp_path / "blobs").glob("*"))
    hub.stall_at = None
    status, said = pull(hub, tmp_path, model)
    assert status == 0, said
    assert (tmp_path / "blobs" / hub.sha256["m-Q8_0.gguf"]).read_bytes() == _CONTENT
    first, second = hub.ranges
    assert first is None
    assert int(str(second).removeprefix("bytes=").rstrip("-")) >= 300_000


def test_another_content_than_the_hub_says_is_refused(hub: Hub, tmp_path: Path) -> None:
    """A file that does not hash to what the hub's API announced is deleted, named with both hashes, and not installed."""
    hub.files["m-Q8_0.gguf"] = b"GGUF" + b"x" * 100
    status, said = pull(hub, tmp_path, "hf:org/m:Q8_0")
    assert status == 1
    assert hub.sha256["m-Q8_0.gguf"] in said
    assert listed(hub, tmp_path) == []
    assert not any((tmp_path / "blobs").glob("*"))


def test_what_the_hub_does_not_have_is_one_line(hub: Hub, tmp_path: Path) -> None:
    """An unknown repository, an unknown quantisation and a hub that is not there are errors with a cure, without a traceback."""
    cases: list[tuple[str, str, dict[str, str]]] = [
        ("hf:org/other", "check the name", {}),
        ("hf:org/m:Q2_K", "m-Q8_0.gguf", {}),
        ("hf:org/m:Q8_0", "HF_ENDPOINT", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        ("ms:org/m/none.gguf", "404", {}),
    ]
    for model, words, env in cases:
        status, said = pull(hub, tmp_path, model, **env)
        assert status == 1
        assert words in said
        assert "Traceback" not in said


def _may_mount() -> bool:
    unshare = shutil.which("unshare")
    return (
        unshare is not None
        and subprocess.run([unshare, "-rm", "true"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not _may_mount(), reason="a small disk needs a mount namespace")
@pytest.mark.parametrize("source", ["file", "url"])
def test_a_disk_that_is_full_keeps_the_store_whole(hub: Hub, tmp_path: Path, source: str) -> None:
    """On a disk of 512 kB a model of 1 MB is refused with the number and the cure, and the store stays empty and usable."""
    disk, local, small = tmp_path / "disk", tmp_path / "big.gguf", tmp_path / "small.gguf"
    disk.mkdir()
    local.write_bytes(_CONTENT)
    small.write_bytes(b"GGUF small")
    model = str(local) if source == "file" else f"{hub.url}/org/m/resolve/abc123/m-Q8_0.gguf"
    sage = f"{sys.executable} -m sagellm"
    script = (
        f"mount -t tmpfs -o size=512k tmpfs {disk} && export SAGELLM_HOME={disk}; {sage} pull {model}; echo status=$?; "
        f"{sage} list --json; rm -rf {disk}/staging; {sage} pull {small}; echo status=$?; {sage} list --json"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=90, check=False
    )
    first, second, third = done.stdout.partition("status=1")[2].partition("status=0")
    assert second, done.stdout + done.stderr
    assert "is full" in done.stderr
    assert "SAGELLM_HOME" in done.stderr
    assert json.loads(first[: first.index("]") + 1]) == []
    assert [row["name"] for row in json.loads(third)] == ["small:latest"]
