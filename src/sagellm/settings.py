"""Settings of ``sage-llm serve``: a TOML file, environment variables and flags, the later over the earlier.

The file is ``$SAGELLM_CONFIG``, else ``$XDG_CONFIG_HOME/isagellm/config.toml``, else ``~/.config/isagellm/config.toml``::

    [serve]
    port = 9000
    models = ["smollm2:135m"]
    kv_dtype = "int8"

Every setting has one name: ``kv_dtype`` in the file, ``SAGELLM_KV_DTYPE`` in the environment, ``--kv-dtype`` as a flag.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["SETTINGS", "Setting", "Value", "config_path", "load_file", "resolve", "state_path", "unknown_variables"]

Origin = Literal["default", "file", "environment", "flag"]


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: in the file; the variable and the flag follow from it.
        kind: type of its value; ``list`` is a list of strings, comma-separated in the environment.
        default: None leaves it to the engine.
        help: one line.
    """

    name: str
    kind: type
    default: Any
    help: str

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return f"SAGELLM_{self.name.upper()}"

    @property
    def flag(self) -> str:
        """Name of the flag."""
        return "--" + self.name.replace("_", "-")


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("models", list, ["smollm2:135m"], "what is served: names or paths"),
        Setting("host", str, "127.0.0.1", "address to listen on"),
        Setting("port", int, 8889, "port to listen on; 0 takes a free one"),
        Setting("state", str, None, "SQLite file for keys, sessions and stored responses; 'none' keeps them in memory"),
        Setting(
            "api_key_file", str, None, "file of API keys of the role user, one a line, kept as hashes in the state"
        ),
        Setting("require_key", bool, False, "demand an API key even when none was made yet"),
        Setting("allowed_hosts", list, [], "further names that the Host header may hold"),
        Setting("cors", list, [], "web origins that a browser may call from"),
        Setting("grace", float, 30.0, "seconds for running requests after SIGTERM"),
        Setting("access_log", bool, False, "one line for each request on stderr"),
        Setting("engines", int, 1, "engine processes for each model"),
        Setting("keep_alive", float, 0.0, "idle seconds before an engine unloads its model; 0 is never"),
        Setting("workers", int, 1, "gateway processes that share the port"),
        Setting("policy", str, "adaptive", "scheduling policy of the control plane"),
        Setting("routing", str, None, "which engine takes a request; the default belongs to the policy"),
        Setting(
            "auto_scale", bool, False, "start and stop engines by demand; load a stored model when it is asked for"
        ),
        Setting("pd_separation", bool, False, "prefill on one engine and decode on another where that is faster"),
        Setting("roles", list, [], "what each of a model's engines is for: prefill, decode or any, in turn"),
        Setting("engine_file", str, None, "JSON or TOML list of engines that others run, followed while it changes"),
        Setting("discover", bool, False, "look for servers of other makers on local ports"),
        Setting("ctx", int, None, "tokens of one sequence, prompt and output"),
        Setting("parallel", int, None, "sequences that run at the same time"),
        Setting("max_batch_tokens", int, None, "rows of one step: decode and prefill together"),
        Setting("memory", str, None, "cap of weights, KV and scratch together"),
        Setting("backend", str, None, "cpu, cuda, reference, mock, or an installed one"),
        Setting("threads", int, None, "CPU threads of an engine; 0 is automatic"),
        Setting("quant", str, None, "precision of the weights"),
        Setting("kv_dtype", str, None, "precision of the KV cache"),
        Setting("kv_size", str, None, "cap of the KV cache"),
        Setting("spill", str, None, "directory for KV blocks that are evicted"),
        Setting("spill_size", str, None, "cap of that directory"),
        Setting("no_prefix_cache", bool, False, "forget the KV of ended requests at once"),
        Setting("spec", str, None, "guess tokens ahead: none, ngram, draft"),
        Setting("draft_model", str, None, "smaller model of the same vocabulary"),
        Setting("lora", list, [], "LoRA adapters, NAME=PATH each"),
        Setting("mock", bool, False, "simulate the device"),
        Setting("mock_scale", float, None, "multiply the simulated times"),
        Setting("script", str, None, "scripted replies of the simulated device"),
    )
}

# Read elsewhere: the store's place, tracebacks, this file's place, and what other parts take from the environment.
_OTHER_VARIABLES = {
    "SAGELLM_HOME",
    "SAGELLM_DEBUG",
    "SAGELLM_DEPRECATIONS",
    "SAGELLM_CONFIG",
    "SAGELLM_CPU_ISA",
    "SAGELLM_ENGINE_TOKEN",
    "SAGELLM_HUB_ENDPOINT",
    "SAGELLM_MODELSCOPE_ENDPOINT",
    "SAGELLM_TEST_MODEL",
    "SAGELLM_TEST_GEMMA",
    "SAGELLM_TEST_MINILM",
}


@dataclass(frozen=True)
class Value:
    """A setting's value and where it comes from."""

    value: Any
    origin: Origin
    where: str = ""


def config_path() -> Path:
    """Return where the configuration file is, or would be."""
    if explicit := os.environ.get("SAGELLM_CONFIG"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "isagellm" / "config.toml"


def load_file(path: Path | None = None) -> dict[str, Any]:
    """Return the checked ``[serve]`` table of the configuration file; empty if there is no file.

    Raises:
        InvalidArgumentError: it is not TOML, or has a name or a type that is not known.
    """
    path = path or config_path()
    if not path.is_file():
        return {}
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path} is not TOML: {error}") from error
    if unknown := sorted(set(document) - {"serve"}):
        raise InvalidArgumentError(f"{path} has the unknown table [{unknown[0]}]: settings stand under [serve]")
    table: dict[str, Any] = document.get("serve", {})
    for name, value in table.items():
        setting = SETTINGS.get(name)
        if setting is None:
            raise InvalidArgumentError(f"{path} has the unknown setting {name!r}: known are {', '.join(SETTINGS)}")
        _check_type(setting, value, str(path))
    return table


def _check_type(setting: Setting, value: Any, where: str) -> None:
    kind = (int, float) if setting.kind is float else setting.kind
    if not isinstance(value, kind) or (isinstance(value, bool) and setting.kind is not bool):
        raise InvalidArgumentError(f"{where}: {setting.name} is {value!r}, {setting.kind.__name__} is wanted")


def _from_environment(setting: Setting, text: str) -> Any:
    try:
        if setting.kind is bool:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        if setting.kind is list:
            return [part.strip() for part in text.split(",") if part.strip()]
        return setting.kind(text)
    except (ValueError, KeyError):
        raise InvalidArgumentError(
            f"{setting.variable} is {text!r}, {setting.kind.__name__} is wanted: correct or unset it"
        ) from None


def resolve(flags: Mapping[str, Any] | None = None) -> dict[str, Value]:
    """Return every setting with its value and origin; flags that are None, or an empty list, were not given.

    Raises:
        InvalidArgumentError: the file or a variable cannot be read.
    """
    file, path = load_file(), config_path()
    out: dict[str, Value] = {}
    for name, setting in SETTINGS.items():
        given = (flags or {}).get(name)
        text = os.environ.get(setting.variable)
        if given is not None and given != []:
            out[name] = Value(given, "flag", setting.flag)
        elif text is not None:
            out[name] = Value(_from_environment(setting, text), "environment", setting.variable)
        elif name in file:
            out[name] = Value(file[name], "file", str(path))
        else:
            out[name] = Value(setting.default, "default")
    return out


def state_path() -> Path:
    """Return the default state file of a server: keys, sessions, stored responses."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "isagellm" / "gateway.sqlite"


def unknown_variables() -> list[str]:
    """Return the names of environment variables that look like ours and are read by nothing."""
    known = {setting.variable for setting in SETTINGS.values()} | _OTHER_VARIABLES
    return sorted(name for name in os.environ if name.startswith("SAGELLM_") and name not in known)
