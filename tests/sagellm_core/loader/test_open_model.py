"""Opening a model: spec, slots and shapes of GGUF files and of model directories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_backend.tensors import Tensor
from sagellm_core.loader import open_model
from sagellm_core.loader.gguf import GGUFArray, read_header
from sagellm_core.loader.gguf_write import write_gguf
from sagellm_protocol.errors import ModelFileError


def test_a_gguf_file_gives_spec_and_every_slot(tiny_gguf: Callable[..., Path], tiny_tensors: dict[str, Tensor]) -> None:
    """Slots of the spec have the spec's shapes and the file's bytes."""
    with open_model(tiny_gguf()) as model:
        assert (model.spec.n_layers, model.spec.d_model, model.spec.head_dim, model.spec.vocab_size) == (2, 32, 8, 12)
        assert model.spec.rope.layout == "interleaved"
        assert model.spec.tied_head
        assert set(model.weights) == set(model.spec.slots())
        for slot, shape in model.spec.slots().items():
            assert model.weights[slot].shape == shape
        assert np.array_equal(model.weights["1.k"].data, tiny_tensors["blk.1.attn_k.weight"].data)
        assert model.quantization == "F32"


def test_a_split_file_opens_by_any_part(
    tiny_gguf: Callable[..., Path], tiny_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """The parts of a split file give one model; a missing, renamed or repeated part is named."""
    whole = tiny_gguf()
    metadata = {k: list(v) if isinstance(v, GGUFArray) else v for k, v in read_header(whole).metadata.items()}
    names = sorted(tiny_tensors)
    for part in range(3):
        own = {name: tiny_tensors[name] for name in names[part::3]}
        split = {"split.no": part, "split.count": 3, "split.tensors.count": len(names)}
        write_gguf(tmp_path / f"m-0000{part + 1}-of-00003.gguf", (metadata if part == 0 else {}) | split, own)
    for part in (1, 2):
        with open_model(tmp_path / f"m-0000{part}-of-00003.gguf") as model, open_model(whole) as expected:
            assert model.spec == expected.spec
            assert model.weights.identity.count("\n") == 2  # type: ignore[attr-defined]
            assert all(np.array_equal(model.weights[s].data, expected.weights[s].data) for s in expected.weights)
    (tmp_path / "m-00003-of-00003.gguf").rename(tmp_path / "x.gguf")
    with pytest.raises(ModelFileError, match=r"00003-of-00003\.gguf does not exist"):
        open_model(tmp_path / "m-00001-of-00003.gguf")
    with pytest.raises(ModelFileError, match="3 parts"):
        open_model(tmp_path / "x.gguf")
    (tmp_path / "m-00003-of-00003.gguf").write_bytes((tmp_path / "m-00002-of-00003.gguf").read_bytes())
    with pytest.raises(ModelFileError, match="two parts"):
        open_model(tmp_path / "m-00001-of-00003.gguf")


def test_views_outlive_the_model(tiny_gguf: Callable[..., Path], tiny_tensors: dict[str, Tensor]) -> None:
    """A tensor taken before closing keeps its bytes; closing twice is allowed."""
    model = open_model(tiny_gguf())
    tensor = model.weights["embed"]
    model.close()
    model.close()
    assert np.array_equal(tensor.data, tiny_tensors["token_embd.weight"].data)


@pytest.mark.parametrize(
    ("metadata", "fact"),
    [
        ({"general.architecture": "frankenstein"}, "frankenstein.*llama"),
        ({"general.architecture": None}, "general.architecture"),
        ({"general.architecture": 3}, "general.architecture"),
        ({"llama.block_count": None}, "block_count is missing"),
        ({"llama.block_count": "two"}, "not a whole number"),
        ({"llama.block_count": 1 << 40}, "layers is"),
        ({"llama.block_count": 3}, "blk.2"),
        ({"llama.attention.head_count": 0}, "0 attention heads"),
        ({"llama.attention.head_count_kv": 3}, "cannot share"),
        ({"llama.attention.head_count_kv": [2, 1]}, "not a whole number"),
        ({"llama.feed_forward_length": 128}, "shape"),
        ({"llama.rope.dimension_count": 9}, "rotary"),
        ({"llama.rope.scaling.type": "wavy"}, "wavy"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "not a number"),
    ],
)
def test_contradictions_are_named(tiny_gguf: Callable[..., Path], metadata: dict[str, Any], fact: str) -> None:
    """Metadata that is missing, absurd or at odds with the tensors is refused with the fact."""
    with pytest.raises(ModelFileError, match=fact):
        open_model(tiny_gguf(metadata))


def test_a_missing_tensor_is_named(tiny_gguf: Callable[..., Path]) -> None:
    """The error of an incomplete file names the tensor and the slot."""
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_down\.weight.*1\.down"):
        open_model(tiny_gguf(tensors={"blk.1.ffn_down.weight": None}))


def test_one_value_a_layer_is_one_value(tiny_gguf: Callable[..., Path]) -> None:
    """Metadata written once a layer is accepted where all layers agree."""
    assert open_model(tiny_gguf({"llama.attention.head_count_kv": [2, 2]})).spec.n_kv_heads == 2


def test_llama3_factors_come_from_their_tensor(tiny_gguf: Callable[..., Path]) -> None:
    """`rope_freqs.weight` becomes the divisors of the rotation's frequencies."""
    factors = np.array([1, 1, 2, 8], np.float32)
    spec = open_model(tiny_gguf(tensors={"rope_freqs.weight": Tensor.of(factors)})).spec
    assert spec.rope.inv_freq_factors == (1, 1, 2, 8)
    with pytest.raises(ModelFileError, match="not positive"):
        open_model(tiny_gguf(tensors={"rope_freqs.weight": Tensor.of(factors * 0)}))


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, blobs = 0, []
    for name, array in tensors.items():
        blob = array.astype(np.float32).tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


_CONFIG = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "vocab_size": 5, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (5, 8), "model.norm.weight": (8,), layer + "input_layernorm.weight": (8,),
        layer + "post_attention_layernorm.weight": (8,), layer + "self_attn.q_proj.weight": (8, 8),
        layer + "self_attn.k_proj.weight": (8, 8), layer + "self_attn.v_proj.weight": (8, 8),
        layer + "self_attn.o_proj.weight": (8, 8), layer + "mlp.gate_proj.weight": (16, 8),
        layer + "mlp.up_proj.weight": (16, 8), layer + "mlp.down_proj.weight": (8, 16),
    }  # fmt: skip
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_directory_gives_spec_and_every_slot(tmp_path: Path, shards: int) -> None:
    """A directory with config.json opens with one file and with shards alike, and so does the file alone."""
    (tmp_path / "config.json").write_text(json.dumps(_CONFIG))
    arrays = _arrays()
    names = list(arrays)
    if shards == 1:
        _write_safetensors(tmp_path / "model.safetensors", arrays)
        assert open_model(tmp_path / "model.safetensors").spec.n_layers == 1
    else:
        weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            _write_safetensors(tmp_path / file, {n: arrays[n] for n in names if weight_map[n] == file})
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_model(tmp_path) as model:
        assert model.spec.rope.layout == "half"
        assert set(model.weights) == set(model.spec.slots())
        data = model.weights["0.down"].data.view(np.float32)
        assert np.array_equal(data.reshape(8, 16), arrays["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        ({"model_type": "bert2"}, "bert2"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_act": "tanhh"}, "tanhh"),
        ({"tie_word_embeddings": False}, "lm_head"),
        ({"rope_scaling": {"rope_type": "odd", "factor": 2}}, "odd"),
        ({"rope_scaling": [1]}, "not an object"),
        ({"vocab_size": 6}, "shape"),
    ],
)
def test_contradictions_of_a_config_are_named(tmp_path: Path, config: dict[str, Any], fact: str) -> None:
    """A config.json that is malformed or at odds with the tensors is refused with the fact."""
    (tmp_path / "config.json").write_text(json.dumps(_CONFIG | config))
    _write_safetensors(tmp_path / "model.safetensors", _arrays())
    with pytest.raises(ModelFileError, match=fact):
        open_model(tmp_path)


def test_a_directory_without_its_files_is_named(tmp_path: Path) -> None:
    """What a directory lacks is said: config.json, weights, a shard, and no path leads out of it."""
    with pytest.raises(ModelFileError, match=r"config\.json"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelFileError, match="JSON object"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(_CONFIG))
    with pytest.raises(ModelFileError, match=r"no \.safetensors"):
        open_model(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(ModelFileError, match="outside"):
        open_model(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ModelFileError, match="does not exist"):
        open_model(tmp_path)


@pytest.mark.model
def test_real_models_open(default_model_path: Path, gemma_model_path: Path) -> None:
    """SmolLM2 and Gemma 3 open with the sizes of their model cards."""
    spec = open_model(default_model_path).spec
    assert (spec.n_layers, spec.d_model, spec.n_heads, spec.n_kv_heads, spec.head_dim) == (30, 576, 9, 3, 64)
    assert (spec.tied_head, spec.rope.layout, spec.rope.theta) == (True, "interleaved", 100000.0)
    spec = open_model(gemma_model_path).spec
    assert (spec.n_layers, spec.d_model, spec.head_dim, spec.norm_placement, spec.qk_norm) == (
        18,
        640,
        256,
        "both",
        "head",
    )
    assert spec.windows == (512, 512, 512, 512, 512, 0) * 3
    assert spec.rope_local is not None
    assert (spec.rope.theta, spec.rope_local.theta) == (1e6, 1e4)
