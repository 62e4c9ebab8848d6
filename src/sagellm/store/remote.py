"""Models from the network: a plain URL, a Hugging Face repository, a ModelScope repository.

==================== =============================================================================================
``https://…/x.gguf``  one file; ``http://`` only from this machine itself
``hf:org/repo``       the repository's only (or default) GGUF file, or its safetensors
``hf:org/repo:Q8_0``  the GGUF file of that quantisation
``hf:org/repo/f.gguf`` that file. Through the ``hub`` extra, which honours ``HF_ENDPOINT`` (a mirror) and ``HF_TOKEN``
``ms:org/repo/f.gguf`` from the ModelScope server that ``SAGELLM_MODELSCOPE_ENDPOINT`` names
==================== =============================================================================================

A download that was interrupted goes on with a range request, which the server answers only for the file that it was of.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from sagellm_protocol.errors import InvalidArgumentError, ModelFileError, ModelNotFoundError, UnavailableError

__all__ = ["choose_files", "default_name", "download", "fetch_hub", "fetch_modelscope", "fetch_url", "is_remote"]

Report = Callable[[str, int, int], None]

_ATTEMPTS = 4
_PREFERRED = ("q4_k_m", "q4_0", "q8_0", "f16")
_TEXT_SIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
)


def is_remote(model: str) -> bool:
    """Whether `model` names something on the network."""
    return model.startswith(("https://", "http://", "hf:", "ms:"))


def default_name(model: str) -> str:
    """Return the store name that follows from a remote name."""
    scheme, _, rest = model.partition(":")
    if scheme in {"https", "http"}:
        return _slug(Path(urlsplit(model).path).name.removesuffix(".gguf"))
    repo, _, quant = rest.partition(":")
    parts = repo.split("/")
    base = _slug(parts[-1].removesuffix(".gguf")) if len(parts) > 2 else _slug(parts[-1])
    return f"{base}:{_slug(quant)}" if quant else base


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._") or "model"


def fetch_url(url: str, folder: Path, report: Report) -> dict[str, Path]:
    """Download one file; return its name and place.

    Raises:
        InvalidArgumentError: not a URL that we fetch.
        UnavailableError: the server cannot be reached, or breaks off.
    """
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname not in {"127.0.0.1", "localhost", "::1"}:
        raise InvalidArgumentError(f"{url} is not encrypted: use https", param="model")
    name = Path(parts.path).name
    if not name.endswith((".gguf", ".safetensors")) or not re.fullmatch(r"[\w.+-]+", name):
        raise InvalidArgumentError(f"{url} does not name a .gguf or .safetensors file", param="model")
    return {name: download(url, folder / name, report)}


def download(url: str, target: Path, report: Report, headers: dict[str, str] | None = None) -> Path:
    """Fetch `url` into `target`, going on where an earlier attempt stopped.

    Raises:
        ModelNotFoundError: the server has no such file.
        UnavailableError: it cannot be reached, or breaks off again and again.
        ModelFileError: fewer bytes arrived than were announced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    if target.exists() and _Part.of(partial, url).total == target.stat().st_size:
        return target
    for attempt in range(1, _ATTEMPTS + 1):
        if _continue(url, partial, report, headers or {}, last=attempt == _ATTEMPTS):
            partial.replace(target)
            return target
        time.sleep(0.25 * 2**attempt)
    raise AssertionError("unreachable")


def _continue(url: str, partial: Path, report: Report, headers: dict[str, str], *, last: bool) -> bool:
    """Try once; return whether the file is whole. The last attempt raises what went wrong."""
    import httpx2

    try:
        return _stream(url, partial, report, headers)
    except httpx2.TransportError as error:
        if last:
            host = urlsplit(url).netloc
            raise UnavailableError(
                f"{host} cannot be reached or broke off ({type(error).__name__}) with {_size(partial)} bytes here: check the network and "
                "pull again, it goes on from there"
            ) from error
        return False


def _stream(url: str, partial: Path, report: Report, headers: dict[str, str]) -> bool:
    """Fetch what is missing, or everything where the part that is here may be of another file."""
    import httpx2

    part = _Part.of(partial, url)
    asked = {**headers, "accept-encoding": "identity", **part.ask()}
    with httpx2.stream("GET", url, headers=asked, follow_redirects=True, timeout=30.0) as response:
        if response.status_code in {401, 403, 404}:
            raise ModelNotFoundError(
                f"{url} answers {response.status_code}: check the address (and the access token)", param="model"
            )
        if response.status_code == 416 and part.is_whole(response.headers):
            return True
        if response.status_code in {206, 416} and part.have:
            fits = response.status_code == 206 and part.is_continued_by(response.headers)
        elif response.status_code == 200:  # all of it: the file is another one now, or the server knows no ranges
            part = _Part(partial, url)
            part.begin(response.headers)
            fits = True
        else:
            raise UnavailableError(f"{url} answers {response.status_code}: try again later")
        if fits:
            return _take(response, part, report)
    partial.unlink()
    return _stream(url, partial, report, headers)


def _take(response: Any, part: _Part, report: Report) -> bool:
    name, total = part.file.name.removesuffix(".partial"), part.total
    with part.file.open("ab") as out:
        for chunk in response.iter_raw():  # as it arrives: what is here counts when it breaks off
            out.write(chunk)
            part.have += len(chunk)
            report(f"fetching {name}", part.have, total)
    if total and part.have != total:
        raise ModelFileError(f"{part.have} of {total} bytes of {name} arrived: pull again")
    return True


@dataclass
class _Part:
    """What an earlier attempt left, and of which file it is: a file that has changed since is not glued to it (RFC 9110, 13.1.5).

    Attributes:
        file: the bytes so far.
        url: where they came from.
        have: how many there are.
        total: of the whole file; 0 where the server did not say.
        validator: the strong ETag or the date by which the server knows that version; empty where it gave none.
    """

    file: Path
    url: str
    have: int = 0
    total: int = 0
    validator: str = ""

    @classmethod
    def of(cls, file: Path, url: str) -> _Part:
        """Return the part in `file` if it is known to come from `url`, else an empty one."""
        try:
            note = json.loads(cls(file, url)._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls(file, url)
        if note["url"] != url:
            return cls(file, url)
        return cls(file, url, _size(file), note["total"], note["validator"])

    @property
    def _note(self) -> Path:
        return self.file.with_name(self.file.name + ".origin")

    def ask(self) -> dict[str, str]:
        """Return the headers that ask for the rest."""
        if not self.have:
            return {}
        return {"range": f"bytes={self.have}-", **({"if-range": self.validator} if self.validator else {})}

    def begin(self, headers: Mapping[str, str]) -> None:
        """Note which file comes now; bytes of an earlier one go first."""
        self.file.write_bytes(b"")
        tag = headers.get("etag", "")
        self.validator = tag if tag.startswith('"') else headers.get("last-modified", "")
        self.total = int(headers.get("content-length", 0))
        note = {"url": self.url, "total": self.total, "validator": self.validator}
        self._note.write_text(json.dumps(note), encoding="utf-8")

    def is_continued_by(self, headers: Mapping[str, str]) -> bool:
        """Whether a partial answer begins where this ends, in a file of the same length."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("content-range", ""))
        same = found is not None and (not self.total or found[2] in {"*", str(self.total)})
        return found is not None and same and int(found[1]) == self.have

    def is_whole(self, headers: Mapping[str, str]) -> bool:
        """Whether an answer without a rest says that the file is as long as this."""
        return headers.get("content-range", "") == f"bytes */{self.have}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def choose_files(files: Sequence[str], wanted: str | None) -> list[str]:
    """Return which files of a repository make the model.

    Args:
        files: all of it.
        wanted: a quantisation (``Q8_0``), a file name, or None for the only or the usual one.

    Raises:
        ModelNotFoundError: there is none, or more than one and nothing says which.
    """
    weights = [name for name in files if name.endswith(".gguf")]
    if wanted and wanted.endswith((".gguf", ".safetensors")):
        if wanted in files:
            return [wanted]
        raise ModelNotFoundError(f"no file {wanted!r} there: {_some(weights)}", param="model")
    if wanted:
        found = [name for name in weights if re.search(rf"(^|[.-]){re.escape(wanted.lower())}\.gguf$", name.lower())]
        if len(found) == 1:
            return found
        raise ModelNotFoundError(f"no single GGUF file for {wanted!r} there: {_some(weights)}", param="model")
    if len(weights) == 1:
        return weights
    for quant in _PREFERRED:
        found = [name for name in weights if name.lower().endswith(f"{quant}.gguf")]
        if len(found) == 1:
            return found
    if weights:
        raise ModelNotFoundError(
            f"more than one GGUF file there, say which quantisation: {_some(weights)}", param="model"
        )
    tensors = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    if not tensors:
        raise ModelNotFoundError(f"neither .gguf nor .safetensors there: {_some(files)}", param="model")
    extra = [name for name in files if name in _TEXT_SIDE or name.endswith(".safetensors.index.json")]
    return [*tensors, *extra, *(name for name in files if name in {"modules.json", "1_Pooling/config.json"})]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") or "nothing"


def fetch_hub(name: str, folder: Path, report: Report) -> tuple[dict[str, Path], dict[str, str], dict[str, Any]]:
    """Download from a Hugging Face repository; return files, their hashes, and facts for the manifest.

    Raises:
        ModelNotFoundError: no such repository or file.
        UnavailableError: the hub cannot be reached.
        ModuleNotFoundError: the ``hub`` extra is not installed.
    """
    import httpx2
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    repo, wanted = _repo_of(name)
    api = HfApi()
    try:
        info = api.model_info(repo, files_metadata=True)
    except HfHubHTTPError as error:
        raise ModelNotFoundError(
            f"hf:{repo}: {str(error).splitlines()[0]}: check the name (and HF_TOKEN)", param="model"
        ) from error
    except (OSError, httpx2.HTTPError) as error:
        raise UnavailableError(
            f"the hub cannot be reached ({type(error).__name__}): check the network, or set HF_ENDPOINT to a mirror"
        ) from error
    siblings = {item.rfilename: item for item in info.siblings or ()}
    token = os.environ.get("HF_TOKEN")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    chosen = choose_files(list(siblings), wanted)
    files = {n: download(hf_hub_url(repo, n, revision=info.sha), folder / n, report, headers) for n in chosen}
    hashes = {n: lfs.sha256 for n in chosen if (lfs := siblings[n].lfs) is not None}
    card = getattr(info, "card_data", None)
    return (
        files,
        hashes,
        {"source": f"hf:{repo}@{info.sha}", "license": str(getattr(card, "license", "") or ""), "kind": "llm"},
    )


def fetch_modelscope(name: str, folder: Path, report: Report) -> tuple[dict[str, Path], dict[str, Any]]:
    """Download one file of a ModelScope repository; return it and facts for the manifest.

    Raises:
        InvalidArgumentError: no endpoint is set, or no file is named.
        ModelNotFoundError: no such file.
        UnavailableError: the server cannot be reached.
    """
    endpoint = os.environ.get("SAGELLM_MODELSCOPE_ENDPOINT", "").rstrip("/")
    if not endpoint:
        raise InvalidArgumentError(
            f"{name}: set SAGELLM_MODELSCOPE_ENDPOINT to the server's address first", param="model"
        )
    repo, file = _repo_of(name)
    if file is None or not file.endswith(".gguf"):
        raise InvalidArgumentError(f"{name}: name the file too, as ms:org/repo/model.gguf", param="model")
    target = folder / Path(file).name
    url = f"{endpoint}/models/{quote(repo)}/resolve/master/{quote(file)}"
    return {target.name: download(url, target, report)}, {"source": f"ms:{repo}/{file}", "license": "", "kind": "llm"}


def _repo_of(name: str) -> tuple[str, str | None]:
    rest = name.partition(":")[2]
    path, _, quant = rest.partition(":")
    parts = path.split("/")
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.+-]+", part) and part.strip(".") for part in parts):
        raise InvalidArgumentError(f"{name!r}: write org/repo, org/repo:QUANT or org/repo/file.gguf", param="model")
    repo = "/".join(parts[:2])
    if len(parts) > 2:
        return repo, "/".join(parts[2:])
    return repo, quant or None
