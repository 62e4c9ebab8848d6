"""``sage-llm launch``: set another program up for our server. Shows the change, asks, keeps a backup."""

from __future__ import annotations

import difflib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sagellm.cli.common import print_json, print_table, single
from sagellm_protocol.errors import InvalidArgumentError


@dataclass(frozen=True)
class Target:
    """A program: where its configuration is, how it is changed, how it is started afterwards."""

    path: Callable[[], Path]
    change: Callable[[str, str, str, str], str]
    start: str


def launch(
    program: Annotated[
        str, typer.Argument(help="llm, aider, codex, opencode or openwebui; without it they are listed.")
    ] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="The model that it is to use.")] = "smollm2:135m",
    url: Annotated[str, typer.Option("--url", help="Our server.")] = "http://127.0.0.1:8889/v1",
    api_key: Annotated[
        str,
        typer.Option("--api-key", help="Key that it is to send, where the server wants one (sage-llm keys add NAME)."),
    ] = "none",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the change and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: the change, whether it was written, how to start. Does not ask.")
    ] = False,
) -> None:
    """Write that program's configuration for our server."""
    if not program:
        _list(as_json=as_json)
        return
    target = TARGETS.get(program)
    if target is None:
        raise InvalidArgumentError(f"cannot set up {program!r}: use one of {', '.join(TARGETS)}", param="program")
    if as_json and not (yes or dry_run):
        raise InvalidArgumentError("--json does not ask: pass --yes or --dry-run with it", param="json")
    path = target.path()
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    after = target.change(before, model, url, api_key)
    start = target.start.format(model=model, path=path)
    diff = "".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), str(path), f"{path} (new)"))
    if not as_json:
        print(diff or f"{path} has it already.", end="" if diff else "\n")
    if diff and not dry_run:
        if not yes:
            typer.confirm(f"Write {path}?", abort=True)
        backup = _write(path, before, after)
        if backup is not None and not as_json:
            print(f"the old one is in {backup}")
    if as_json:
        written = bool(diff) and not dry_run
        print_json({"program": program, "path": str(path), "diff": diff, "written": written, "start": start})
    elif not (diff and dry_run):
        print(f"Start with: {start}")


def _list(*, as_json: bool) -> None:
    rows = [{"program": name, "path": str(target.path()), "start": target.start} for name, target in TARGETS.items()]
    if as_json:
        print_json(rows)
    else:
        print_table(("PROGRAM", "CONFIGURATION"), [(row["program"], row["path"]) for row in rows])


def _write(path: Path, before: str, after: str) -> Path | None:
    """Write the file in one step and return where the old one is, if there was one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    backup = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}.bak") if before else None
    if backup is not None:
        backup.write_text(before, encoding="utf-8")
    fresh = path.with_name(f".{path.name}.new")
    fresh.touch(mode=0o600)  # it may hold a key
    if before:
        fresh.chmod(path.stat().st_mode)
    fresh.write_text(after, encoding="utf-8")
    fresh.replace(path)
    return backup


def _config_home() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise InvalidArgumentError(f"{where} is not JSON ({error}): mend it first") from error
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{where} is no JSON object: mend it first")
    return value


def _opencode(before: str, model: str, url: str, key: str) -> str:
    document = _json(before, "opencode.json")
    document.setdefault("$schema", "https://opencode.ai/config.json")
    providers = document.setdefault("provider", {})
    providers["isagellm"] = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "isagellm",
        "options": {"baseURL": url, "apiKey": key},
        "models": {model: {"name": model}},
    }
    document["model"] = f"isagellm/{model}"
    return json.dumps(document, indent=2) + "\n"


def _llm(before: str, model: str, url: str, key: str) -> str:
    """`llm` reads extra-openai-models.yaml: a list of mappings; ours is one block between two marks."""
    entry = f"- model_id: {json.dumps(model)}\n  model_name: {json.dumps(model)}\n  api_base: {json.dumps(url)}\n"
    return _marked(before, f"{entry}  headers: {{Authorization: {json.dumps(f'Bearer {key}')}}}\n")


def _aider(before: str, model: str, url: str, key: str) -> str:
    server = f"openai-api-base: {json.dumps(url)}\nopenai-api-key: {json.dumps(key)}\n"
    return _marked(before, f"model: {json.dumps('openai/' + model)}\n{server}")


def _codex(before: str, model: str, url: str, key: str) -> str:
    """In TOML a table ends at the next one: top-level keys go first, our table last."""
    top = f'model = {json.dumps(model)}\nmodel_provider = "isagellm"\n'
    rest = "".join(
        line
        for line in _unmarked(before).splitlines(True)
        if line.split("=")[0].strip() not in {"model", "model_provider"} or "." in line.split("=")[0]
    )
    table = f'[model_providers.isagellm]\nname = "isagellm"\nbase_url = {json.dumps(url)}\nwire_api = "responses"\n'
    table += f"http_headers = {{ Authorization = {json.dumps(f'Bearer {key}')} }}\n"
    return f"{_BEGIN}\n{top}{_END}\n{rest.rstrip()}\n\n{_BEGIN}\n{table}{_END}\n".replace("\n\n\n", "\n\n")


def _openwebui(before: str, model: str, url: str, key: str) -> str:
    return _marked(before, f"OPENAI_API_BASE_URL={url}\nOPENAI_API_KEY={key}\nDEFAULT_MODELS={model}\n")


_BEGIN, _END = "# begin isagellm", "# end isagellm"


def _unmarked(text: str) -> str:
    out, ours = [], False
    for line in text.splitlines(True):
        if line.strip() == _BEGIN:
            ours = True
        if not ours:
            out.append(line)
        if line.strip() == _END:
            ours = False
    return "".join(out)


def _marked(before: str, block: str) -> str:
    rest = _unmarked(before).rstrip()
    return (rest + "\n" if rest else "") + f"{_BEGIN}\n{block}{_END}\n"


TARGETS: dict[str, Target] = {
    "llm": Target(
        lambda: (
            Path(os.environ.get("LLM_USER_PATH") or _config_home() / "io.datasette.llm") / "extra-openai-models.yaml"
        ),
        _llm,
        "llm -m {model} 'Hello'",
    ),
    "aider": Target(lambda: Path.home() / ".aider.conf.yml", _aider, "aider"),
    "codex": Target(
        lambda: Path(os.environ.get("CODEX_HOME") or Path.home() / ".codex") / "config.toml", _codex, "codex"
    ),
    "opencode": Target(lambda: _config_home() / "opencode" / "opencode.json", _opencode, "opencode"),
    "openwebui": Target(
        lambda: _config_home() / "isagellm" / "openwebui.env", _openwebui, "set -a; . {path}; open-webui serve"
    ),
}


app = single(launch)
