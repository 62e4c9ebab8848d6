"""What is measured: parts (a file and who reads it), rows, and the goal of each row."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        title, unit: for people.
        more: whether more is better.
        streams: of the server that it is taken from.
    """

    title: str
    unit: str
    more: bool
    streams: int = 1


ROWS = {
    "decode": Row("decode, one stream, 128 tokens", "tok/s", True),
    "prefill512": Row("prefill 512", "tok/s", True),
    "prefill2048": Row("prefill 2,048", "tok/s", True),
    "http1": Row("one stream over HTTP", "tok/s", True),
    "prefix": Row("second request with the same 512-token prefix, TTFT", "ms", False),
    "ready": Row("command to ready", "s", False),
    "first_token": Row("command to first token", "s", False),
    "streams16": Row("16 streams, prompt 32", "tok/s", True, 16),
    "ttft16": Row("mean TTFT at 16 streams", "ms", False, 16),
    "streams16_p256": Row("16 streams, prompt 256", "tok/s", True, 16),
    "rss16": Row("resident memory after serving 16 streams (sum over processes)", "MB", False, 16),
    "pss16": Row("the same, shared pages counted once (PSS)", "MB", False, 16),
    "streams32": Row("32 streams, prompt 32", "tok/s", True, 32),
}

SHARES = {
    "decode": ("decode_limit", "decode, share of what the measured read bandwidth allows"),
    "prefill512": ("prefill_limit", "prefill 512, share of the measured int8 dot peak"),
    "prefill2048": ("prefill_limit", "prefill 2,048, share of the measured int8 dot peak"),
}
"""Row -> (its physical limit, measured in the same rounds; title of the share)."""


@dataclass(frozen=True)
class Goal:
    """What a row should reach.

    Attributes:
        ahead: our number against the peer's, as a ratio, at least this.
        peer: against whom; empty is the best of those that ran.
        at_most: our own number, in the row's unit.
        share: of the row's physical limit, at least this.
    """

    ahead: float = 0.0
    peer: str = ""
    at_most: float = 0.0
    share: float = 0.0


Goals = dict[str, tuple[Goal, ...]]


@dataclass(frozen=True)
class Part:
    """One file in one precision.

    Attributes:
        title: for people.
        model: a name of the store.
        format: of the requantised copy that everybody reads; empty is the stored file itself.
        peers: who reads it, of those that are wanted.
        rows: measured unless others are asked for.
        goals: of the rows.
    """

    title: str
    model: str
    format: str
    peers: tuple[str, ...]
    rows: tuple[str, ...]
    goals: Goals = field(default_factory=dict)


_AHEAD = (Goal(ahead=1.0),)
_MEMORY = (Goal(at_most=350),)

PARTS = {
    "q4": Part(
        "SmolLM2-135M, 4-bit (Q4_0)", "smollm2:135m", "Q4_0", ("llama.cpp", "openvino"), tuple(ROWS),
        {
            "decode": (Goal(ahead=1.7), Goal(share=0.8)),
            "http1": (Goal(ahead=1.8, peer="llama.cpp"),),
            "streams16": (Goal(ahead=1.6, peer="openvino"), Goal(ahead=2.5, peer="llama.cpp")),
            "streams32": (Goal(ahead=1.5, peer="openvino"),),
            "streams16_p256": (Goal(ahead=1.4, peer="openvino"),),
            "ttft16": (Goal(at_most=146),),  # 0.4 of vLLM's 365
            "prefill512": (Goal(ahead=1.4),),
            "prefill2048": (Goal(ahead=1.3),),
            "prefix": (Goal(at_most=12),),
            "ready": (Goal(at_most=0.6),),
            "first_token": (Goal(at_most=1.0),),
            "rss16": _MEMORY,
            "pss16": _MEMORY,
        },
    ),
    "q8": Part(
        "SmolLM2-135M, 8-bit (Q8_0)", "smollm2:135m", "Q8_0", ("llama.cpp", "openvino"), ("decode",),
        {"decode": (Goal(ahead=1.6), Goal(share=0.8))},
    ),
    "bf16": Part(
        "SmolLM2-135M, bf16", "smollm2:135m", "BF16", ("llama.cpp", "vllm"), ("decode", "streams16", "ttft16"),
        {
            "decode": (Goal(ahead=1.25), Goal(share=0.8)),
            "streams16": (Goal(ahead=1.6, peer="vllm"),),
            "ttft16": (Goal(ahead=2.5, peer="vllm"),),
        },
    ),
    "gemma3": Part(
        "Gemma-3-270M (Q4_K_M)", "gemma3:270m", "", ("llama.cpp", "openvino"),
        ("decode", "prefill512", "prefill2048", "http1", "prefix", "ready", "streams16", "ttft16", "rss16", "pss16"),
        dict.fromkeys(ROWS, _AHEAD),
    ),
}  # fmt: skip
