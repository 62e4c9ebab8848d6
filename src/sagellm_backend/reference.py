"""Every `DecoderSpec` in readable numpy, float32: the oracle of the other backends, and what serves without a compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sagellm_backend.adapter import Adapter, check_adapter
from sagellm_backend.base import BLOCK_SIZE, Capability, LoadOptions, MemoryInfo, StepBatch, StepResult
from sagellm_backend.blas import set_blas_threads
from sagellm_backend.checks import check_batch, check_weights
from sagellm_backend.encoder import EncoderSpec
from sagellm_backend.host import host_memory
from sagellm_backend.quant import dequantize, round_trip
from sagellm_backend.reference_encoder import ReferenceEncoder
from sagellm_backend.reference_ops import Tiling, activate, attend, rms_norm, rotate, route, softcap
from sagellm_backend.sampling import sample_rows
from sagellm_backend.spec import DecoderSpec
from sagellm_backend.tensors import Format, Tensor, Weights
from sagellm_protocol.errors import UnsupportedError

__all__ = ["ReferenceBackend", "ReferenceKV", "ReferenceRunner"]

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

_REQUANTIZED = {"q4": Format.Q4_1, "q8": Format.Q8_0, "bf16": Format.BF16}


class ReferenceBackend:
    """numpy on the CPU."""

    @property
    def name(self) -> str:
        """``reference``."""
        return "reference"

    def available(self) -> str | None:
        """None: numpy is a dependency."""
        return None

    def capability(self) -> Capability:
        """Return what it can do: everything, in float32."""
        return Capability(
            device="cpu", formats=("f32",), kv_dtypes=("f32",), instruction_set="numpy", batch_invariant=True
        )

    def memory(self) -> MemoryInfo:
        """Return total and free main memory in bytes."""
        return host_memory()

    def kv_block_bytes(self, spec: DecoderSpec, kv_dtype: str) -> int:
        """Return the bytes of one float32 KV block.

        Raises:
            UnsupportedError: `kv_dtype` is neither ``auto`` nor ``f32``.
        """
        if kv_dtype not in ("auto", "f32"):
            raise UnsupportedError(
                f"the reference backend keeps KV in f32, not {kv_dtype}: drop --kv-dtype", param="kv_dtype"
            )
        return spec.n_layers * 2 * BLOCK_SIZE * spec.n_kv_heads * spec.head_dim * 4

    def load(self, spec: DecoderSpec, weights: Weights, options: LoadOptions) -> ReferenceRunner:
        """Dequantise the weights to float32 and allocate the cache.

        With `options.quant` the matrices are first rounded to that precision (q4: ggml's Q4_1, q8: Q8_0), so that the
        result is what an exact backend would compute with such weights.

        Raises:
            ValueError: a slot is missing or has another shape.
            UnsupportedError: a KV dtype other than f32, or a number of threads that numpy's BLAS cannot be held to.
        """
        _set_threads(options)
        block_bytes = self.kv_block_bytes(spec, options.kv_dtype)
        check_weights(spec, weights)
        arrays = {slot: _load_array(slot, weights[slot], options.quant) for slot in spec.slots()}
        return ReferenceRunner(spec, arrays, options, ReferenceKV(spec, options.n_blocks, block_bytes))

    def load_encoder(self, spec: EncoderSpec, weights: Weights, options: LoadOptions) -> ReferenceEncoder:
        """Dequantise an encoder's weights to float32.

        Raises:
            ValueError: a slot is missing or has another shape.
            UnsupportedError: a number of threads that numpy's BLAS cannot be held to.
        """
        _set_threads(options)
        check_weights(spec, weights)
        return ReferenceEncoder(spec, {slot: _load_array(slot, weights[slot], options.quant) for slot in spec.slots()})


def _set_threads(options: LoadOptions) -> None:
    if options.threads and not set_blas_threads(options.threads):
        raise UnsupportedError(
            f"numpy's BLAS cannot be held to {options.threads} threads from here: leave --threads out and set "
            "OPENBLAS_NUM_THREADS, MKL_NUM_THREADS or the like before the start",
            param="threads",
        )


def _load_array(slot: str, tensor: Tensor, quant: str) -> Float32:
    array = dequantize(tensor)
    fmt = _REQUANTIZED.get(quant)
    if fmt is None or array.ndim == 1 or slot.endswith(".router"):  # a router is tiny and its errors change the path
        return array
    if array.shape[-1] % fmt.block:
        raise UnsupportedError(
            f"rows of {array.shape[-1]} weights cannot be quantised to {quant} in blocks of {fmt.block}", param="quant"
        )
    return round_trip(array, fmt)


class ReferenceKV:
    """Keys and values in float32, (n_blocks, layers, 2, BLOCK_SIZE, kv_heads, head_dim): a block is contiguous."""

    def __init__(self, spec: DecoderSpec, n_blocks: int, block_bytes: int) -> None:
        # Untouched pages of zeros cost nothing until they are written.
        self._data = np.zeros((n_blocks, spec.n_layers, 2, BLOCK_SIZE, spec.n_kv_heads, spec.head_dim), np.float32)
        self._block_bytes = block_bytes

    @property
    def n_blocks(self) -> int:
        """Blocks that it holds."""
        return self._data.shape[0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers, K and V."""
        return self._block_bytes

    def keys(self, layer: int) -> Float32:
        """View (n_blocks, BLOCK_SIZE, kv_heads, head_dim)."""
        return self._data[:, layer, 0]

    def values(self, layer: int) -> Float32:
        """View (n_blocks, BLOCK_SIZE, kv_heads, head_dim)."""
        return self._data[:, layer, 1]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) pairs, in order.

        Raises:
            ValueError: a block number is out of range.
        """
        self._check([block for pair in pairs for block in pair])
        for source, destination in pairs:
            self._data[destination] = self._data[source]

    def export_blocks(self, blocks: Sequence[int]) -> bytes:
        """Return the blocks' content, `block_bytes` each.

        Raises:
            ValueError: a block number is out of range.
        """
        self._check(blocks)
        return self._data[np.asarray(blocks, np.int64)].tobytes()

    def import_blocks(self, blocks: Sequence[int], data: bytes | memoryview) -> None:
        """Fill blocks with exported content.

        Raises:
            ValueError: `data` is not ``len(blocks) * block_bytes`` long, or a block number is out of range.
        """
        self._check(blocks)
        view = memoryview(data).cast("B")
        if view.nbytes != len(blocks) * self._block_bytes:
            raise ValueError(f"{view.nbytes} bytes for {len(blocks)} blocks of {self._block_bytes} bytes")
        content = np.frombuffer(view, np.float32).reshape(len(blocks), *self._data.shape[1:])
        self._data[np.asarray(blocks, np.int64)] = content

    def _check(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if not 0 <= block < self.n_blocks:
                raise ValueError(f"block {block} is out of range: the cache has 0 to {self.n_blocks - 1}")


class ReferenceRunner:
    """A decoder with float32 weights."""

    def __init__(self, spec: DecoderSpec, weights: dict[str, Float32], options: LoadOptions, kv: ReferenceKV) -> None:
        self._spec = spec
        self._weights = weights
        self._options = options
        self._kv = kv
        self._adapters: dict[int, Adapter] = {}

    @property
    def spec(self) -> DecoderSpec:
        """What it executes."""
        return self._spec

    @property
    def kv(self) -> ReferenceKV:
        """Its KV cache."""
        return self._kv

    @property
    def weight_bytes(self) -> int:
        """Bytes of the float32 weights."""
        return sum(array.nbytes for array in self._weights.values())

    def close(self) -> None:
        """Drop the weights, the adapters and the cache."""
        self._weights = {}
        self._adapters = {}
        self._kv = ReferenceKV(self._spec, 0, self._kv.block_bytes)

    def load_adapter(self, number: int, adapter: Adapter) -> None:
        """Make `adapter` known as `number` (`AdapterRunner`).

        Raises:
            ValueError: it does not fit the model, or the number is in use.
        """
        if number < 0 or number in self._adapters:
            raise ValueError(f"adapter number {number} is negative or in use")
        check_adapter(self._spec, adapter)
        self._adapters[number] = adapter

    def unload_adapter(self, number: int) -> None:
        """Forget an adapter.

        Raises:
            KeyError: there is none of that number.
        """
        del self._adapters[number]

    def step(self, batch: StepBatch) -> StepResult:
        """Run one forward pass, write the rows' KV, draw the wanted tokens.

        Raises:
            ValueError: the batch does not add up (see `sagellm_backend.checks`).
            RuntimeError: the runner is closed.
        """
        if not self._weights:
            raise RuntimeError("the runner is closed")
        check_batch(batch, self._spec, self._options)
        rows = _Rows(batch, self._adapters)
        x = self._weights["embed"][batch.token_ids] * np.float32(self._spec.embed_scale)
        for layer in range(self._spec.n_layers):
            x = self._block(layer, x, rows)
        hidden = rms_norm(x[batch.logit_rows], self._weights["final_norm"], self._spec.norm_eps)
        return self._finish(hidden, batch, rows.tiling.of(batch.logit_rows))

    def _finish(self, hidden: Float32, batch: StepBatch, tiling: Tiling) -> StepResult:
        kept = hidden if batch.want_hidden else None
        if not batch.sampling and not batch.want_logits:
            return StepResult(np.empty(0, np.int32), np.empty(0, np.float32), hidden=kept)
        logits = self._logits(hidden, tiling)
        if batch.masks_ready is not None:
            batch.masks_ready()
        tokens, logprobs, top_ids, top_logprobs = sample_rows(logits, batch.sampling)
        return StepResult(tokens, logprobs, top_ids, top_logprobs, logits if batch.want_logits else None, kept)

    def _logits(self, hidden: Float32, tiling: Tiling) -> Float32:
        spec = self._spec
        head = self._weights["embed" if spec.tied_head else "head"]
        return softcap(tiling.linear(hidden, head) * np.float32(spec.logit_scale), spec.final_softcap)

    def _block(self, layer: int, x: Float32, rows: _Rows) -> Float32:
        """One layer: attention and feed-forward, each normed before, after or both, and added to the residual stream."""
        scale = np.float32(self._spec.residual_scale)
        h = self._norm(layer, "attn_norm", x)
        x = x + scale * self._norm(layer, "post_attn_norm", self._attention(layer, h, rows))
        h = self._norm(layer, "ffn_norm", x)
        return x + scale * self._norm(layer, "post_ffn_norm", self._feed_forward(layer, h, rows))

    def _norm(self, layer: int, name: str, x: Float32) -> Float32:
        """The norm of that name; the identity where the spec's placement has none."""
        weight = self._weights.get(f"{layer}.{name}")
        return x if weight is None else rms_norm(x, weight, self._spec.norm_eps)

    def _linear(self, layer: int, name: str, x: Float32, rows: _Rows) -> Float32:
        slot = f"{layer}.{name}"
        out = rows.tiling.linear(x, self._weights[slot], self._weights.get(f"{slot}_bias"))
        for adapter, takers, tiling in rows.adapted:
            if slot in adapter.factors:
                a, b = adapter.factors[slot]
                out[takers] += tiling.linear(tiling.linear(x[takers], a), b)
        return out

    def _attention(self, layer: int, x: Float32, rows: _Rows) -> Float32:
        spec, rope = self._spec, self._spec.rope_of(layer)
        q = self._heads(layer, "q", x, rows, spec.n_heads)
        k = self._heads(layer, "k", x, rows, spec.n_kv_heads)
        v = self._linear(layer, "v", x, rows).reshape(k.shape)
        keys, values = self._kv.keys(layer), self._kv.values(layer)
        keys[rows.blocks, rows.offsets] = rotate(k, rows.positions, rope)
        values[rows.blocks, rows.offsets] = v
        q = rotate(q, rows.positions, rope)
        out = np.empty_like(q)
        scale, window, cap = spec.attention_scale, spec.window(layer), spec.attention_softcap
        for part, table, start in rows.sequences:
            out[part] = attend(q[part], keys, values, table, start, scale=scale, window=window, cap=cap)
        return self._linear(layer, "o", out.reshape(-1, spec.n_heads * spec.head_dim), rows)

    def _heads(self, layer: int, name: str, x: Float32, rows: _Rows, heads: int) -> Float32:
        """Projection of q or k with its norm, (rows, heads, head_dim)."""
        projected = self._linear(layer, name, x, rows)
        if self._spec.qk_norm == "full":
            projected = self._norm(layer, f"{name}_norm", projected)
        projected = projected.reshape(-1, heads, self._spec.head_dim)
        return self._norm(layer, f"{name}_norm", projected) if self._spec.qk_norm == "head" else projected

    def _feed_forward(self, layer: int, x: Float32, rows: _Rows) -> Float32:
        if f"{layer}.router" in self._weights:
            return self._experts(layer, x, rows)
        h = activate(self._linear(layer, "gate", x, rows), self._spec.activation) * self._linear(layer, "up", x, rows)
        return self._linear(layer, "down", h, rows)

    def _experts(self, layer: int, x: Float32, rows: _Rows) -> Float32:
        """Mixture of experts: every expert runs once, over the rows that chose it."""
        experts = self._spec.experts
        assert experts is not None
        chosen, shares = route(self._linear(layer, "router", x, rows), experts)
        gate, up, down = (self._weights[f"{layer}.experts.{name}"] for name in ("gate", "up", "down"))
        parts = np.zeros((x.shape[0], experts.top_k, x.shape[1]), np.float32)
        for expert in np.unique(chosen):
            takers, places = np.nonzero(chosen == expert)
            tiling, h = rows.tiling.of(takers), x[takers]
            h = activate(tiling.linear(h, gate[expert]), self._spec.activation) * tiling.linear(h, up[expert])
            parts[takers, places] = tiling.linear(h, down[expert])
        out: Float32 = (parts * shares[:, :, None]).sum(axis=1)
        return out


class _Rows:
    """Where the rows of a batch lie: position, KV slot, tile and sequence; and which rows use which adapter."""

    def __init__(self, batch: StepBatch, adapters: Mapping[int, Adapter]) -> None:
        self.positions = batch.positions
        self.tiling = Tiling(self.positions)
        sequence_of_row = np.repeat(np.arange(batch.lengths.size), batch.lengths)
        self.blocks = batch.block_tables[sequence_of_row, self.positions // BLOCK_SIZE]
        self.offsets = self.positions % BLOCK_SIZE
        ends = np.cumsum(batch.lengths)
        self.sequences = [
            (slice(int(end - length), int(end)), table, int(start))
            for table, start, length, end in zip(batch.block_tables, batch.starts, batch.lengths, ends, strict=True)
        ]
        self.adapted = self._adapted(batch, sequence_of_row, adapters)

    def _adapted(
        self, batch: StepBatch, sequence_of_row: npt.NDArray[np.int64], adapters: Mapping[int, Adapter]
    ) -> list[tuple[Adapter, npt.NDArray[np.int64], Tiling]]:
        """Each adapter in use with its rows."""
        if batch.adapters is None:
            return []
        numbers = batch.adapters[sequence_of_row]
        out = []
        for number in np.unique(numbers[numbers >= 0]).tolist():
            if number not in adapters:
                raise ValueError(f"a sequence uses adapter {number}, which is not loaded")
            takers = np.flatnonzero(numbers == number)
            out.append((adapters[number], takers, self.tiling.of(takers)))
        return out
