"""Predicted latency: online regression on each engine's own history.

Recursive least squares with forgetting (Ljung, *System Identification*, 1999, section 11.2), written out in plain floats: an update costs
two microseconds and needs no numpy.
"""

from __future__ import annotations

from math import sqrt

from sagellm_control_plane.config import LatencyPrior

__all__ = ["LatencyModel", "Regression"]


class Regression:
    """y = w0 + w1 x1 + w2 x2, with exponential forgetting.

    Written out in scalars: the covariance is symmetric, six numbers instead of nine, and nothing is looked up through a list.

    Args:
        weights: where to start.
        spread: how far, in each weight, the truth may lie from the start (standard deviation, in units of y noise).
        forget: weight of the past at each update.
    """

    __slots__ = (
        "_forget", "_p00", "_p01", "_p02", "_p11", "_p12", "_p22", "_spread", "count", "error2", "w0", "w1", "w2",
    )  # fmt: skip

    def __init__(
        self, weights: tuple[float, float, float], spread: tuple[float, float, float], forget: float = 0.998
    ) -> None:
        self.w0, self.w1, self.w2 = weights
        self._spread = spread
        self._forget = forget
        self.count = 0
        self.error2 = 0.0
        self._start_covariance()

    def _start_covariance(self) -> None:
        self._p00, self._p11, self._p22 = (one * one for one in self._spread)
        self._p01 = self._p02 = self._p12 = 0.0

    def update(self, x1: float, x2: float, y: float) -> None:
        """Learn that the features gave `y`."""
        p00, p01, p02, p11, p12, p22 = self._p00, self._p01, self._p02, self._p11, self._p12, self._p22
        k0 = p00 + p01 * x1 + p02 * x2
        k1 = p01 + p11 * x1 + p12 * x2
        k2 = p02 + p12 * x1 + p22 * x2
        denominator = self._forget + k0 + x1 * k1 + x2 * k2
        error = y - (self.w0 + self.w1 * x1 + self.w2 * x2)
        g0, g1, g2 = k0 / denominator, k1 / denominator, k2 / denominator
        self.w0 += g0 * error
        self.w1 += g1 * error
        self.w2 += g2 * error
        scale = 1.0 / self._forget
        self._p00 = p00 = (p00 - g0 * k0) * scale
        self._p11 = p11 = (p11 - g1 * k1) * scale
        self._p22 = p22 = (p22 - g2 * k2) * scale
        self._p01 = (p01 - g0 * k1) * scale
        self._p02 = (p02 - g0 * k2) * scale
        self._p12 = (p12 - g1 * k2) * scale
        s0, s1, s2 = self._spread
        # Features that do not vary make the covariance grow without bound (wind-up): start it anew.
        if not (0.0 < p00 <= 10.0 * s0 * s0 and 0.0 < p11 <= 10.0 * s1 * s1 and 0.0 < p22 <= 10.0 * s2 * s2):
            self._start_covariance()
        self.count += 1
        rate = max(0.02, 1.0 / self.count)
        self.error2 += rate * (error * error - self.error2)

    @property
    def sigma(self) -> float:
        """Root mean square of the recent errors."""
        return sqrt(self.error2)


class LatencyModel:
    """Time to the first token, and time of each later one, of one engine.

    TTFT = a + b * (tokens to prefill before and in this request) + c * (sequences decoding meanwhile)
    TPOT = d + e * (sequences) + f * (tokens of context)
    """

    __slots__ = ("_prior", "_tpot", "_ttft", "prefill_rate")

    def __init__(self, prior: LatencyPrior) -> None:
        self._prior = prior
        per_token = 1.0 / prior.prefill_tps
        # The noise of one observation is taken as the time of one step; spreads are relative to it.
        unit = max(prior.step_s, 1e-4)
        self._ttft = Regression((prior.step_s, per_token, 0.0), (2.0, per_token / unit, 0.05))
        self._tpot = Regression(
            (prior.step_s, prior.step_per_sequence_s, prior.step_per_token_s),
            (1.0, 0.05, max(prior.step_per_token_s, 1e-9) / unit),
        )
        self.prefill_rate = prior.prefill_tps

    def ttft(self, tokens: float, decoding: int) -> float:
        """Seconds until the first token when `tokens` must be computed first."""
        line = self._ttft
        estimate = line.w0 + line.w1 * tokens + line.w2 * decoding
        floor = tokens / self.prefill_rate * 0.25
        return estimate if estimate > floor else floor

    def ttft_p95(self, tokens: float, decoding: int) -> float:
        """Ninety-fifth percentile of the same, from the errors seen so far."""
        return self.ttft(tokens, decoding) + 1.645 * self._ttft.sigma

    def tpot(self, sequences: int, context_tokens: int) -> float:
        """Seconds a token with that many sequences decoding and tokens in their contexts."""
        line = self._tpot
        estimate = line.w0 + line.w1 * sequences + line.w2 * context_tokens
        floor = self._prior.step_s * 0.1
        return estimate if estimate > floor else floor

    def learn_ttft(self, tokens: float, decoding: int, seconds: float) -> None:
        """Learn from a first token; `tokens` and `decoding` as they were when it was predicted."""
        self._ttft.update(tokens, decoding, seconds)
        per_token = self._ttft.w1
        if per_token > 0.0:
            low, high = self._prior.prefill_tps * 0.02, self._prior.prefill_tps * 50.0
            self.prefill_rate = min(max(1.0 / per_token, low), high)

    def learn_tpot(self, sequences: float, context_tokens: float, seconds: float) -> None:
        """Learn from a finished request's mean time between tokens."""
        self._tpot.update(sequences, context_tokens, seconds)

    @property
    def observations(self) -> int:
        """First tokens learnt from."""
        return self._ttft.count

    @property
    def ttft_sigma(self) -> float:
        """Root mean square error of the predicted time to the first token, seconds."""
        return self._ttft.sigma
