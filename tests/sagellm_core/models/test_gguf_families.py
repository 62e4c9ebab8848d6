"""Every family as a GGUF file: a tiny model converted the way llama.cpp does gives the logits that transformers gave."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import values

from sagellm_backend.base import LoadOptions, RowSampling, StepBatch
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.tensors import Tensor
from sagellm_core.loader import open_model
from sagellm_core.loader.gguf_write import write_gguf
from sagellm_core.models.rope import llama3_factors
from sagellm_core.models.views import Config
from sagellm_protocol.errors import ModelFileError
from sagellm_protocol.sampling import SamplingParams

_CASES: dict[str, Any] = json.loads((Path(__file__).parents[2] / "golden/families.json").read_text())["families"]
_ARCH = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "mixtral": "llama"}
_INTERLEAVED = ("llama", "granite", "mixtral")
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_EXPERT = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def _permute(array: np.ndarray, heads: int) -> np.ndarray:
    return array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)


def _tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    config = case["config"]
    kind = config["model_type"]
    sandwich = kind.startswith("gemma") or kind == "olmo2"
    arrays: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, shape in case["tensors"].items():
        array = values(name, shape)
        if kind.startswith("gemma") and "norm" in name:
            array = array + np.float32(1)
        layer, leaf = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)", name).groups()  # type: ignore[union-attr]
        stem, _, ending = leaf.rpartition(".")
        if match := re.fullmatch(r".*experts\.(\d+)\.(\w+)", stem):
            experts.setdefault(f"blk.{layer}.ffn_{_EXPERT[match[2]]}_exps.weight", {})[int(match[1])] = array
            continue
        if stem == "post_attention_layernorm":
            stem = "post_attention_norm" if sandwich else "ffn_norm"
        if kind in _INTERLEAVED and "q_proj" in stem:
            array = _permute(array, config["num_attention_heads"])
        if kind in _INTERLEAVED and "k_proj" in stem:
            array = _permute(array, config["num_key_value_heads"])
        arrays[(f"blk.{layer}." if layer else "") + f"{_NAMES.get(stem, stem)}.{ending}"] = array
    arrays |= {name: np.stack([parts[i] for i in sorted(parts)]) for name, parts in experts.items()}
    return {name: Tensor.of(array) for name, array in arrays.items()}


def _metadata(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    c = case["config"]
    kind = c["model_type"]
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    rope = c["rope_parameters"]
    full = rope.get("full_attention", rope)
    values: dict[str, Any] = {
        "block_count": c["num_hidden_layers"], "embedding_length": c["hidden_size"], "context_length": c["max_position_embeddings"],
        "feed_forward_length": c["intermediate_size"], "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"], "attention.key_length": head_dim, "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]), "rope.freq_base": float(full["rope_theta"]),
        "rope.dimension_count": int(head_dim * full.get("partial_rotary_factor", 1.0)),
    }  # fmt: skip
    extra: dict[str, Tensor] = {}
    if full["rope_type"] == "llama3":
        factors = llama3_factors(
            full["rope_theta"], head_dim, factor=full["factor"], low=full["low_freq_factor"],
            high=full["high_freq_factor"], original=full["original_max_position_embeddings"],
        )  # fmt: skip
        extra["rope_freqs.weight"] = Tensor.of(np.array(factors, np.float32))
    elif full["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": full["rope_type"], "rope.scaling.factor": float(full["factor"])}
        if full["rope_type"] == "yarn":
            values["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
    if kind.startswith("gemma"):
        values |= {
            "attention.sliding_window": c["sliding_window"], "attention.scale": c["query_pre_attn_scalar"] ** -0.5,
            "attention.sliding_window_pattern": [t == "sliding_attention" for t in c["layer_types"]],
            "attn_logit_softcapping": float(c["attn_logit_softcapping"] or 0),
            "final_logit_softcapping": float(c["final_logit_softcapping"] or 0),
        }  # fmt: skip
    if kind == "granite":
        values |= {
            "embedding_scale": c["embedding_multiplier"], "residual_scale": c["residual_multiplier"],
            "attention.scale": c["attention_multiplier"], "logit_scale": c["logits_scaling"],
        }  # fmt: skip
    if kind in ("mixtral", "qwen3_moe"):
        values |= {
            "expert_count": c.get("num_local_experts") or c["num_experts"],
            "expert_used_count": c["num_experts_per_tok"],
        }
    if kind == "qwen3_moe":
        values |= {"expert_feed_forward_length": c["moe_intermediate_size"], "expert_weights_norm": c["norm_topk_prob"]}
    arch = _ARCH.get(kind, kind)
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in values.items()}, extra


def _without_gguf(name: str, case: dict[str, Any]) -> bool:
    # GGUF's llama has no windows and no bias on the output projection.
    return case["config"]["model_type"] == "mistral" or name == "llama-bias"


@pytest.mark.parametrize("name", [name for name, case in _CASES.items() if not _without_gguf(name, case)])
def test_a_gguf_file_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    """Names, metadata, permutation and baked-in norms of the family are read right: logits agree within 1e-4."""
    case = _CASES[name]
    metadata, extra = _metadata(case)
    write_gguf(tmp_path / "m.gguf", metadata, _tensors(case) | extra)
    ids, rows = case["ids"], case["rows"]
    with open_model(tmp_path / "m.gguf") as model:
        runner = ReferenceBackend().load(model.spec, model.weights, LoadOptions(n_blocks=8))
    batch = StepBatch(
        token_ids=np.array(ids, np.int32),
        starts=np.zeros(1, np.int32),
        lengths=np.array([len(ids)], np.int32),
        block_tables=np.arange(8, dtype=np.int32)[None],
        logit_rows=np.array(rows, np.int32),
        sampling=[RowSampling(SamplingParams(temperature=0.0))] * len(rows),
        want_logits=True,
    )
    logits = runner.step(batch).logits
    assert logits is not None
    np.testing.assert_allclose(logits, np.array(case["logits"]), atol=1e-4, rtol=0)


def test_longrope_chooses_its_factors_by_the_context() -> None:
    """Without a wish the model is as long as its short factors hold; a wish beyond takes the long ones."""
    from sagellm_core.models.common import hf_base

    values: dict[str, Any] = dict(_CASES["phi3"]["config"]) | {
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 2.0],
            "long_factor": [3.0, 4.0],
        },
        "partial_rotary_factor": 0.5,
    }
    short = hf_base(Config(values))
    assert (short.context_length, short.rope.inv_freq_factors) == (128, (1.0, 2.0))
    long = hf_base(Config(values, (), 300))
    assert (long.context_length, long.rope.inv_freq_factors) == (512, (3.0, 4.0))
    assert short.rope.magnitude_scale == long.rope.magnitude_scale == pytest.approx(1.1338934)


def test_unknown_families_are_listed() -> None:
    """The error of an unknown architecture names every known one, for both kinds of files."""
    from sagellm_core.models.registry import FAMILIES, family_of_gguf, family_of_hf

    with pytest.raises(ModelFileError, match=r"gemma2, gemma3, granite, llama, olmo2, phi3, qwen2, qwen3, qwen3moe"):
        family_of_gguf("rwkv")
    with pytest.raises(ModelFileError, match="mixtral"):
        family_of_hf("rwkv")
    for kind in ("hf", "gguf"):
        names = [name for family in FAMILIES for name in getattr(family, kind)]
        assert len(set(names)) == len(names)
