"""What quantisation costs: perplexity, divergence and agreement against float32 on the file's dequantised weights.

The text is the Python language reference that CPython itself ships (``pydoc_data.topics``): prose with code, on every machine
without a download. All paths and the reference score the same tokens in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from sagellm_protocol.errors import InvalidArgumentError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from sagellm_backend.base import Backend, LoadOptions, Runner

    Float64 = npt.NDArray[np.float64]

__all__ = ["QualityPath", "QualityReport", "QualityRow", "measure_quality", "shipped_text"]

CHUNK = 64
WINDOW = 512


@dataclass(frozen=True, slots=True)
class QualityPath:
    """One way to run the model.

    Attributes:
        quant: as in `LoadOptions`; ``auto`` keeps the file's precision.
        kv_dtype: of the KV cache.
        backend: name.
    """

    quant: Literal["auto", "q4", "q8", "bf16", "f32"] = "auto"
    kv_dtype: Literal["auto", "f32", "bf16", "int8"] = "auto"
    backend: str = "cpu"

    @property
    def label(self) -> str:
        """For a table."""
        return f"{self.backend} {self.quant}" + ("" if self.kv_dtype == "auto" else f", KV {self.kv_dtype}")


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One path's result; nats where not said otherwise.

    Attributes:
        perplexity: e to the mean negative log-likelihood.
        ratio: perplexity over the reference's.
        kl: mean Kullback-Leibler divergence of the path from the reference.
        kl_worst: of the worst hundredth of the positions, their best.
        top1: share of positions with the reference's likeliest token.
        logprob_error: mean absolute difference of the true token's log-probability.
        seconds: spent in the path's steps.
    """

    label: str
    perplexity: float
    ratio: float
    kl: float
    kl_worst: float
    top1: float
    logprob_error: float
    seconds: float

    def line(self) -> str:
        """Return the row of a Markdown table."""
        return (
            f"| {self.label} | {self.perplexity:.4f} | {self.ratio - 1:+.2%} | {self.kl:.5f} | {self.kl_worst:.4f} "
            f"| {self.top1:.2%} | {self.logprob_error:.4f} |"
        )


@dataclass(frozen=True, slots=True)
class QualityReport:
    """All paths over one text."""

    model: str
    n_tokens: int
    reference_perplexity: float
    rows: tuple[QualityRow, ...]

    def table(self) -> str:
        """Return the report as a Markdown table."""
        lines = [
            f"{self.model}, {self.n_tokens} tokens, float32 reference: perplexity {self.reference_perplexity:.4f}",
            "",
            "| path | perplexity | against f32 | KL | KL p99 | top-1 | mean error of log-probability |",
            "|---|---|---|---|---|---|---|",
            *(row.line() for row in self.rows),
        ]
        return "\n".join(lines)


def shipped_text() -> str:
    """Return the Python language reference of this interpreter as one text.

    Raises:
        InvalidArgumentError: this Python was packaged without it.
    """
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise InvalidArgumentError(
            "this Python has no pydoc_data.topics: pass a text of your own", param="text"
        ) from error
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def measure_quality(
    model_path: str | Path,
    paths: Sequence[QualityPath],
    *,
    text: str | None = None,
    max_tokens: int = 20_000,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> QualityReport:
    """Score `max_tokens` tokens of a text in windows of `WINDOW` with every path and with the reference.

    Args:
        model_path: a model file or directory.
        paths: what to compare with the reference.
        text: what to score; None is `shipped_text`.
        max_tokens: tokens of it.
        threads: of the paths; 0 is the backend's choice.
        progress: called with the tokens that are done and their total.

    Raises:
        InvalidArgumentError: the text is too short to score, or a backend is unknown.
        UnsupportedError: a backend cannot do what a path asks for.
        ModelFileError: the model cannot be read.
    """
    from sagellm_backend.auto import pick
    from sagellm_backend.reference import ReferenceBackend
    from sagellm_core.loader import open_model
    from sagellm_core.text.load import load_tokenizer

    ids = load_tokenizer(model_path).encode(shipped_text() if text is None else text)[:max_tokens]
    if len(ids) < 2:
        raise InvalidArgumentError(f"the text has {len(ids)} tokens, at least 2 are needed", param="text")
    with ExitStack() as stack, open_model(model_path) as files:

        def load(backend: Backend, path: QualityPath, n_threads: int) -> Runner:
            runner = backend.load(files.spec, files.weights, _options(path, n_threads))
            stack.callback(runner.close)
            return runner

        runners = [load(ReferenceBackend(), QualityPath(), 0), *(load(pick(p.backend), p, threads) for p in paths)]
        return _score(Path(model_path).name, ids, runners, [path.label for path in paths], progress)


def _options(path: QualityPath, threads: int) -> LoadOptions:
    from sagellm_backend.base import LoadOptions

    return LoadOptions(
        n_blocks=WINDOW // 16,
        max_rows=CHUNK,
        max_logit_rows=CHUNK,
        threads=threads,
        quant=path.quant,
        kv_dtype=path.kv_dtype,
    )


class _Tally:
    """Sums of one path."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.error = 0.0
        self.agreed = 0
        self.divergences: list[Float64] = []
        self.seconds = 0.0

    def add(self, logprobs: Float64, reference: Float64, probabilities: Float64, truth: npt.NDArray[np.int64]) -> None:
        """Take in rows of this path; `probabilities` are e to the `reference`."""
        import numpy as np

        rows = np.arange(truth.size)
        mine, theirs = logprobs[rows, truth], reference[rows, truth]
        self.loss -= float(mine.sum())
        self.error += float(np.abs(mine - theirs).sum())
        self.agreed += int((logprobs.argmax(1) == reference.argmax(1)).sum())
        self.divergences.append((probabilities * (reference - logprobs)).sum(1))


def _score(
    model: str, ids: list[int], runners: list[Runner], labels: list[str], progress: Callable[[int, int], None] | None
) -> QualityReport:
    import numpy as np

    tallies = [_Tally() for _ in runners]
    total = 0
    for start in range(0, len(ids) - 1, WINDOW):
        window = ids[start : start + WINDOW + 1]  # the last one is only predicted
        for at in range(0, len(window) - 1, CHUNK):
            rows = window[at : min(at + CHUNK, len(window) - 1)]
            truth = np.array(window[at + 1 : at + 1 + len(rows)])
            logprobs = [_logprobs(runner, rows, at, tally) for runner, tally in zip(runners, tallies, strict=True)]
            probabilities = np.exp(logprobs[0])
            for mine, tally in zip(logprobs, tallies, strict=True):
                tally.add(mine, logprobs[0], probabilities, truth)
            total += len(rows)
            if progress is not None:
                progress(total, len(ids) - 1)
    reference = float(np.exp(tallies[0].loss / total))
    rows_ = tuple(_row(label, tally, total, reference) for label, tally in zip(labels, tallies[1:], strict=True))
    return QualityReport(model, total, reference, rows_)


def _logprobs(runner: Runner, rows: list[int], at: int, tally: _Tally) -> Float64:
    """Log-probabilities (rows, vocab) of the tokens after `rows`, which stand at position `at` of a window."""
    import numpy as np

    from sagellm_backend.base import RowSampling, StepBatch
    from sagellm_protocol.sampling import SamplingParams

    n = len(rows)
    batch = StepBatch(
        token_ids=np.array(rows, np.int32),
        starts=np.array([at], np.int32),
        lengths=np.array([n], np.int32),
        block_tables=np.arange(WINDOW // 16, dtype=np.int32)[None],
        logit_rows=np.arange(n, dtype=np.int32),
        sampling=[RowSampling(SamplingParams(temperature=0.0))] * n,
        want_logits=True,
    )
    started = perf_counter()
    logits = runner.step(batch).logits
    tally.seconds += perf_counter() - started
    assert logits is not None
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
    return z


def _row(label: str, tally: _Tally, total: int, reference: float) -> QualityRow:
    import numpy as np

    perplexity = float(np.exp(tally.loss / total))
    divergences = np.concatenate(tally.divergences)
    return QualityRow(
        label=label,
        perplexity=perplexity,
        ratio=perplexity / reference,
        kl=float(divergences.mean()),
        kl_worst=float(np.quantile(divergences, 0.99)),
        top1=tally.agreed / total,
        logprob_error=tally.error / total,
        seconds=tally.seconds,
    )
