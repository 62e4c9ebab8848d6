"""Predicted latency: online regression on each engine's own history.

Recursive least squares with forgetting (Ljung, *System Identification*, 1999, section 11.2) over three features, written out in
plain floats: an update costs a few microseconds and needs no numpy.
"""

from __future__ import annotations

from math import sqrt

from sagellm_control_plane.config import LatencyPrior

__all__ = ["LatencyModel", "Regression"]


class Regression:
    """y = w . x over three features, with exponential forgetting.

    Args:
        weights: where to start.
        spread: how far, in each weight, the truth may lie from the start (standard deviation, in units of y noise).
        forget: weight of the past at each update.
    """

    __slots__ = ("_forget", "_p", "_spread", "count", "error2", "w")

    def __init__(
        self, weights: tuple[float, float, float], spread: tuple[float, float, float], forget: float = 0.998
    ) -> None:
        self.w = list(weights)
        self._spread = spread
        self._p = _diagonal(spread)
        self._forget = forget
        self.count = 0
        self.error2 = 0.0

    def predict(self, x0: float, x1: float, x2: float) -> float:
        """Return the estimate."""
        w = self.w
        return w[0] * x0 + w[1] * x1 + w[2] * x2

    def update(self, x0: float, x1: float, x2: float, y: float) -> None:
        """Learn that the features gave `y`."""
        p = self._p
        k0 = p[0][0] * x0 + p[0][1] * x1 + p[0][2] * x2
        k1 = p[1][0] * x0 + p[1][1] * x1 + p[1][2] * x2
        k2 = p[2][0] * x0 + p[2][1] * x1 + p[2][2] * x2
        denominator = self._forget + x0 * k0 + x1 * k1 + x2 * k2
        w = self.w
        error = y - (w[0] * x0 + w[1] * x1 + w[2] * x2)
        g = (k0 / denominator, k1 / denominator, k2 / denominator)
        for i in range(3):
            w[i] += g[i] * error
        k = (k0, k1, k2)
        scale = 1.0 / self._forget
        for i in range(3):
            row = p[i]
            gi = g[i]
            for j in range(3):
                row[j] = (row[j] - gi * k[j]) * scale
        for i in range(3):
            # Features that do not vary make the covariance grow without bound (wind-up): start it anew.
            if p[i][i] > self._spread[i] ** 2 * 10.0 or p[i][i] <= 0.0:
                self._p = _diagonal(self._spread)
                break
        self.count += 1
        rate = max(0.02, 1.0 / self.count)
        self.error2 += rate * (error * error - self.error2)

    @property
    def sigma(self) -> float:
        """Root mean square of the recent errors."""
        return sqrt(self.error2)


def _diagonal(spread: tuple[float, float, float]) -> list[list[float]]:
    return [[spread[i] ** 2 if i == j else 0.0 for j in range(3)] for i in range(3)]


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
        estimate = self._ttft.predict(1.0, tokens, float(decoding))
        floor = tokens / self.prefill_rate * 0.25
        return estimate if estimate > floor else floor

    def ttft_p95(self, tokens: float, decoding: int) -> float:
        """Ninety-fifth percentile of the same, from the errors seen so far."""
        return self.ttft(tokens, decoding) + 1.645 * self._ttft.sigma

    def tpot(self, sequences: int, context_tokens: int) -> float:
        """Seconds a token with that many sequences decoding and tokens in their contexts."""
        estimate = self._tpot.predict(1.0, float(sequences), float(context_tokens))
        floor = self._prior.step_s * 0.1
        return estimate if estimate > floor else floor

    def learn_ttft(self, tokens: float, decoding: int, seconds: float) -> None:
        """Learn from a first token; `tokens` and `decoding` as they were when it was predicted."""
        self._ttft.update(1.0, tokens, float(decoding), seconds)
        per_token = self._ttft.w[1]
        if per_token > 0.0:
            low, high = self._prior.prefill_tps * 0.02, self._prior.prefill_tps * 50.0
            self.prefill_rate = min(max(1.0 / per_token, low), high)

    def learn_tpot(self, sequences: float, context_tokens: float, seconds: float) -> None:
        """Learn from a finished request's mean time between tokens."""
        self._tpot.update(1.0, sequences, context_tokens, seconds)

    @property
    def observations(self) -> int:
        """First tokens learnt from."""
        return self._ttft.count

    @property
    def ttft_sigma(self) -> float:
        """Root mean square error of the predicted time to the first token, seconds."""
        return self._ttft.sigma
