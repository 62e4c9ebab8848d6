"""A model on the native backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sagellm_backend.adapter import Adapter, check_adapter
from sagellm_backend.base import LoadOptions, StepBatch, StepResult
from sagellm_backend.cpu import _native
from sagellm_backend.cpu.layout import Layout, plan_layout
from sagellm_backend.cpu.weight_cache import Arena, anonymous_arena, cached_arena
from sagellm_backend.host import host_threads
from sagellm_backend.quant import dequantize
from sagellm_backend.spec import DecoderSpec, RopeSpec
from sagellm_backend.tensors import Weights

__all__ = ["CpuKV", "CpuRunner"]

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


class CpuKV:
    """The paged KV cache of a `CpuRunner`."""

    def __init__(self, model: _native.Model) -> None:
        self._model = model

    @property
    def n_blocks(self) -> int:
        """Blocks that it holds."""
        return self._model.n_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers, K and V."""
        return self._model.block_bytes

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) pairs, in order.

        Raises:
            ValueError: a block number is out of range; nothing is copied then.
        """
        self._model.copy_blocks([(int(a), int(b)) for a, b in pairs])

    def export_blocks(self, blocks: Sequence[int]) -> bytes:
        """Return the blocks' content, `block_bytes` each, in this machine's layout (the same for every instruction set).

        Raises:
            ValueError: a block number is out of range.
        """
        return self._model.export_blocks([int(b) for b in blocks])

    def import_blocks(self, blocks: Sequence[int], data: bytes | memoryview) -> None:
        """Fill blocks with exported content.

        Raises:
            ValueError: `data` is not ``len(blocks) * block_bytes`` long, or a block number is out of range.
        """
        self._model.import_blocks([int(b) for b in blocks], np.frombuffer(data, np.uint8))


class CpuRunner:
    """A decoder whose step is one native call; see `sagellm_backend.cpu.backend.CpuBackend`."""

    def __init__(self, spec: DecoderSpec, weights: Weights, options: LoadOptions, *, isa: str, kv_dtype: str) -> None:
        model = _native.Model(_config(spec), isa, options.threads or host_threads())
        layout = plan_layout(spec, weights, options.quant)
        arena = _packed(model, layout, weights, options.cache_dir)
        for placed in layout.matrices:
            model.set_matrix(
                placed.slot, placed.packed, placed.outputs, placed.inputs, arena, placed.offset, placed.panel_stride
            )
        for slot, shape in spec.slots().items():
            if len(shape) == 1:
                model.set_vector(slot, dequantize(weights[slot]))
        model.finish(options.n_blocks, options.max_rows, options.max_logit_rows, kv_dtype)
        self._spec = spec
        self._adapters: set[int] = set()
        self._kv = CpuKV(model)
        self._model: _native.Model | None = model
        self._weight_bytes = layout.nbytes

    @property
    def spec(self) -> DecoderSpec:
        """What it executes."""
        return self._spec

    @property
    def kv(self) -> CpuKV:
        """Its KV cache."""
        return self._kv

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self._weight_bytes

    @property
    def threads(self) -> int:
        """Threads that a step runs on, the caller's included."""
        return self._open.threads

    @property
    def _open(self) -> _native.Model:
        if self._model is None:
            raise RuntimeError("the runner is closed")
        return self._model

    def step(self, batch: StepBatch) -> StepResult:
        """Run one forward pass, write the rows' KV, draw the wanted tokens.

        Raises:
            ValueError: the batch does not add up or names what is not there; nothing was computed then.
            RuntimeError: the runner is closed.
        """
        token_ids, logprobs, top_ids, top_logprobs, logits, hidden = self._open.step(
            _int32(batch.token_ids),
            _int32(batch.starts),
            _int32(batch.lengths),
            _int32(batch.block_tables),
            _int32(batch.logit_rows),
            list(batch.sampling),
            batch.want_logits,
            batch.want_hidden,
            None if batch.adapters is None else _int32(batch.adapters),
            batch.masks_ready,
        )
        return StepResult(token_ids, logprobs, top_ids, top_logprobs, logits, hidden)

    def load_adapter(self, number: int, adapter: Adapter) -> None:
        """Make `adapter` known as `number` (`AdapterRunner`).

        Raises:
            ValueError: it does not fit the model, or the number is in use.
        """
        if number < 0 or number in self._adapters:
            raise ValueError(f"adapter number {number} is negative or in use")
        check_adapter(self._spec, adapter)
        for slot, (a, b) in adapter.factors.items():
            self._open.set_adapter(number, slot, _float32(a), _float32(b))
        self._adapters.add(number)

    def unload_adapter(self, number: int) -> None:
        """Forget an adapter.

        Raises:
            KeyError: there is none of that number.
        """
        self._adapters.remove(number)
        self._open.drop_adapter(number)

    def close(self) -> None:
        """Free weights, cache and threads. Idempotent."""
        self._model = None
        self._kv = _ClosedKV(self._kv)


class _ClosedKV(CpuKV):
    """Sizes of a cache that is gone."""

    def __init__(self, kv: CpuKV) -> None:
        self._n_blocks, self._block_bytes = kv.n_blocks, kv.block_bytes

    @property
    def n_blocks(self) -> int:
        """Blocks that it held."""
        return self._n_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers, K and V."""
        return self._block_bytes

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Raise RuntimeError."""
        raise RuntimeError(f"the runner is closed: {len(pairs)} copies refused")

    def export_blocks(self, blocks: Sequence[int]) -> bytes:
        """Raise RuntimeError."""
        raise RuntimeError(f"the runner is closed: export of {len(blocks)} blocks refused")

    def import_blocks(self, blocks: Sequence[int], data: bytes | memoryview) -> None:
        """Raise RuntimeError."""
        raise RuntimeError(f"the runner is closed: {len(data)} bytes for {len(blocks)} blocks refused")


def _float32(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(array, dtype=np.float32)


def _int32(array: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(array, dtype=np.int32)


def _packed(model: _native.Model, layout: Layout, weights: Weights, cache_dir: str | None) -> Arena:
    """The arena of `layout`, from the cache if there is one."""

    def pack(arena: Arena) -> None:
        for placed in layout.matrices:
            tensor = weights[placed.tensor]
            model.pack_matrix(
                placed.packed,
                placed.outputs,
                placed.inputs,
                tensor.format.name,
                np.ascontiguousarray(placed.part(tensor.data)),
                arena,
                placed.offset,
                placed.panel_stride,
            )

    if cache_dir is not None:
        return cached_arena(Path(cache_dir), layout, weights, pack)
    arena = anonymous_arena(layout.nbytes)
    pack(arena)
    return arena


def _config(spec: DecoderSpec) -> dict[str, object]:
    """The spec as the native side reads it."""
    ropes = [spec.rope] if spec.rope_local is None else [spec.rope, spec.rope_local]
    layers, experts = range(spec.n_layers), spec.experts
    return {
        "n_layers": spec.n_layers,
        "d_model": spec.d_model,
        "n_heads": spec.n_heads,
        "n_kv_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "d_ff": spec.d_ff,
        "vocab": spec.vocab_size,
        "norm_eps": spec.norm_eps,
        "attention_scale": spec.attention_scale,
        "attention_softcap": spec.attention_softcap,
        "final_softcap": spec.final_softcap,
        "embed_scale": spec.embed_scale,
        "residual_scale": spec.residual_scale,
        "logit_scale": spec.logit_scale,
        "pre_norm": spec.norm_placement in ("pre", "both"),
        "post_norm": spec.norm_placement in ("post", "both"),
        "tied_head": spec.tied_head,
        "qk_norm_head": spec.qk_norm == "head",
        "qk_norm_full": spec.qk_norm == "full",
        "qkv_bias": spec.qkv_bias,
        "o_bias": spec.o_bias,
        "n_experts": experts.n_experts if experts else 0,
        "experts_top_k": experts.top_k if experts else 0,
        "experts_d_ff": experts.d_ff if experts else 0,
        "experts_normalize": experts.normalize if experts else True,
        "expert_layer": [experts is not None and layer in spec.expert_layers for layer in layers],
        "activation": _ACTIVATIONS[spec.activation],
        "windows": [spec.window(layer) for layer in layers],
        "layer_rope": [int(spec.rope_of(layer) is not spec.rope) for layer in layers],
        "ropes": [_rope(rope) for rope in ropes],
    }


def _rope(rope: RopeSpec) -> dict[str, object]:
    factors = rope.inv_freq_factors or (1.0,) * (rope.dim // 2)
    return {
        "dim": rope.dim,
        "interleaved": rope.layout == "interleaved",
        "magnitude": rope.magnitude_scale,
        "frequencies": [
            rope.position_scale * rope.theta ** (-2.0 * i / rope.dim) / factors[i] for i in range(rope.dim // 2)
        ],
    }
