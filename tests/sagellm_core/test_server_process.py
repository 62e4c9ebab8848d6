"""The engine process from its start to its end: where it listens, what it reports, and what ends it."""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from counting import COUNTING, request

from sagellm_core.listener import listen_tcp, listen_unix
from sagellm_protocol import wire
from sagellm_protocol.errors import ErrorCode, InvalidArgumentError, UnavailableError


def test_port_in_use():
    """A taken port is reported with the port and the cure."""
    with listen_tcp("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UnavailableError, match=f"127.0.0.1:{port}.*choose another port"):
            listen_tcp("127.0.0.1", port)


def test_unix_socket_is_private(tmp_path):
    """The socket can be used by its owner only."""
    with listen_unix(tmp_path / "s"):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_unix_socket_of_a_dead_engine_is_replaced(tmp_path):
    """A socket that nobody listens on is replaced; a living one is not, and a file that is no socket never."""
    path = tmp_path / "s"
    listen_unix(path).close()
    with listen_unix(path), pytest.raises(UnavailableError, match="listens on"):
        listen_unix(path)
    plain = tmp_path / "plain"
    plain.write_text("precious")
    with pytest.raises(InvalidArgumentError, match="not a socket"):
        listen_unix(plain)
    assert plain.read_text() == "precious"


def test_long_socket_path(tmp_path):
    """A path that the kernel cannot take is refused with both numbers."""
    with pytest.raises(InvalidArgumentError, match="the kernel takes 107"):
        listen_unix(tmp_path / ("x" * 120))


def run_module(*argv: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if k != "SAGELLM_ENGINE_TOKEN"} | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "sagellm_core.server", *argv]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_tcp_without_token():
    """TCP without a token does not start, and says which variable to set."""
    done = run_module("--config", '{"model":"mock"}', "--tcp", "127.0.0.1:0")
    assert (done.returncode, done.stderr) == (
        3,
        "engine cannot start: --tcp needs a token: set SAGELLM_ENGINE_TOKEN, or use --socket\n",
    )


@pytest.mark.parametrize("config", ["nonsense", '{"model":"mock","colour":1}', '{"model":"/no/such/model.gguf"}'])
def test_bad_configuration(tmp_path, config):
    """A configuration that cannot be used, or a missing model file, is one line on stderr and status 3."""
    done = run_module("--config", config, "--socket", str(tmp_path / "s"))
    assert done.returncode == 3
    assert done.stderr.startswith("engine cannot start: ")
    assert done.stderr.count("\n") == 1


def spawn(
    tmp_path: Path, *extra: str, config: dict[str, object] | None = None, **kwargs
) -> tuple[subprocess.Popen, int]:
    """Start a real process; returns it and the read end of its status pipe."""
    read, write = os.pipe()
    argv = [sys.executable, str(COUNTING), "--config", msgspec.json.encode(config or {}).decode()]
    argv += ["--socket", str(tmp_path / "p.sock"), "--status-fd", str(write), *extra]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, pass_fds=[write, *kwargs.pop("pass_fds", [])], **kwargs)
    os.close(write)
    return process, read


def report_of(read: int) -> wire.StartReport:
    with os.fdopen(read) as pipe:
        return msgspec.json.decode(pipe.readline(), type=wire.StartReport)


def test_process_reports_ready_and_ends_on_sigterm(tmp_path):
    """A process reports its address when it can be reached, ends with 0 on SIGTERM, and removes its socket."""
    process, read = spawn(tmp_path)
    assert report_of(read).address == f"unix://{tmp_path}/p.sock"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "p.sock"))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert not (tmp_path / "p.sock").exists()


def test_start_failure_is_typed(tmp_path):
    """A start that fails ends with 3, one line on stderr without a traceback, and the typed error on the pipe."""
    process, read = spawn(tmp_path, config={"bad_model": True})
    error = report_of(read).error
    _, err = process.communicate(timeout=20)
    assert process.returncode == 3
    assert error.code is ErrorCode.MODEL_FILE
    assert err.decode() == "engine cannot start: weights are truncated at byte 12: fetch the file again\n"


def test_process_ends_with_its_parent_when_asked(tmp_path):
    """With --parent-fd the process ends when the other end is closed, whatever way its parent died."""
    parent_read, parent_write = os.pipe()
    process, read = spawn(tmp_path, "--parent-fd", str(parent_read), pass_fds=[parent_read])
    os.close(parent_read)
    report_of(read)
    os.close(parent_write)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err


@pytest.mark.parametrize("command", [3, 4, 5], ids=["loop blocked", "no progress", "interpreter lock held"])
def test_watchdog_dumps_stacks(tmp_path, command):
    """A process whose work makes no progress, however it hangs, prints the stacks of all threads and ends with 1."""
    process, read = spawn(tmp_path, "--hang-timeout", "1", "--heartbeat", "0.1")
    report_of(read)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "p.sock"))
        submit = wire.Submit(stream=1, request=request(command))
        client.sendall(wire.encode_frame(wire.Hello()) + wire.encode_frame(submit))
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"Timeout (0:00:01)!" in err
    assert b"counting_engine.py" in err or command == 4


def test_watchdog_leaves_work_alone(tmp_path):
    """Slow work that makes progress, and idleness, outlast the watchdog."""
    process, read = spawn(tmp_path, "--hang-timeout", "0.5", "--heartbeat", "0.1", config={"step_s": 0.2})
    report_of(read)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(tmp_path / "p.sock"))
        submit = wire.Submit(stream=1, request=request(max_tokens=8))
        client.sendall(wire.encode_frame(wire.Hello()) + wire.encode_frame(submit))
        decoder, reason, idle_beats = wire.FrameDecoder(), None, 0
        while idle_beats < 8:  # 0.8 s of idleness
            for message in map(wire.decode_from_engine, decoder.feed(client.recv(65536))):
                if isinstance(message, wire.Deltas):
                    reason = message.deltas[-1][1].finish_reason
                elif isinstance(message, wire.Heartbeat) and reason is not None:
                    idle_beats += 1
        assert process.poll() is None
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 0
