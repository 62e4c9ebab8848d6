"""Which pair of engines a request gets, and when it goes unsplit."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_control_plane import pairing
from sagellm_control_plane.breaker import Breaker
from sagellm_control_plane.config import SLO, BreakerConfig, LatencyPrior
from sagellm_control_plane.ledger import Ledger
from sagellm_control_plane.routing import route_named
from sagellm_control_plane.types import PDSeparationConfig
from sagellm_control_plane.view import ClusterView, EngineProfile, EngineView, RequestView

PD = PDSeparationConfig(min_prompt_tokens=512, kv_bytes_per_token=100_000, transfer_bytes_per_s=10e9)
PRIOR = LatencyPrior(prefill_tps=4000.0, step_s=0.01, step_per_sequence_s=0.001)


class Cluster:
    """Engines by id, with a role and a load each."""

    def __init__(self, roles: dict[str, str]) -> None:
        self.view, self.ledger = ClusterView(SLO()), Ledger()
        for engine_id, role in roles.items():
            profile = EngineProfile(engine_id=engine_id, model="m", role=role)
            self.view.add(EngineView(profile, PRIOR, Breaker(BreakerConfig()), 64))
            self.view.set_state(engine_id, "READY")

    def load(self, engine_id: str, *, decoding: int = 0, prefill_tokens: int = 0) -> None:
        engine = self.view.engines[engine_id]
        for _ in range(decoding):
            self.ledger.first_token(self.ledger.take(engine, 1, 500, 0.0), 0.0)
        if prefill_tokens:
            self.ledger.take(engine, prefill_tokens, prefill_tokens, 0.0)

    def choose(self, prompt: int = 2000, *, only: str = "", pd: PDSeparationConfig = PD, **fields: object):
        request = RequestView(request_id="r", model="m", prompt_tokens=prompt, **fields)
        engines = [e for e in self.view.engines.values() if not only or e.engine_id in only]
        rng = random.Random(1)

        def route(candidates):
            return route_named("predicted_latency")(self.view, request, candidates, 0.0, rng)

        return pairing.choose(self.view, request, engines, 0.0, pd, 100.0, route)


def names(decision) -> tuple[str, str]:
    return (decision.prefill.engine_id if decision.prefill else "", decision.engine.engine_id)


def test_long_prompt_is_split_when_the_decoder_is_busy():
    """A long prompt goes to the engine for prefill, because on the other one it would hold up those that decode there."""
    cluster = Cluster({"p": "prefill", "d": "decode"})
    cluster.load("d", decoding=20)
    decision = cluster.choose()
    assert names(decision) == ("p", "d")
    assert "split" in decision.reason


def test_idle_decoder_does_it_alone():
    """With nobody to hold up, moving the blocks is all that a split would add: the request goes unsplit."""
    assert names(Cluster({"p": "prefill", "d": "decode"}).choose()) == ("", "d")


def test_short_prompt_goes_unsplit():
    """Below the least number of tokens to compute nothing is split."""
    cluster = Cluster({"p": "prefill", "d": "decode"})
    cluster.load("d", decoding=20)
    assert names(cluster.choose(511)) == ("", "d")


def test_cached_prompt_goes_unsplit():
    """A prompt that the decoding engine already holds is not computed elsewhere."""
    cluster = Cluster({"p": "prefill", "d": "decode"})
    cluster.load("d", decoding=20)
    blocks = tuple(bytes([i]) * 8 for i in range(20))
    cluster.view.prefix.set_capacity("d", 100)
    cluster.view.prefix.record("d", blocks)
    assert names(cluster.choose(2000, blocks=blocks, block_tokens=100)) == ("", "d")


def test_slow_transfer_goes_unsplit():
    """When moving the blocks takes longer than it spares, the request goes unsplit."""
    cluster = Cluster({"p": "prefill", "d": "decode"})
    cluster.load("d", decoding=20)
    slow = PDSeparationConfig(min_prompt_tokens=512, kv_bytes_per_token=100_000, transfer_bytes_per_s=1e6)
    assert names(cluster.choose(pd=slow)) == ("", "d")


def test_busy_prefill_engine_is_left_alone():
    """When the engine for prefill has a long queue, the request goes unsplit."""
    cluster = Cluster({"p": "prefill", "d": "decode"})
    cluster.load("d", decoding=4)
    cluster.load("p", prefill_tokens=100_000)
    assert names(cluster.choose()) == ("", "d")


def test_both_halves_are_chosen_by_their_own_load():
    """The prompt goes where the shortest prefill queue is, the tokens where the fewest decode."""
    cluster = Cluster({"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode"})
    cluster.load("p1", prefill_tokens=8000)
    cluster.load("d1", decoding=30)
    cluster.load("d2", decoding=20)
    assert names(cluster.choose()) == ("p2", "d2")


def test_engines_for_prefill_do_not_decode():
    """An engine for prefill gets no whole request while one for decode has room, and does when none has."""
    cluster = Cluster({"p": "prefill", "d": "decode"})
    cluster.load("d", decoding=50)
    assert names(cluster.choose(100)) == ("", "d")
    assert names(cluster.choose(100, only="p")) == ("", "p")


def test_engines_that_only_happen_to_take_prefill_take_whole_requests_too():
    """Where nobody has a role, a request that goes unsplit may go to any engine: none idles because it is the first by name."""
    cluster = Cluster({"e0": "any", "e1": "any"})
    cluster.load("e1", decoding=5, prefill_tokens=3000)
    assert names(cluster.choose(100)) == ("", "e0")


def test_a_queue_for_prefill_goes_unsplit():
    """A pair whose first token would miss the objective is not taken when another engine has it sooner."""
    cluster = Cluster({"p": "prefill", "d": "decode"})
    cluster.load("d", decoding=60)
    cluster.load("p", prefill_tokens=7000)
    assert names(cluster.choose()) == ("", "d")


def test_stream_that_cannot_be_told_by_tokens_is_not_split():
    """A stream that is continued by text goes whole."""
    cluster = Cluster({"p": "prefill", "d": "decode"})
    cluster.load("d", decoding=20)
    assert names(cluster.choose(journal="text")) == ("", "d")


@pytest.mark.parametrize(
    ("engines", "share", "first"), [(1, 0.5, 1), (2, 0.5, 1), (4, 0.5, 2), (4, 0.01, 1), (4, 1.0, 3)]
)
def test_roles_when_nobody_has_one(engines, share, first):
    """Without roles a share of the engines takes prefill: at least one, never all; one engine alone does both."""
    cluster = Cluster({f"e{i}": "any" for i in range(engines)})
    prefill, decode = pairing.roles(list(cluster.view.engines.values()), PDSeparationConfig(prefill_engines=share))
    assert len(prefill) == first
    assert prefill | decode == set(cluster.view.engines)
    assert bool(prefill & decode) == (engines == 1)


def test_given_roles_count():
    """Roles that were given are kept, and an engine of any role has both."""
    cluster = Cluster({"a": "any", "p": "prefill", "d": "decode"})
    assert pairing.roles(list(cluster.view.engines.values()), PD) == ({"a", "p"}, {"a", "d"})


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["any", "prefill", "decode"]), min_size=1),
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 30), st.integers(0, 20_000)), max_size=6),
    st.integers(1, 20_000),
)
def test_a_pair_is_two_engines_in_their_roles(roles, loads, prompt):
    """Whatever the load, somebody is chosen; a split has two different engines, each allowed to do its half."""
    cluster = Cluster(roles)
    for engine_id, decoding, tokens in loads:
        if engine_id in roles:
            cluster.load(engine_id, decoding=decoding, prefill_tokens=tokens)
    decision = cluster.choose(prompt)
    prefill, decode = pairing.roles(list(cluster.view.engines.values()), PD)
    if decision.prefill is not None:
        assert decision.prefill is not decision.engine
        assert decision.prefill.engine_id in prefill
        assert decision.engine.engine_id in decode
    elif set(roles.values()) != {"prefill"}:
        assert roles[decision.engine.engine_id] != "prefill"
