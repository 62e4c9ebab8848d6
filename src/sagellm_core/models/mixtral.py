"""mixtral as safetensors; its GGUF files call themselves llama."""

from __future__ import annotations

from collections.abc import Collection

from sagellm_backend.spec import DecoderSpec, ExpertSpec
from sagellm_core.models.base import Family, Slots, gguf_slots, hf_slots
from sagellm_core.models.common import all_layers, hf_base, hf_windows
from sagellm_core.models.views import Config, Metadata
from sagellm_protocol.errors import ModelFileError

__all__ = ["FAMILY"]

_NAMES = {
    "router": "block_sparse_moe.gate.weight",
    "experts.gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "experts.down": "block_sparse_moe.experts.{expert}.w2.weight",
    "experts.up": "block_sparse_moe.experts.{expert}.w3.weight",
}


def _gguf(meta: Metadata) -> DecoderSpec:
    raise ModelFileError(f"{meta.architecture} is not written to GGUF files under that name: the file is malformed")


def _hf(config: Config) -> DecoderSpec:
    n_layers = config.integer("num_hidden_layers")
    experts = ExpertSpec(
        n_experts=config.integer("num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        d_ff=config.integer("intermediate_size"),
    )
    return hf_base(config, experts=experts, expert_layers=all_layers(n_layers), windows=hf_windows(config, n_layers))


def _hf_slots(spec: DecoderSpec, names: Collection[str]) -> Slots:
    return hf_slots(spec, names, rename=_NAMES)


FAMILY = Family("mixtral", (), ("mixtral",), _gguf, _hf, gguf_slots, _hf_slots)
