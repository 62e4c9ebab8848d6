"""Fits the engine model's constants to a real engine, by asking it things and timing the answers."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import aclosing

from sagellm_control_plane.sim.engine_model import EngineConstants
from sagellm_protocol.engine import EngineDescription, EngineRequest
from sagellm_protocol.errors import SageError, UnavailableError
from sagellm_protocol.ports import EngineClient
from sagellm_protocol.sampling import SamplingParams

__all__ = ["fit_line", "profile_engine"]

_DECODE_TOKENS = 24
_SHORT, _LONG = 16, 1536
#: What the scheduler of our engines gives the oldest of several prompts.
_OLDEST_SHARE = 0.25


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return (intercept, slope) of the least-squares line through `points`."""
    mean_x = statistics.fmean(x for x, _y in points)
    mean_y = statistics.fmean(y for _x, y in points)
    spread = sum((x - mean_x) ** 2 for x, _y in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return mean_y - slope * mean_x, slope


class _Probe:
    """One engine, asked with prompts that share nothing, so that no prefix cache helps."""

    def __init__(self, client: EngineClient, known: EngineDescription, seed: int) -> None:
        self._client = client
        self._known = known
        self._rng = random.Random(seed)  # noqa: S311 - prompts
        self._serial = 0

    async def run(self, prompt_tokens: int, output_tokens: int) -> list[float]:
        """Return the seconds from submission to each token."""
        self._serial += 1
        ids = tuple(self._rng.randrange(1, min(self._known.vocab_size, 250)) for _ in range(prompt_tokens))
        sampling = SamplingParams(temperature=0.0, seed=1, max_tokens=output_tokens, ignore_eos=True)
        request = EngineRequest(request_id=f"profile-{self._serial}", prompt_token_ids=ids, sampling=sampling)
        began, times = time.perf_counter(), []
        async with aclosing(self._client.stream(request)) as deltas:
            async for delta in deltas:
                if delta.error is not None:
                    raise SageError.from_wire(delta.error)
                times += [time.perf_counter() - began] * len(delta.token_ids)
        if len(times) < output_tokens:
            raise UnavailableError(f"the engine gave {len(times)} tokens of {output_tokens}: it cannot be profiled")
        return times

    async def step(self, sequences: int, prompt_tokens: int) -> float:
        """Return the seconds of a decode step with so many sequences."""
        runs = await asyncio.gather(*(self.run(prompt_tokens, _DECODE_TOKENS) for _ in range(sequences)))
        # Only while all of them decode is a step one of so many sequences.
        start, end = max(run[0] for run in runs), min(run[-1] for run in runs)
        gaps = [b - a for run in runs for a, b in itertools.pairwise(run) if a >= start and b <= end]
        # The mean: a step that comes late takes its time from all that is to be done, and tokens of two steps may come as one.
        return statistics.fmean(gaps) if gaps else statistics.fmean(run[-1] - run[0] for run in runs) / _DECODE_TOKENS


async def profile_engine(client: EngineClient, *, seed: int = 1, repeats: int = 3) -> EngineConstants:
    """Measure an idle engine and return its constants; takes from seconds to a minute.

    Raises:
        SageError: the engine fails, or gives fewer tokens than asked for.
    """
    known = await client.describe()
    probe = _Probe(client, known, seed)
    await probe.run(_SHORT, 4)
    sizes = [n for n in (1, 2, 4, 8, 16) if n <= known.max_sequences]
    steps = [(float(n), await probe.step(n, _SHORT)) for n in sizes]
    fixed, per_sequence = fit_line(steps)
    room = min(max(known.context_length - _DECODE_TOKENS - 1, 4 * _SHORT), _LONG)
    # Prompts of one step each: longer ones would pay for their further steps, which is not the tokens' own.
    chunk = min(room, known.max_batch_tokens)
    lengths = [chunk * quarter // 4 for quarter in (1, 2, 3, 4)]
    firsts: list[tuple[float, float]] = []
    for length in lengths:
        times = [(await probe.run(length, 1))[0] for _ in range(repeats)]
        firsts.append((float(length), statistics.median(times)))
    _overhead, per_prompt_token = fit_line(firsts)
    long_step = await probe.step(1, room)
    per_token = max(long_step - steps[0][1], 0.0) / (room - _SHORT)
    return EngineConstants(
        prefill_tps=1.0 / max(per_prompt_token, 1e-9),
        step_s=max(fixed, 1e-6),
        per_sequence_s=max(per_sequence, 0.0),
        per_token_s=per_token,
        step_tokens=known.max_batch_tokens,
        oldest_share=_OLDEST_SHARE,
        max_sequences=known.max_sequences,
        block_size=known.block_size,
        n_blocks=known.n_blocks,
    )
