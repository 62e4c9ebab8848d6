"""The machine's own limits, measured: what a fraction of the possible is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from sagellm_backend.host import host_threads

__all__ = ["Limits", "measure_limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Best of several repeats.

    Attributes:
        instruction_set: that the loops were compiled for.
        threads: that ran them together.
        read_bytes_per_s: streaming reads from main memory; bounds decode, which reads every weight once a step.
        int8_ops_per_s, bf16_ops_per_s: the dot instruction on registers, 2 operations a multiply-add; bound prefill.
    """

    instruction_set: str
    threads: int
    read_bytes_per_s: float
    int8_ops_per_s: float
    bf16_ops_per_s: float


def measure_limits(threads: int = 0, isa: str = "", nbytes: int = 256 << 20, repeats: int = 7) -> Limits:
    """Measure read bandwidth and dot-product peaks in about a second.

    Args:
        threads: 0 is as many as a runner would take.
        isa: empty is the one that a runner would take.
        nbytes: read by all threads together; must be far beyond the caches.
        repeats: the best counts.

    Raises:
        ValueError: `isa` is not available here.
    """
    from sagellm_backend.cpu import _native

    isa = isa or _native.supported_isas()[0]
    threads = threads or host_threads()
    return Limits(
        instruction_set=isa,
        threads=threads,
        read_bytes_per_s=_native.read_bandwidth(isa, threads, nbytes, repeats),
        int8_ops_per_s=_native.dot_peak(isa, "int8", threads, repeats),
        bf16_ops_per_s=_native.dot_peak(isa, "bf16", threads, repeats),
    )
