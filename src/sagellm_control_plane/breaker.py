"""Circuit breaker with a half-open state."""

from __future__ import annotations

from sagellm_control_plane.config import BreakerConfig

__all__ = ["Breaker"]


class Breaker:
    """Leaves an engine alone after failures in a row, then lets one request try it.

    closed -> open after `config.failures` failures; open -> half-open when the pause is over; half-open -> closed on
    success, or open again with the pause doubled.

    Attributes:
        closed: nothing is wrong: `allows` and `on_dispatch` need not be called.
    """

    __slots__ = ("_config", "_failures", "_open_until", "_pause", "_trial", "closed")

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._failures = 0
        self.closed = True
        self._pause = config.open_s
        self._open_until = 0.0
        self._trial = False

    @property
    def failures(self) -> int:
        """Failures in a row."""
        return self._failures

    def state(self, now: float) -> str:
        """Return ``closed``, ``open`` or ``half_open``."""
        if self.closed:
            return "closed"
        return "open" if now < self._open_until else "half_open"

    def allows(self, now: float) -> bool:
        """Whether a request may be sent now."""
        if self.closed:
            return True
        return now >= self._open_until and not self._trial

    def on_dispatch(self, now: float) -> None:
        """A request was sent; in the half-open state it is the only one until it ends."""
        if not self.closed and now >= self._open_until:
            self._trial = True

    def on_success(self) -> None:
        """A request produced a token or ended well."""
        if self._failures:
            self._failures = 0
            self.closed = True
            self._pause = self._config.open_s
            self._trial = False

    def on_failure(self, now: float) -> None:
        """A request failed through the engine's fault."""
        was_trial = self._trial
        self._trial = False
        self._failures += 1
        self.closed = self._failures < self._config.failures
        if self._failures == self._config.failures or was_trial:
            self._open_until = now + self._pause
            self._pause = min(self._pause * 2, self._config.max_open_s)

    def on_neutral(self) -> None:
        """A request ended without saying anything about the engine (cancelled)."""
        self._trial = False

    def reset(self) -> None:
        """The engine was replaced."""
        self._failures = 0
        self.closed = True
        self._pause = self._config.open_s
        self._open_until = 0.0
        self._trial = False
