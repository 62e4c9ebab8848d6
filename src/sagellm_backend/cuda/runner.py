"""A model on a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sagellm_backend.adapter import Adapter, check_adapter
from sagellm_backend.base import LoadOptions, StepBatch, StepResult
from sagellm_backend.checks import check_batch
from sagellm_backend.cuda.adapters import AdapterStack
from sagellm_backend.cuda.forward import Forward
from sagellm_backend.cuda.graphs import DecodeGraphs
from sagellm_backend.cuda.kv import CudaKV
from sagellm_backend.cuda.memory import allocate_kv, check_step_fits
from sagellm_backend.cuda.ops import TorchOps
from sagellm_backend.cuda.plan import follow, plan_step, upload
from sagellm_backend.cuda.sampling import Drawn, draw, report
from sagellm_backend.cuda.sampling_plan import plan_sampling
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.cuda.weights import DTYPES, WeightSet
from sagellm_backend.spec import DecoderSpec

__all__ = ["CudaRunner", "PendingStep"]


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
        return StepResult(
            drawn.tokens.numpy(),
            drawn.logprobs.numpy(),
            drawn.top_ids.numpy(),
            drawn.top_logprobs.numpy(),
            logits,
            hidden,
        )


class CudaRunner:
    """A decoder by torch and Triton; see `sagellm_backend.cuda.backend.CudaBackend`.

    Args:
        spec: the model.
        weights: its weights, on the device.
        options: sizes.
        settings: how to run.
        kv_dtype: precision of the cache, ``bf16`` or ``f32``.

    Attributes:
        graphs: the decode steps that were captured; None where graphs are off.
        peak_step_bytes: what the largest step took beside weights and cache, measured at load; 0 where it was not.
    """

    def __init__(
        self, spec: DecoderSpec, weights: WeightSet, options: LoadOptions, settings: CudaSettings, kv_dtype: str
    ) -> None:
        self._spec, self._options, self._settings = spec, options, settings
        self._kv: CudaKV = allocate_kv(spec, options.n_blocks, DTYPES[kv_dtype], settings, weights.nbytes)
        self._weight_bytes = weights.nbytes
        self._ops = _make_ops(spec, weights.dtype, settings)
        self._weights: WeightSet | None = weights
        self._forward = Forward(spec, weights, self._kv, self._ops)
        self._adapters = AdapterStack(settings.device, weights.dtype)
        self.peak_step_bytes = 0
        self.graphs: DecodeGraphs | None = None
        # Fixed spans need room for the longest sequence in every row of a graph: that mode does without.
        if settings.graphs and settings.on_gpu and not settings.invariant:
            self.graphs = DecodeGraphs(self._forward, self._kv, spec.context_length, options.max_rows)
        if settings.on_gpu:
            check_step_fits(self, options)

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
        self._weights, self.graphs = None, None
        self._adapters.clear()
        self._kv.close()
        del self._forward
        if self._settings.on_gpu:
            torch.cuda.empty_cache()

    def _start(self, batch: StepBatch, last: torch.Tensor | None) -> PendingStep:
        if self._weights is None:
            raise RuntimeError("the runner is closed")
        sampling = plan_sampling(batch.sampling, self._spec.vocab_size)
        with torch.inference_mode(), self._device():
            hidden = self._hidden(batch, last)
            kept = hidden.float() if batch.want_hidden else None
            if not batch.sampling and not batch.want_logits:
                return self._pending(None, None, kept)
            logits = self._forward.logits(hidden)
            if batch.masks_ready is not None:
                batch.masks_ready()
            tokens = draw(self._ops, logits, sampling, batch.sampling)
            drawn = report(logits, tokens, sampling)
            return self._pending(drawn, logits if batch.want_logits else None, kept)

    def _device(self) -> AbstractContextManager[object]:
        """The GPU is a property of the thread, and the thread that steps need not be the one that loaded."""
        if not self._settings.on_gpu:
            return nullcontext()
        chosen: AbstractContextManager[object] = torch.cuda.device(self._settings.device)
        return chosen

    def _hidden(self, batch: StepBatch, last: torch.Tensor | None) -> torch.Tensor:
        """Final-norm states of the logit rows, by a CUDA graph where one fits."""
        adapters = self._adapters.rows(batch, self._ops)
        plan = plan_step(batch, self._ops.short_rows, self._ops.long_rows)
        if self.graphs is not None and adapters is None:
            replayed = self.graphs.run(plan, last)
            if replayed is not None:
                return replayed
        step = upload(plan, self._settings.device)
        if last is not None:
            step = replace(step, tokens=follow(step.tokens, last))
        return self._forward.hidden(step, adapters)

    def _pending(self, drawn: Drawn | None, logits: torch.Tensor | None, hidden: torch.Tensor | None) -> PendingStep:
        """Send the results to the host without waiting for them."""
        tokens = None if drawn is None else drawn.tokens
        if drawn is not None:
            drawn = Drawn(*(self._fetch(t) for t in (drawn.tokens, drawn.logprobs, drawn.top_ids, drawn.top_logprobs)))
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

    return TritonOps(dtype, spec.n_heads // spec.n_kv_heads, invariant=settings.invariant)
