"""The commands as a user runs them, each in a process of its own."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from sagellm import UnifiedInferenceClient, catalogue, settings
from sagellm.cli import own_key
from sagellm.cli.completion import following
from sagellm.cli.failures import describe
from sagellm.cli.launch import TARGETS
from sagellm.cli.main import COMMANDS, main
from sagellm_protocol.errors import InternalError, InvalidArgumentError

ROOT = Path(__file__).parents[3]


def run(*args: str, env: dict[str, str] | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sagellm", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, **(env or {})},
    )


@pytest.mark.slow
def test_help_is_instant_and_lists_every_command() -> None:
    """`--help` costs less than 150 ms more than an empty interpreter, and names all commands."""

    def seconds(*args: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *args], capture_output=True, check=True)
        return time.perf_counter() - started

    pairs = [(seconds("-c", "pass"), seconds("-m", "sagellm", "--help")) for _ in range(7)]
    # On a busy machine both wait: the least of each is the program itself.
    assert min(b for _, b in pairs) - min(a for a, _ in pairs) < 0.150
    text = run("--help").stdout
    assert all(name in text for name in COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    """Neither numpy, tokenizers, an HTTP library, rich nor typer is loaded for `--help`."""
    code = (
        "import sys; from sagellm.cli.main import main; main(['--help']);"
        "heavy = {'numpy', 'tokenizers', 'httpx2', 'rich', 'typer', 'prompt_toolkit', 'msgspec', 'jinja2'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_describes_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`COMMAND --help` ends with 0 and a usage line."""
    assert main([name, "--help"]) == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_options_stand_in_their_groups(capsys: pytest.CaptureFixture[str]) -> None:
    """`serve --help` and the page of the command line show each group of options under its name."""
    assert main(["serve", "--help"]) == 0
    groups = re.findall(r"^(\w[\w ]*):$", capsys.readouterr().out, re.MULTILINE)
    assert {"Arguments", "Network", "Access", "Control plane", "Sizes", "Device", "KV cache"} <= set(groups)
    assert len(groups) == len(set(groups))
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(f"**{group}**" in page for group in set(groups) - {"Arguments", "Options"})


def test_doctor_has_twenty_checks_each_with_a_cure(tmp_path: Path) -> None:
    """At least 20 checks run, and every one that is not ok says what mends it."""
    done = run("doctor", "--offline", "--json", env={"SAGELLM_HOME": str(tmp_path / "new")})
    findings = json.loads(done.stdout)
    assert len(findings) >= 20
    assert all(f["cure"] for f in findings if f["state"] in {"warn", "fail"})
    assert {f["check"]: f["state"] for f in findings}["stored models"] == "warn"
    assert done.returncode == (1 if any(f["state"] == "fail" for f in findings) else 0)


def test_doctor_sees_what_is_wrong(tmp_path: Path) -> None:
    """A damaged model, a broken configuration, an unknown variable and a proxy are found, and the status is 1."""
    home = tmp_path / "home"
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF" * 10)
    assert run("pull", str(model), env={"SAGELLM_HOME": str(home)}).returncode == 0
    (home / "models" / "m" / "latest" / "m.gguf").write_bytes(b"x")
    config = tmp_path / "config.toml"
    config.write_text("[serve]\nporrt = 1\n")
    env = {
        "SAGELLM_HOME": str(home),
        "SAGELLM_CONFIG": str(config),
        "SAGELLM_PROT": "1",
        "HTTP_PROXY": "http://proxy:1",
        "NO_PROXY": "",
        "no_proxy": "",
    }
    done = run("check", "--offline", "--json", env=env)
    states = {f["check"]: f["state"] for f in json.loads(done.stdout)}
    assert done.returncode == 1
    assert states["stored models"] == states["configuration file"] == "fail"
    assert states["environment variables"] == states["proxy"] == "warn"


def test_settings_come_from_file_then_environment_then_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later source stands over an earlier one, and every value knows where it is from."""
    config = tmp_path / "config.toml"
    config.write_text(
        '[serve]\nport = 1\npolicy = "fifo"\nengines = 2\nmodels = ["a", "b"]\naccess_log = true\ndiscover = true\n'
    )
    monkeypatch.setenv("SAGELLM_CONFIG", str(config))
    monkeypatch.setenv("SAGELLM_PORT", "2")
    monkeypatch.setenv("SAGELLM_ENGINES", "3")
    values = settings.resolve({"engines": 4, "ctx": None, "access_log": False, "discover": None})
    found = {name: (value.value, value.origin) for name, value in values.items()}
    assert found["policy"] == ("fifo", "file")
    assert found["port"] == (2, "environment")
    assert found["engines"] == (4, "flag")
    assert found["access_log"] == (False, "flag")
    assert found["discover"] == (True, "file")
    assert found["host"] == ("127.0.0.1", "default")
    assert found["models"] == (["a", "b"], "file")
    monkeypatch.setenv("SAGELLM_PORT", "many")
    with pytest.raises(InvalidArgumentError, match="SAGELLM_PORT"):
        settings.resolve()


@pytest.mark.parametrize(
    "text", ["not toml", "[other]\n", "[serve]\nnope = 1\n", '[serve]\nport = "x"\n', "[serve]\nport = true\n"]
)
def test_a_wrong_configuration_file_is_refused(tmp_path: Path, text: str) -> None:
    """What cannot be read is named with the file."""
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=re.escape(str(path))):
        settings.load_file(path)


def test_config_shows_origins_and_resets(tmp_path: Path) -> None:
    """`config show --origin` says where a value is from; `reset` moves the file aside and keeps it."""
    config = tmp_path / "config.toml"
    config.write_text("[serve]\nport = 4711\n")
    env = {"SAGELLM_CONFIG": str(config)}
    assert re.search(r"port +4711 +file", run("config", "show", "--origin", env=env).stdout)
    assert run("config", "path", env=env).stdout.strip() == str(config)
    assert run("config", "reset", "--yes", env=env).returncode == 0
    assert not config.exists()
    assert list(tmp_path.glob("config.toml.*.bak"))


def test_keys_are_made_listed_and_revoked_while_a_server_runs(start_server: Any, tmp_path: Path) -> None:
    """With a key in the state file the server wants one; a revoked key no longer opens."""
    state = str(tmp_path / "state.sqlite")
    made = run("keys", "add", "me", "--role", "admin", "--state", state)
    secret = made.stdout.splitlines()[1]
    server = start_server("--mock", "--state", state, "--require-key")
    url = ("--url", server.root_url)
    assert "key" in run("ps", *url).stderr
    assert "READY" in run("ps", *url, "--api-key", secret).stdout
    assert run("keys", "revoke", "me", "--state", state).returncode == 0
    assert json.loads(run("keys", "list", "--state", state, "--json").stdout)[0]["revoked"]
    deadline = time.monotonic() + 60
    while run("ps", *url, "--api-key", secret).returncode == 0:
        assert time.monotonic() < deadline, "the revoked key still opens"


def test_keys_from_a_file_open_the_server(start_server: Any, tmp_path: Path) -> None:
    """--api-key-file lets its keys in and nobody else; an empty file is refused."""
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-test-0123456789abcdef0123456789abcdef\n")
    server = start_server("--mock", "--state", str(tmp_path / "state.sqlite"), "--api-key-file", str(file))
    with httpx2.Client() as http:
        assert http.get(f"{server.base_url}/models").status_code == 401
        headers = {"authorization": "Bearer sk-test-0123456789abcdef0123456789abcdef"}
        assert http.get(f"{server.base_url}/models", headers=headers).status_code == 200
    file.write_text("# none\n")
    assert (
        "has no key"
        in run("serve", "--mock", "--port", "0", "--api-key-file", str(file), "--state", str(tmp_path / "s")).stderr
    )


@pytest.mark.parametrize("needs_key", [False, True])
def test_the_printed_request_works_as_it_is(start_server: Any, tmp_path: Path, needs_key: bool) -> None:
    """The curl line of a start, pasted, is answered; where a key is needed it takes that of SAGE_UNIFIED_API_KEY."""
    file, secret = tmp_path / "keys", "sk-test-0123456789abcdef0123456789abcdef"
    file.write_text(secret)
    extra = ["--api-key-file", str(file)] if needs_key else []
    server = start_server("--mock", "--state", str(tmp_path / "state.sqlite"), *extra)
    deadline = time.monotonic() + 60
    while not (lines := [line for line in server.output if line.startswith("try ")]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    env = {**os.environ, "SAGE_UNIFIED_API_KEY": secret}
    argv = ["bash", "-c", lines[0].removeprefix("try ")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_own_commands_need_no_key(start_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may write the server's state operates it without being told a key; who may not is told what to type, and so is another user."""
    mine, theirs = ({"XDG_STATE_HOME": str(tmp_path / name), "SAGE_UNIFIED_API_KEY": ""} for name in ("mine", "theirs"))
    server = start_server("--mock", env=mine)
    url = ("--url", server.root_url)
    assert own_key.own_key(server.base_url) is None, "no keys, none needed"
    run("keys", "add", "somebody", env=mine)
    assert "READY" in run("ps", *url, env=mine).stdout
    file = tmp_path / "mine" / "isagellm" / "gateway.key"
    assert file.stat().st_mode & 0o777 == 0o600
    first = file.read_text()
    assert run("chat", "mock", *url, "--max-tokens", "3", env=mine, stdin="hello").stdout.strip()
    refused = run("ps", *url, env=theirs)
    assert refused.returncode == 1
    assert "no API key" in refused.stderr
    assert "keys add NAME --role admin" in refused.stderr
    run("keys", "revoke", f"commands of {getpass.getuser()}", env=mine)
    assert "READY" in run("ps", *url, env=mine).stdout
    assert file.read_text() != first
    monkeypatch.setenv("XDG_STATE_HOME", mine["XDG_STATE_HOME"])
    assert own_key.own_key(server.base_url) == file.read_text().strip()
    assert own_key.own_key("http://192.0.2.1:8889/v1") is None
    assert own_key.own_key("http://example.org/v1") is None
    with monkeypatch.context() as other:
        other.setattr(own_key.os, "getuid", lambda: 12345)
        assert own_key.own_key(server.base_url) is None, "the listener is another user's"
    assert "no key is left" in run("keys", "revoke", "somebody", env=mine).stdout
    assert all(row["revoked"] for row in json.loads(run("keys", "list", "--json", env=mine).stdout))


def test_the_first_served_model_is_taken_where_none_is_named(start_server: Any) -> None:
    """Of several models the one that was named first answers: in the client, in chat and in bench."""
    server = start_server("--mock", "zebra=mock", "ant=mock")
    with UnifiedInferenceClient(server.base_url) as client:
        assert client.models() == ["zebra", "ant"]
        assert client.first_model() == "zebra"
    done = run("bench", "latency", "--url", server.root_url, "--requests", "1", "--output-tokens", "2", "--json")
    assert json.loads(done.stdout)["model"] == "zebra"


@pytest.mark.slow
@pytest.mark.model
def test_a_running_server_is_operated(start_server: Any) -> None:
    """Engines are listed, started, shown, stopped; top and chat see the server."""
    server = start_server("--mock")
    url = ("--url", server.root_url)
    assert "smollm2:135m" in run("engine", "start", "smollm2:135m", *url).stdout
    rows = json.loads(run("ps", "--json", *url).stdout)
    assert sorted(row["model_id"] for row in rows) == ["mock", "smollm2:135m"]
    assert "KV BLOCKS" in run("top", *url).stdout
    assert json.loads(run("engine", "show", "mock", "--json", *url).stdout)["state"] == "READY"
    assert "stopped" in run("stop", "smollm2:135m", *url).stdout
    assert run("chat", "mock", *url, "--max-tokens", "5", stdin="hello").stdout.strip()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("serve --mock-scale 2", "--mock-scale belongs to --mock"),
        ("serve --script replies.json", "--script belongs to --mock"),
        ("serve --spill-size 1GB", "--spill-size belongs to --spill"),
        ("run mock hi --spec ngram --draft-model x", "--draft-model belongs to --spec draft"),
        ("run mock hi --quant q3", "use one of auto, q4, q8"),
        ("serve --kv-dtype fp8", "use one of auto, f32"),
        ("run mock hi --spec lookahead", "use one of none, ngram, draft"),
        ("demo --mock --backend cpu", "--backend cpu does not"),
        ("bench serve mock --rate 1 --speedup 2", "--speedup: it belongs to --trace"),
        ("bench serve mock --trace x.jsonl --prompt-tokens 3", "--prompt-tokens: the trace says"),
        ("bench serve mock --concurrency 1 --pattern constant", "belongs to --rate"),
        ("bench latency --url http://127.0.0.1:9 --mock-scale 2", "--url names a server"),
        ("bench latency mock --api-key x", "--api-key is of a server"),
        ("logs --follow", "name it"),
        ("explain --page --json", "--page"),
    ],
)
def test_flags_that_mean_nothing_are_refused(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag without the one that it belongs to, or beside one that contradicts it, and an unknown word: by name, before anything is loaded."""
    assert main(line.split()) == 1
    assert says in capsys.readouterr().err


def test_nobody_there_is_one_line() -> None:
    """Commands that need a server say how to start one."""
    done = run("ps", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "sage-llm serve" in done.stderr
    assert "explain server-silent" in done.stderr


@pytest.mark.model
def test_show_says_what_a_model_is(default_model_path: Path, minilm_model_path: Path) -> None:
    """Architecture, parameters, context, quantisation and template of a chat model and of an encoder."""
    facts = json.loads(run("show", str(default_model_path), "--json").stdout)
    assert (facts["architecture"], facts["quantisation"], facts["context"]) == ("llama", "Q4_1", 8192)
    assert 134e6 < facts["parameters"] < 135e6
    assert "<|im_start|>" in run("show", str(default_model_path), "--template").stdout
    assert json.loads(run("show", str(minilm_model_path), "--json").stdout)["kind"] == "embedding"


def test_completion_offers_what_may_follow() -> None:
    """Commands, sub-commands, options and models are offered; each shell gets a script."""
    assert "serve" in following([])
    assert "revoke" in following(["keys"])
    assert "--state" in following(["keys", "add"])
    assert "--kv-dtype" in following(["serve"])
    assert "--speedup" in following(["simulate"])
    assert {"--check", "--json"} <= set(following(["migrate"]))
    assert "smollm2:135m" in following(["pull"])
    assert following(["nonesuch"]) == []
    for shell in ("bash", "zsh", "fish"):
        assert "sage-llm" in run("completion", shell).stdout
    assert run("completion", "tcsh").returncode == 1
    checked = subprocess.run(["bash", "-n"], input=run("completion", "bash").stdout, text=True, check=False)
    assert checked.returncode == 0


_ASK = {
    "bash": 'source <(sage-llm completion bash); COMP_LINE="$1"; COMP_POINT=${#1}; _sage_llm; printf "%s\\n" "${COMPREPLY[@]}"',
    "zsh": """autoload -U compinit; compinit -D -u; compdef() { }; source <(sage-llm completion zsh)
        compadd() { print -l -- ${(M)words_:#${words[CURRENT]}*} }
        words=(${=1}); [[ $1 == *" " ]] && words+=(""); CURRENT=$#words; _sage_llm""",
    "fish": "sage-llm completion fish | source; complete -C $argv[1]",
}


@pytest.mark.parametrize("shell", sorted(_ASK))
def test_a_shell_completes(shell: str, tmp_path: Path) -> None:
    """The script, loaded into its shell, completes commands, options behind other options, and names with a colon."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    plain = {"bash": ["--norc", "-c", _ASK[shell], "bash"], "zsh": ["-f", "-c", _ASK[shell], "zsh"]}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def complete(line: str) -> list[str]:
        words = [program, *plain.get(shell, ["--no-config", "-c", _ASK[shell]]), line]
        env = {**os.environ, "PATH": path, "HOME": str(tmp_path)}
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=env, cwd=tmp_path)
        assert done.stderr == ""
        return [offer.partition("\t")[0] for offer in done.stdout.split("\n") if offer]

    assert complete("sage-llm ver") == ["version"]
    assert "--kv-dtype" in complete("sage-llm serve --ctx 2048 --kv")
    assert complete("sage-llm pull smollm2:1") == ["135m" if shell == "bash" else "smollm2:135m"]


@pytest.mark.parametrize("program", sorted(TARGETS))
def test_launch_shows_writes_and_keeps_a_backup(program: str, tmp_path: Path) -> None:
    """The change is shown, written once, and the old file is kept; a second run changes nothing."""
    env = {
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "CODEX_HOME": str(tmp_path / "codex"),
        "LLM_USER_PATH": str(tmp_path / "llm"),
    }
    shown = run("launch", program, "--dry-run", env=env)
    assert shown.returncode == 0, shown.stderr
    assert "+" in shown.stdout
    as_json = json.loads(run("launch", program, "--dry-run", "--json", env=env).stdout)
    assert as_json["diff"] == shown.stdout
    assert not as_json["written"]
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert run("launch", program, "--yes", "--model", "first", env=env).returncode == 0
    second = ("launch", program, "--yes", "--model", "second", "--api-key", "sk-its-own")
    assert run(*second, env=env).returncode == 0
    (written,) = [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith(".bak")]
    assert "second" in written.read_text()
    assert "first" not in written.read_text()
    assert "sk-its-own" in written.read_text()
    assert list(tmp_path.rglob("*.bak"))
    assert "has it already" in run(*second, env=env).stdout


def test_launch_lists_the_programs(tmp_path: Path) -> None:
    """Without a program they are listed, with where each keeps its configuration; JSON never waits for an answer."""
    rows = json.loads(run("launch", "--json", env={"HOME": str(tmp_path)}).stdout)
    assert [row["program"] for row in rows] == list(TARGETS)
    assert all(row["program"] in run("launch").stdout for row in rows)
    assert "--yes or --dry-run" in run("launch", "llm", "--json", env={"HOME": str(tmp_path)}).stderr


def test_launch_leaves_other_settings_alone(tmp_path: Path) -> None:
    """What a configuration had before stays; one that cannot be read is not touched."""
    env = {"XDG_CONFIG_HOME": str(tmp_path), "CODEX_HOME": str(tmp_path)}
    opencode = tmp_path / "opencode" / "opencode.json"
    opencode.parent.mkdir()
    opencode.write_text('{"theme": "dark", "provider": {"other": {}}}')
    run("launch", "opencode", "--yes", env=env)
    document = json.loads(opencode.read_text())
    assert document["theme"] == "dark"
    assert set(document["provider"]) == {"other", "isagellm"}
    opencode.write_text("{")
    assert run("launch", "opencode", "--yes", env=env).returncode == 1
    assert opencode.read_text() == "{"
    codex = tmp_path / "config.toml"
    codex.write_text('approval = "never"\nmodel = "old"\n\n[tools]\nweb = true\n')
    run("launch", "codex", "--yes", env=env)
    parsed = tomllib.loads(codex.read_text())
    assert parsed["approval"] == "never"
    assert parsed["tools"] == {"web": True}
    assert parsed["model"] == "smollm2:135m"
    assert parsed["model_providers"]["isagellm"]["wire_api"] == "responses"


def source() -> str:
    """All source texts, with literals that are split over lines joined."""
    files = [p for p in (ROOT / "src").rglob("*.py") if p.name != "catalogue.py"]
    return "\n".join(re.sub(r'"\s*\n\s*f?"', "", p.read_text(encoding="utf-8")) for p in files)


def test_the_catalogue_of_errors_is_true() -> None:
    """At least 40 errors, each recognised by a fragment that stands in the source, and the page is what the code says."""
    text = source()
    assert len(catalogue.CATALOGUE) >= 40
    for entry in catalogue.CATALOGUE.values():
        assert entry.fragment in text, entry.code
        assert catalogue.find(f"x {entry.fragment} y") is entry
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == catalogue.page()
    assert run("explain", "port-in-use").returncode == 0
    assert run("explain", "nonesuch").returncode == 1


def test_no_traceback_without_debug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Even a bug of ours is one line; with --debug its traceback comes through."""
    import sagellm.cli.version as module

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(module, "app", broken)
    assert main(["version"]) == 1
    assert "this is a bug of ours" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        main(["version", "--debug"])


def test_errors_of_every_kind_have_one_line() -> None:
    """OSError, a missing extra, an internal error: fact and cure in one line."""
    assert "check the path" in describe(FileNotFoundError(2, "No such file or directory", "x"))
    assert "isagellm[gateway]" in describe(ModuleNotFoundError("No module named 'starlette'", name="starlette"))
    assert "force-reinstall" in describe(ModuleNotFoundError("No module named 'x'", name="x"))
    assert "--debug" in describe(InternalError("oops"))
    assert "--ctx" in describe(MemoryError())


def test_output_into_a_closed_pipe_is_quiet() -> None:
    """`sage-llm list | head -0` ends without a complaint."""
    done = subprocess.run(
        f"{sys.executable} -m sagellm config show | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
