"""Constants fitted from an engine are those of the engine."""

from __future__ import annotations

import asyncio

import pytest

from sagellm_backend.mock import Latency
from sagellm_control_plane.sim.profile import fit_line, profile_engine
from sagellm_control_plane.testing import ScriptedEngine
from sagellm_core.local import LocalEngine
from sagellm_core.testing import mock_engine
from sagellm_protocol.engine import TokenDelta


class LinearEngine(ScriptedEngine):
    """Prefill at 1,000 tokens/s, then a token each 20 ms however many there are."""

    async def stream(self, request):
        await asyncio.sleep(len(request.prompt_token_ids) / 1000.0)
        limit = request.sampling.max_tokens
        for position in range(limit):
            finish = "length" if position == limit - 1 else None
            yield TokenDelta(request_id=request.request_id, token_ids=(97,), finish_reason=finish)
            await asyncio.sleep(0.02)


def test_a_line_is_found():
    """Least squares returns intercept and slope."""
    assert fit_line([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx((1.0, 2.0))


@pytest.mark.slow
async def test_constants_come_out_as_the_engine_is():
    """Prefill rate and step time are found within what a busy machine allows."""
    constants = await profile_engine(LinearEngine("a"), repeats=2)
    assert constants.prefill_tps == pytest.approx(1000.0, rel=0.3)
    assert constants.step_s == pytest.approx(0.02, rel=0.5)
    assert constants.per_sequence_s < 0.01
    assert (constants.max_sequences, constants.block_size) == (64, 16)


@pytest.mark.slow
async def test_the_rate_of_prefill_is_without_the_fixed_part_of_its_steps():
    """A prompt of many chunks pays for each step once: 40 us a token come out beside 20 ms a step of 256 tokens."""
    engine = LocalEngine(mock_engine(n_ctx=4096, latency=Latency(base=0.02, prefill_row=40e-6)))
    try:
        constants = await profile_engine(engine)
    finally:
        await engine.close()
    assert constants.step_tokens == 256
    assert constants.step_s == pytest.approx(0.02, rel=0.3)
    # With the steps counted in, 118 us a token would be found.
    assert 1.0 / constants.prefill_tps == pytest.approx(40e-6, rel=0.5)
