"""From a path to a `ChatModel`."""

from __future__ import annotations

from pathlib import Path

from sagellm_core.loader.gguf import read_header
from sagellm_core.loader.safetensors import load_json
from sagellm_core.models.views import Config
from sagellm_core.text.cache import cached_tokenizer
from sagellm_core.text.chat_model import TextChatModel
from sagellm_core.text.defaults import file_defaults, metadata_defaults
from sagellm_core.text.embedding import encoder_limit
from sagellm_core.text.from_gguf import convert_gguf
from sagellm_core.text.from_json import convert_directory, source_files
from sagellm_core.text.mapped import KIND, MappedEncoder, compact, is_mapped
from sagellm_core.text.tokenizer import TextTokenizer, TokenizerInfo
from sagellm_protocol.errors import InvalidArgumentError, ModelFileError

__all__ = ["load_chat_model", "load_tokenizer"]

_Loaded = tuple[TextTokenizer, int, dict[str, float]]


def load_chat_model(
    path: str | Path, model_id: str, context_length: int | None = None, *, cache_dir: Path | None = None
) -> TextChatModel:
    """Load the text side of a model: a .gguf file, a .safetensors file or a model directory. Imports no numpy.

    Args:
        path: where the model lies.
        model_id: name it is served under.
        context_length: of the engine; None is the model's own.
        cache_dir: where converted tokenizers are kept; None is the default place.

    Raises:
        ModelFileError: missing or malformed.
        InvalidArgumentError: `context_length` is above the model's own.
    """
    tokenizer, longest, defaults = _load(Path(path), cache_dir)
    if context_length is not None and not 1 <= context_length <= longest:
        raise InvalidArgumentError(
            f"a context of {context_length} tokens is asked for, {model_id} was made for {longest}: pass 1 to {longest}",
            param="context_length",
        )
    return TextChatModel(model_id, tokenizer, context_length or longest, defaults)


def load_tokenizer(path: str | Path, *, cache_dir: Path | None = None) -> TextTokenizer:
    """Load the tokenizer of a model.

    Raises:
        ModelFileError: missing or malformed.
    """
    return _load(Path(path), cache_dir)[0]


def _load(path: Path, cache_dir: Path | None) -> _Loaded:
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1 and not (path / "config.json").is_file():
            return _load_gguf(files[0], cache_dir)
        return _load_directory(path, cache_dir)
    if path.suffix == ".safetensors":
        return _load_directory(path.parent, cache_dir)
    return _load_gguf(path, cache_dir)


def _load_gguf(path: Path, cache_dir: Path | None) -> _Loaded:
    header = read_header(path)
    length = header.metadata.get(f"{header.metadata.get('general.architecture')}.context_length")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ModelFileError(f"{path.name} has no context length in its metadata: fetch or convert it again")
    found = cached_tokenizer([header.metadata_bytes(), KIND], lambda: _compact(*convert_gguf(header)), cache_dir)
    defaults = metadata_defaults(header.metadata) or file_defaults(path.parent)
    return _tokenizer(*found), length, defaults


def _load_directory(directory: Path, cache_dir: Path | None) -> _Loaded:
    values = load_json(directory / "config.json")
    config = Config(values)
    length = encoder_limit(directory, values)
    if length is None:
        length = (config.table("text_config") or config).integer("max_position_embeddings")
    content = [path.name.encode() + b"\0" + path.read_bytes() for path in source_files(directory)]
    found = cached_tokenizer([*content, KIND], lambda: _compact(*convert_directory(directory)), cache_dir)
    return _tokenizer(*found), length, file_defaults(directory)


def _compact(info: TokenizerInfo, document: bytes) -> tuple[TokenizerInfo, bytes]:
    return info, compact(document) or document


def _tokenizer(info: TokenizerInfo, document: bytes | memoryview) -> TextTokenizer:
    if is_mapped(document):
        return TextTokenizer(info, MappedEncoder(document))
    from sagellm_core.text.hf_encoder import HFEncoder

    return TextTokenizer(info, HFEncoder(bytes(document)))
