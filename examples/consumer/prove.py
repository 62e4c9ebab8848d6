"""Run the consumer on the shims, migrate it, run it again; exit non-zero if anything is not as promised (see README.md)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
SHIMS = [REPOSITORY / "shims" / name / "src" for name in ("isage-llm-core", "isage-llm-gateway")]
CLI = [sys.executable, "-m", "sagellm"]


def main() -> None:
    """Go through the three phases."""
    with tempfile.TemporaryDirectory() as folder, engine() as engine_port:
        app = Path(folder) / "consumer"
        shutil.copytree(HERE, app, ignore=shutil.ignore_patterns("prove.py", "__pycache__"))
        print("1. on the shims")
        before = run_application(app, engine_port, path=SHIMS)
        expect("it warns", before.stderr.count("DeprecationWarning: sage.llm") >= 3)
        run_tests(app, path=SHIMS)
        expect("arch is red", sage_llm("arch", str(app)).returncode == 1)
        expect("migrate --check is red", sage_llm("migrate", str(app), "--check").returncode == 1)

        print("2. migrate")
        report = sage_llm("migrate", str(app))
        print("   " + report.stdout.strip().replace("\n", "\n   "))
        expect("nothing is left", report.returncode == 0)

        print("3. without the shims")
        after = run_application(app, engine_port, path=[])
        expect("no warning", "Warning" not in after.stderr)
        expect("the same output", after.stdout == before.stdout)
        run_tests(app, path=[])
        expect("arch is green", sage_llm("arch", str(app)).returncode == 0)
        expect("migrate --check is green", sage_llm("migrate", str(app), "--check").returncode == 0)
        expect("requirements name isagellm alone", "isage-llm" not in (app / "requirements.txt").read_text())
    print("all as promised")


def expect(what: str, holds: bool) -> None:
    """Say whether it holds; stop if not."""
    print(f"   {'yes' if holds else 'NO '} {what}")
    if not holds:
        raise SystemExit(1)


def environment(path: list[Path], **more: str) -> dict[str, str]:
    """Environment whose Python sees `path` first and shows every deprecation."""
    return (
        os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONWARNINGS": "always::DeprecationWarning"}
        | more
    )


def sage_llm(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return subprocess.run([*CLI, *argv], capture_output=True, text=True, check=False)


def run_tests(app: Path, path: list[Path]) -> None:
    """Run the application's own tests."""
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(argv, cwd=app, env=environment([*path, app]), capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr)
    expect("its tests pass", done.returncode == 0)


def run_application(app: Path, engine_port: int, path: list[Path]) -> subprocess.CompletedProcess[str]:
    """Start the service, run the command line against it, return what that printed (and the warnings of both)."""
    port = free_port()
    env = environment([*path, app], ENGINE_PORT=str(engine_port))
    argv = [sys.executable, "-m", "consumer.service", str(port)]
    with running(argv, f"http://127.0.0.1:{port}/ready", env=env) as errors:
        cli = [sys.executable, "-m", "consumer.cli", f"http://127.0.0.1:{port}"]
        done = subprocess.run(cli, env=env, capture_output=True, text=True, check=False, timeout=60)
        done.stderr += errors.read_text()
    if done.returncode:
        print(done.stdout, done.stderr)
    expect("the application answers", done.returncode == 0)
    return done


@contextmanager
def engine() -> Iterator[int]:
    """An OpenAI-compatible engine: our own server on the simulated device."""
    port = free_port()
    with running(
        [*CLI, "serve", "--mock", "--port", str(port)], f"http://127.0.0.1:{port}/ready", env=dict(os.environ)
    ):
        yield port


@contextmanager
def running(argv: list[str], ready_url: str, env: dict[str, str]) -> Iterator[Path]:
    """A process, from the moment it is ready; yields the file with its standard error."""
    with tempfile.NamedTemporaryFile("w", suffix=".err") as errors:
        process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            wait_until_ready(process, ready_url, Path(errors.name))
            yield Path(errors.name)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, errors: Path) -> None:
    """Poll `url` until it answers 200."""
    for _ in range(600):
        if answers(url):
            return
        if process.poll() is not None:
            raise SystemExit(f"{process.args} ended with {process.returncode}: {errors.read_text()}")
        time.sleep(0.1)
    raise SystemExit(f"{url} did not answer within 60 s")


def answers(url: str) -> bool:
    """Whether a GET of `url` gives 200."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
