"""Knobs, grouped in small value objects."""

from __future__ import annotations

import msgspec

from sagellm_control_plane.types import PDSeparationConfig

__all__ = [
    "SLO",
    "AdmissionConfig",
    "BreakerConfig",
    "CoreConfig",
    "FairnessConfig",
    "HealthConfig",
    "HedgeConfig",
    "LatencyPrior",
    "RetryConfig",
]


class SLO(msgspec.Struct, frozen=True, kw_only=True):
    """What counts as good: time to the first token, and mean time of each later one, in seconds."""

    ttft_s: float = 2.0
    tpot_s: float = 0.06


class LatencyPrior(msgspec.Struct, frozen=True, kw_only=True):
    """What is believed of an engine before it has been measured.

    Attributes:
        prefill_tps: prompt tokens computed a second.
        step_s: a decode step with one sequence, seconds.
        step_per_sequence_s: what each further sequence adds.
        step_per_token_s: what each token of context in the batch adds.
    """

    prefill_tps: float = 2000.0
    step_s: float = 0.01
    step_per_sequence_s: float = 0.0005
    step_per_token_s: float = 0.0


class RetryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Retries and continuations.

    Attributes:
        max_attempts: engines that one request may be sent to, the first included.
        budget_ratio: retries before the first token, as a share of arrivals.
        budget_min: retries that are always allowed, refilled at a tenth of this a second.
        poison_limit: suspicion at which a request is failed and not sent on. An engine that died with this request alone, or as
            the only suspect of an earlier death, adds 1; a death among others before any progress 0.5; progress clears it.
        recovery_wait_s: how long a stream that has begun waits for an engine to come back when none is left.
        retry_wait_s: the same for a request without a first token.
    """

    max_attempts: int = 16
    budget_ratio: float = 0.2
    budget_min: float = 100.0
    poison_limit: float = 2.0
    recovery_wait_s: float = 60.0
    retry_wait_s: float = 1.0


class HedgeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A second attempt before the first token.

    Attributes:
        enabled: whether at all.
        budget_ratio: second attempts as a share of arrivals.
        min_delay_s: never earlier than this; otherwise the predicted 95th percentile of the time to the first token.
    """

    enabled: bool = False
    budget_ratio: float = 0.02
    min_delay_s: float = 0.05


class BreakerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """When an engine that fails is left alone, and for how long (doubling from `open_s` to `max_open_s`)."""

    failures: int = 3
    open_s: float = 0.5
    max_open_s: float = 30.0


class AdmissionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Who is let in.

    Attributes:
        max_waiting: requests held centrally for one model; beyond it the least urgent is refused.
        overcommit: requests sent to an engine beyond its slots, as a share of them (at least 2, unless the share is 0), so
            that it never idles.
        hold_above_s: predicted wait on every engine above which requests are held centrally instead of sent.
        slo: refuse what is predicted to miss it; None lets everything queue.
        reserve: share of the engines that bands less urgent than HIGH may not use while urgent requests come.
        slack: a request is refused when its predicted time to the first token is above ``slo.ttft_s * slack``.
        pressure: share of the objective that requests wait on average before their own prefill, from which on predicted misses
            are refused; below it they are let in late, since they harm nobody.
        cold_wait_s: how long a new request waits for an engine that is starting; 0 refuses it at once.
    """

    max_waiting: int = 1024
    overcommit: float = 0.25
    hold_above_s: float | None = None
    slo: SLO | None = None
    reserve: float = 0.1
    slack: float = 1.0
    pressure: float = 0.05
    cold_wait_s: float = 0.0


class FairnessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Virtual token counter (Sheng et al., OSDI 2024): what a prompt and an output token cost a tenant."""

    enabled: bool = True
    prompt_weight: float = 1.0
    output_weight: float = 2.0


class HealthConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Signs of a sick engine.

    Attributes:
        interval_s: between active probes.
        timeout_s: a probe that takes longer has failed.
        failures: failed probes in a row after which the engine is taken out.
        hung_s: seconds with work but without a step after which an engine is hung.
        stall_s: seconds without a token after which an attempt is moved to another engine.
        stale_s: age at which a load report is no longer believed.
    """

    interval_s: float = 1.0
    timeout_s: float = 2.0
    failures: int = 3
    hung_s: float = 60.0
    stall_s: float = 120.0
    stale_s: float = 5.0


class CoreConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the sans-IO core is given at the start; part of a decision log's header."""

    scheduling_policy: str = "adaptive"
    routing_strategy: str = "load_balanced"
    slo: SLO = SLO()
    prior: LatencyPrior = LatencyPrior()
    retry: RetryConfig = RetryConfig()
    hedge: HedgeConfig = HedgeConfig()
    breaker: BreakerConfig = BreakerConfig()
    admission: AdmissionConfig = AdmissionConfig()
    fairness: FairnessConfig = FairnessConfig()
    health: HealthConfig = HealthConfig()
    pd: PDSeparationConfig | None = None
    default_output_tokens: int = 128
    default_slots: int = 256
