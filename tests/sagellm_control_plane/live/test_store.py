"""The store: nothing acknowledged is lost, whoever is killed."""

import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sagellm_control_plane.live import store as store_module
from sagellm_control_plane.live.lifecycle import EngineSpec, RestartPolicy
from sagellm_control_plane.live.store import EngineRecord, ProcessRecord, Store
from sagellm_protocol.errors import ResourceExhaustedError, UnavailableError

SPEC = EngineSpec(engine_id="a", model_id="m", config={"model": "mock", "n": 1}, restart=RestartPolicy(max_attempts=2))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "control.db"


@pytest.fixture
def store(path):
    opened = Store(path)
    yield opened
    opened.close()


def process(engine_id: str = "a", owner: str = "me") -> ProcessRecord:
    return ProcessRecord(
        engine_id=engine_id, pid=7, identity="b:7:1", address="/s", token="", started_at=2.0, owner=owner, spec=SPEC
    )


def test_engines_survive_reopening(store, path):
    """Engines come back as they were put, oldest first, with their desired state."""
    foreign = EngineRecord(engine_id="f", model_id="x", host="h", port=80, metadata={"k": [1, None]}, created_at=1.0)
    managed = EngineRecord(engine_id="a", model_id="m", spec=SPEC, created_at=2.0)
    store.put_engine(managed)
    store.put_engine(foreign)
    assert store.set_desired("a", "stopped")
    assert not store.set_desired("nobody", "stopped")
    store.close()
    again = Store(path)
    one, two = again.engines()
    assert one == foreign
    assert (two.spec, two.desired) == (SPEC, "stopped")
    assert again.remove_engine("f")
    assert not again.remove_engine("f")
    again.close()


def test_file_is_private(store, path):
    """The file is for its owner only: it holds the engines' tokens."""
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def test_processes(store):
    """A process is noted, taken over once, and forgotten."""
    store.put_process(process())
    assert store.processes() == [process()]
    assert store.claim_process("a", "me", "you")
    assert not store.claim_process("a", "me", "somebody else")
    assert store.processes()[0].owner == "you"
    store.remove_process("a")
    assert store.processes() == []


def test_reservations(store, path):
    """Nothing is reserved twice, what an engine holds counts, and reservations survive a restart."""
    gpus = ["0", "1", "2"]
    assert store.reserve("gpu", "a", gpus, 2) == ["0", "1"]
    assert store.reserve("gpu", "a", gpus, 2) == ["0", "1"]
    other = Store(path)
    with pytest.raises(ResourceExhaustedError, match=r"'b' needs 2 of kind gpu, 1 of 3 can be had"):
        other.reserve("gpu", "b", gpus, 2)
    assert other.reserve("gpu", "b", gpus) == ["2"]
    assert other.reserve("port", "b", ["8902", "8903"], usable=lambda port: port != "8902") == ["8903"]
    store.release("a")
    assert other.reservations() == [("gpu", "2", "b"), ("port", "8903", "b")]
    other.close()


def test_a_failed_reservation_reserves_nothing(store):
    """When too few are free none of them stays reserved."""
    with pytest.raises(ResourceExhaustedError):
        store.reserve("gpu", "a", ["0", "1"], 3)
    assert store.reservations() == []


def test_newer_schema(store, path):
    """A store of a newer release is refused with both numbers, and not touched."""
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA user_version = 99")
    raw.close()
    with pytest.raises(UnavailableError, match="schema 99, this release knows 1: upgrade"):
        Store(path)


def test_migration_keeps_what_is_there(store, path, monkeypatch):
    """A new release adds to the schema without losing a row, and a failing step changes nothing."""
    store.put_engine(EngineRecord(engine_id="a", model_id="m"))
    good = ("ALTER TABLE engines ADD COLUMN colour TEXT",)
    monkeypatch.setattr(store_module, "MIGRATIONS", (*store_module.MIGRATIONS, (*good, "NONSENSE")))
    with pytest.raises(UnavailableError, match="cannot be used"):
        Store(path)
    monkeypatch.setattr(store_module, "MIGRATIONS", (*store_module.MIGRATIONS[:1], good))
    migrated = Store(path)
    assert [e.engine_id for e in migrated.engines()] == ["a"]
    assert migrated._db.execute("SELECT colour FROM engines").fetchall() == [(None,)]
    migrated.close()


def test_damaged_file(tmp_path):
    """A file that is no database is refused with the cure."""
    (tmp_path / "x.db").write_bytes(b"this is not a database, not at all" * 100)
    with pytest.raises(UnavailableError, match="move it away"):
        Store(tmp_path / "x.db")


def test_unwritable_place():
    """A place that cannot be written is an error of our tree."""
    with pytest.raises(UnavailableError, match="cannot be opened"):
        Store(Path("/proc/nothing/x.db"))


WRITER = """
import sys
from pathlib import Path
from sagellm_control_plane.live.store import EngineRecord, Store
store, name = Store(Path(sys.argv[1])), sys.argv[2]
for k in range(100_000):
    store.put_engine(EngineRecord(engine_id=f"{name}-{k}", model_id="m"))
    print(k, flush=True)
    if k % 3 == 0:
        store.remove_engine(f"{name}-{k}")
        print(-k - 1, flush=True)
"""


def test_killed_writers_lose_nothing_acknowledged(path):
    """Two writers are killed by SIGKILL at random instants, again and again: every acknowledged change is there."""
    rng = random.Random(5)
    for turn in range(4):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(path), f"w{turn}-{i}"], stdout=subprocess.PIPE, text=True
            )
            for i in range(2)
        ]
        for writer in writers:
            writer.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.3))
        expected: dict[str, set[int]] = {}
        for i, writer in enumerate(writers):
            writer.kill()
            said = [int(line) for line in writer.stdout.read().splitlines() if line.strip()]
            writer.wait()
            writer.stdout.close()
            expected[f"w{turn}-{i}"] = {0, *said}
        store = Store(path)
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        there = {e.engine_id for e in store.engines()}
        for name, said in expected.items():
            last = max(said)
            for k in range(last + 1):
                removed = k % 3 == 0
                if k < last:
                    assert (f"{name}-{k}" in there) is not removed, f"{name}-{k} of {last}"
                elif not removed:
                    assert f"{name}-{k}" in there
        store.close()
