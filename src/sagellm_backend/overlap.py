"""Steps that are started before the one before them is known: what a runner on a device of its own may offer."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from sagellm_backend.base import StepBatch, StepResult

__all__ = ["LaunchRunner", "Pending"]


class Pending(Protocol):
    """A step that the device works on."""

    def result(self) -> StepResult:
        """Wait for it; releases the GIL meanwhile. To be called once."""
        ...


@runtime_checkable
class LaunchRunner(Protocol):
    """What a `Runner` that can work ahead offers besides its other methods.

    Everything that is asked of it (steps, copies, exports and imports of blocks) happens in the order in which it was asked.
    """

    def launch(self, batch: StepBatch, after: Any = None) -> Pending:
        """Start a step and return at once.

        Args:
            batch: a token id of -1 - j stands for what logit row j of `after` draws, whenever it does; a row that could draw
                nothing may be continued by any token.
            after: a step that was launched before, or None.

        Raises:
            ValueError: the batch does not add up or names what is not there; nothing was started then.
        """
        ...
