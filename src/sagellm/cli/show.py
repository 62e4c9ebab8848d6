"""``sage-llm show``: what a model is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sagellm import store
from sagellm.cli.common import JsonOption, human_bytes, print_json, single


def show(
    model: Annotated[str, typer.Argument(help="A name (smollm2:135m) or a path (./model.gguf).")],
    template: Annotated[bool, typer.Option("--template", help="Print the chat template and nothing else.")] = False,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Show architecture, parameters, context, quantisation, template and licence of a model."""
    facts = describe(model)
    if template and not as_json:
        print(facts["template"] or "(none: the text is sent as it is)")
    elif as_json:
        print_json({"template": facts["template"]} if template else facts)
    else:
        facts["template"] = f"{len(facts['template'])} characters (--template prints it)" if facts["template"] else "-"
        facts["parameters"] = f"{facts['parameters'] / 1e6:.1f} M"
        facts["size_bytes"] = human_bytes(facts["size_bytes"])
        for name, value in facts.items():
            print(f"{name:<16}{_shown(value)}")


def describe(model: str) -> dict[str, Any]:
    """Return what is known of a model, JSON-ready.

    Raises:
        ModelNotFoundError: it is not on this machine.
        ModelFileError: the file is damaged.
    """
    from sagellm_core.loader import open_model
    from sagellm_core.loader.encoder import is_encoder

    stored = store.resolve(model)
    if is_encoder(stored.path):
        return _describe_encoder(stored)
    with open_model(stored.path) as files:
        parameters = sum(_count(files.weights[name].shape) for name in files.weights)
        spec, metadata = files.spec, files.metadata
        return {
            "name": stored.name,
            "path": str(stored.path),
            "kind": stored.kind,
            "architecture": getattr(spec, "architecture", type(spec).__name__),
            "parameters": parameters,
            "layers": spec.n_layers,
            "context": spec.context_length,
            "quantisation": files.quantization,
            "size_bytes": files.file_bytes,
            "licence": stored.manifest.get("license") or metadata.get("general.license") or "",
            "source": stored.manifest.get("source", ""),
            "sampling": _sampling(stored),
            "template": str(metadata.get("tokenizer.chat_template") or ""),
        }


def _describe_encoder(stored: store.StoredModel) -> dict[str, Any]:
    from sagellm_core.loader.encoder import open_encoder

    files = open_encoder(stored.path)
    spec = files.spec
    tensors = [files.weights[name] for name in files.weights]
    return {
        "name": stored.name,
        "path": str(stored.path),
        "kind": "embedding",
        "architecture": getattr(spec, "architecture", type(spec).__name__),
        "parameters": sum(_count(tensor.shape) for tensor in tensors),
        "layers": spec.n_layers,
        "context": spec.context_length,
        "quantisation": max(tensors, key=lambda tensor: _count(tensor.shape)).format.name,
        "size_bytes": stored.size_bytes,
        "licence": stored.manifest.get("license") or "",
        "source": stored.manifest.get("source", ""),
        "sampling": {},
        "template": "",
    }


def _sampling(stored: store.StoredModel) -> dict[str, float]:
    from sagellm_core.text.defaults import file_defaults

    folder = stored.path if stored.path.is_dir() else stored.path.parent
    return file_defaults(folder)


def _count(shape: tuple[int, ...]) -> int:
    out = 1
    for side in shape:
        out *= side
    return out


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:g}" for k, v in value.items()) or "-"
    return str(value) if value not in ("", None) else "-"


app = single(show)
