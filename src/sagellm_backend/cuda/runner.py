"""A model on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sagellm_backend.adapter import Adapter, check_adapter
from sagellm_backend.base import LoadOptions, StepBatch, StepResult
from sagellm_backend.checks import check_batch
from sagellm_backend.cuda.adapters import AdapterStack
from sagellm_backend.cuda.device import on_device
from sagellm_backend.cuda.forward import Forward
from sagellm_backend.cuda.graphs import Capture, Capturer, DecodeGraphs, ladder
from sagellm_backend.cuda.kv import CudaKV
from sagellm_backend.cuda.memory import (
    GRAPH_ROWS,
    GpuMeter,
    Meter,
    Room,
    allocate_kv,
    largest_step,
    step_refusal,
    trial_blocks,
)
from sagellm_backend.cuda.ops import TorchOps
from sagellm_backend.cuda.plan import plan_step, upload
from sagellm_backend.cuda.sampling import Drawn, draw, report
from sagellm_backend.cuda.sampling_plan import plan_sampling
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.cuda.weights import DTYPES, WeightSet
from sagellm_backend.spec import DecoderSpec

if TYPE_CHECKING:  # it needs Triton
    from sagellm_backend.cuda.single import SingleRows

__all__ = ["CudaRunner", "PendingStep"]

MOST_ROWS = 2
"""Sequences of a step that are few: each row reads the weights again, from the second on out of the chip's cache."""


@dataclass(slots=True)
class PendingStep:
    """A step that the device works on.

    Attributes:
        tokens: int32 on the device, what its logit rows draw; None if they draw nothing.
    """

    tokens: torch.Tensor | None
    _drawn: Drawn | None
    _logits: torch.Tensor | None
    _hidden: torch.Tensor | None
    _done: Any

    def result(self) -> StepResult:
        """Wait for it; the GIL is free meanwhile."""
        if self._done is not None:
            self._done.synchronize()
        hidden = None if self._hidden is None else self._hidden.numpy()
        if self._drawn is None:
            return StepResult(np.empty(0, np.int32), np.empty(0, np.float32), hidden=hidden)
        drawn = self._drawn
        logits = None if self._logits is None else self._logits.numpy()
        tokens = drawn.tokens.numpy()
        if drawn.logprobs is None or drawn.top_ids is None or drawn.top_logprobs is None:
            none = np.empty((tokens.size, 0), np.int32)
            unknown = np.full(tokens.size, np.nan, np.float32)
            return StepResult(tokens, unknown, none, none.view(np.float32), logits, hidden)
        ids, logprobs = drawn.top_ids.numpy(), drawn.top_logprobs.numpy()
        return StepResult(tokens, drawn.logprobs.numpy(), ids, logprobs, logits, hidden)


class CudaRunner:
    """A decoder by torch and Triton; see `sagellm_backend.cuda.backend.CudaBackend`.

    Args:
        spec: the model.
        weights: its weights, on the device.
        options: sizes.
        settings: how to run.
        kv_dtype: precision of the cache, ``bf16`` or ``f32``.
        meter: of the device's memory; None is torch's own, and none off the GPU: the cache then has the blocks it was asked for.

    Attributes:
        graphs, single_graphs: the decode steps that were captured, those of few sequences apart; None where there are none.
        peak_step_bytes: what the largest step took beside weights and cache, measured at load; 0 where it was not.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        weights: WeightSet,
        options: LoadOptions,
        settings: CudaSettings,
        kv_dtype: str,
        meter: Meter | None = None,
    ) -> None:
        self._spec, self._settings = spec, settings
        self._weight_bytes = weights.nbytes
        self._ops = _make_ops(spec, weights.dtype, settings)
        self._weights: WeightSet | None = weights
        self._adapters = AdapterStack(settings.device, weights.dtype)
        self.peak_step_bytes = 0
        meter = GpuMeter(settings.device) if meter is None and settings.on_gpu else meter
        if meter is not None:
            options = self._measure(options, DTYPES[kv_dtype], meter)
        self._place(allocate_kv(spec, options.n_blocks, DTYPES[kv_dtype], settings.device), options, weights)

    def _measure(self, options: LoadOptions, dtype: torch.dtype, meter: Meter) -> LoadOptions:
        """Run the largest step beside the smallest cache that it needs; return the options with the blocks that then fit.

        It also compiles the kernels of prompts, so that the first request does not wait for them.
        """
        assert self._weights is not None
        trial = replace(options, n_blocks=trial_blocks(options))
        try:
            self._place(CudaKV(self._spec, trial.n_blocks, dtype, self._settings.device), trial, self._weights)
            meter.begin()
            self.step(largest_step(trial))
        except torch.OutOfMemoryError as error:
            raise step_refusal(options, self._weight_bytes, self._settings.device) from error
        self.peak_step_bytes = meter.peak()
        block_bytes = self._kv.block_bytes
        self._kv.close()
        room = Room(*meter.free(), self._weight_bytes, self.peak_step_bytes)
        return replace(options, n_blocks=room.blocks(options, block_bytes))

    def _place(self, kv: CudaKV, options: LoadOptions, weights: WeightSet) -> None:
        """Make what works on a cache."""
        spec, settings, ops = self._spec, self._settings, self._ops
        self._kv, self._options = kv, options
        self._forward = Forward(spec, weights, kv, ops)
        self._single = _make_single(spec, weights, kv, ops, settings)
        self.graphs: DecodeGraphs | None = None
        self.single_graphs: DecodeGraphs | None = None
        # Fixed spans need room for the longest sequence in every row of a graph: that mode does without.
        if settings.graphs and settings.on_gpu and not settings.invariant:
            self.make_graphs(Capturer().capture)

    def make_graphs(self, capture: Capture) -> None:
        """Replay decode steps from now on; `capture` is how a step is captured."""
        most = min(self._options.max_rows, GRAPH_ROWS)
        rest = (self._ops, self._kv, self._spec.context_length)
        self.graphs = DecodeGraphs(self._forward.hidden, *rest, ladder(most), capture)
        if self._single is not None:
            self.single_graphs = DecodeGraphs(self._single.logits, *rest, range(1, min(most, MOST_ROWS) + 1), capture)

    @property
    def spec(self) -> DecoderSpec:
        """What it executes."""
        return self._spec

    @property
    def kv(self) -> CudaKV:
        """Its KV cache."""
        return self._kv

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on the device."""
        return self._weight_bytes

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self._ops.dtype

    def step(self, batch: StepBatch) -> StepResult:
        """Run one forward pass, write the rows' KV, draw the wanted tokens.

        Raises:
            ValueError: the batch does not add up or names what is not there; nothing was computed then.
            RuntimeError: the runner is closed.
        """
        check_batch(batch, self._spec, self._options)
        return self._start(batch, None).result()

    def launch(self, batch: StepBatch, after: PendingStep | None = None) -> PendingStep:
        """Start a step and return at once (`LaunchRunner`); token id -1 - j is what logit row j of `after` draws.

        Raises:
            ValueError: the batch does not add up or names what is not there; nothing was computed then.
            RuntimeError: the runner is closed.
        """
        drawn = None if after is None else after.tokens
        check_batch(_resolved(batch, 0 if drawn is None else drawn.numel()), self._spec, self._options)
        return self._start(batch, drawn)

    def load_adapter(self, number: int, adapter: Adapter) -> None:
        """Make `adapter` known as `number` (`AdapterRunner`).

        Raises:
            ValueError: it does not fit the model, or the number is in use.
        """
        check_adapter(self._spec, adapter)
        self._adapters.load(number, adapter)

    def unload_adapter(self, number: int) -> None:
        """Forget an adapter.

        Raises:
            KeyError: there is none of that number.
        """
        self._adapters.unload(number)

    def close(self) -> None:
        """Free the device's memory. Idempotent."""
        if self._weights is None:
            return
        self._weights, self.graphs, self.single_graphs, self._single = None, None, None, None
        self._adapters.clear()
        self._kv.close()
        del self._forward
        if self._settings.on_gpu:
            torch.cuda.empty_cache()

    def _start(self, batch: StepBatch, last: torch.Tensor | None) -> PendingStep:
        if self._weights is None:
            raise RuntimeError("the runner is closed")
        sampling = plan_sampling(batch.sampling, self._spec.vocab_size)
        with torch.inference_mode(), on_device(self._settings):
            hidden, logits = self._compute(batch, last)
            kept = hidden.float() if batch.want_hidden and hidden is not None else None
            if not batch.sampling and not batch.want_logits:
                return self._pending(None, None, kept)
            if logits is None:
                assert hidden is not None
                logits = self._forward.logits(hidden)
            if batch.masks_ready is not None:
                batch.masks_ready()
            tokens = draw(self._ops, logits, sampling, batch.sampling)
            drawn = report(logits, tokens, sampling)
            return self._pending(drawn, logits if batch.want_logits else None, kept)

    def _compute(self, batch: StepBatch, last: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Run the layers: final-norm states of the logit rows, or their logits at once."""
        adapters = self._adapters.rows(batch, self._ops)
        plan = plan_step(batch, self._ops.short_rows, self._ops.long_rows, self._ops.prompt_rows)
        single = None
        if adapters is None and not batch.want_hidden and 0 < plan.tokens.size <= MOST_ROWS and plan.decodes:
            single = self._single
        if self.graphs is not None and adapters is None:
            graphs = self.graphs if single is None else self.single_graphs
            replayed = None if graphs is None else graphs.run(plan, last)
            if replayed is not None:
                return (replayed, None) if single is None else (None, replayed)
        step = upload(plan, self._settings.device)
        if last is not None:
            step = replace(step, tokens=self._ops.follow(step.tokens, last))
        if single is not None:
            return None, single.logits(step)
        return self._forward.hidden(step, adapters), None

    def _pending(self, drawn: Drawn | None, logits: torch.Tensor | None, hidden: torch.Tensor | None) -> PendingStep:
        """Send the results to the host without waiting for them."""
        tokens = None if drawn is None else drawn.tokens
        if drawn is not None:
            reported = (drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
            drawn = Drawn(self._fetch(drawn.tokens), *(None if t is None else self._fetch(t) for t in reported))
        logits = None if logits is None else self._fetch(logits)
        hidden = None if hidden is None else self._fetch(hidden)
        done = None
        if self._settings.on_gpu:
            done = torch.cuda.Event()
            done.record()
        return PendingStep(tokens, drawn, logits, hidden, done)

    def _fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._settings.on_gpu:
            return tensor.clone()
        out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return out.copy_(tensor, non_blocking=True)


def _resolved(batch: StepBatch, n_drawn: int) -> StepBatch:
    """The batch with token 0 in place of those that are still to be drawn, for checks."""
    low = int(batch.token_ids.min(initial=0))
    if low < -n_drawn:
        raise ValueError(f"token id {low} follows logit row {-1 - low} of a step that draws {n_drawn}")
    return batch if low == 0 else replace(batch, token_ids=np.maximum(batch.token_ids, 0))


def _make_ops(spec: DecoderSpec, dtype: torch.dtype, settings: CudaSettings) -> TorchOps:
    if not settings.triton:
        return TorchOps(dtype)
    from sagellm_backend.cuda.triton_ops import TritonOps

    plain = not any(spec.windows) and not spec.attention_softcap
    return TritonOps(
        dtype, spec.n_heads // spec.n_kv_heads, invariant=settings.invariant,
        gather_prompts=plain and settings.prompts == "sdpa",
    )  # fmt: skip


def _make_single(
    spec: DecoderSpec, weights: WeightSet, kv: CudaKV, ops: TorchOps, settings: CudaSettings
) -> SingleRows | None:
    """Where Triton runs and the order of sums is free."""
    if not settings.triton or settings.invariant:
        return None
    from sagellm_backend.cuda.single import SingleRows

    if not SingleRows.serves(spec, weights):
        return None
    return SingleRows(spec, weights, kv, ops, MOST_ROWS, early=settings.early)
