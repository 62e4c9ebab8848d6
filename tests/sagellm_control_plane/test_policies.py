"""Routing strategies, scheduling policies, admission and fairness: pure functions over a view."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_control_plane.admission import Admission
from sagellm_control_plane.breaker import Breaker
from sagellm_control_plane.config import SLO, AdmissionConfig, BreakerConfig, CoreConfig, FairnessConfig, LatencyPrior
from sagellm_control_plane.events import Dispatch, EngineJoined, EngineStateChanged, Fail, FirstToken, RequestArrived
from sagellm_control_plane.fairness import TokenCounters, WaitingQueue
from sagellm_control_plane.ledger import Ledger, LedgerError
from sagellm_control_plane.policies import POLICIES, policy_named
from sagellm_control_plane.policies.slo_aware import narrow as best_fit
from sagellm_control_plane.predictor import LatencyModel
from sagellm_control_plane.prefix_index import PrefixIndex
from sagellm_control_plane.routing import ROUTES, route_named
from sagellm_control_plane.state import ControlState
from sagellm_control_plane.view import ClusterView, EngineProfile, EngineView, RequestView
from sagellm_protocol.errors import ErrorCode, InvalidArgumentError

PRIOR = LatencyPrior(prefill_tps=1000.0, step_s=0.01, step_per_sequence_s=0.001)


def cluster(n: int = 3, **profile) -> ClusterView:
    view = ClusterView(SLO())
    for i in range(n):
        fields = {"engine_id": f"e{i}", "model": "m", "slots": 8, "block_size": 16, "n_blocks": 64} | {
            key: value[i] for key, value in profile.items()
        }
        engine = EngineView(EngineProfile(**fields), PRIOR, Breaker(BreakerConfig()), 10)
        view.add(engine)
        view.prefix.set_capacity(engine.engine_id, 64)
        view.set_state(engine.engine_id, "READY")
    return view


def blocks(*names: int) -> tuple[bytes, ...]:
    return tuple(name.to_bytes(4, "big") for name in names)


def ask(tokens: int = 100, **more) -> RequestView:
    return RequestView(request_id=more.pop("request_id", "r"), model="m", prompt_tokens=tokens, block_tokens=16, **more)


def chosen(name: str, view: ClusterView, request: RequestView, seed: int = 0) -> str:
    engines = list(view.engines.values())
    return route_named(name)(view, request, engines, 0.0, random.Random(seed)).engine.engine_id


def load(view: ClusterView, engine_id: str, count: int, tokens: int = 500) -> None:
    ledger = Ledger()
    for _ in range(count):
        ledger.take(view.engines[engine_id], tokens, tokens, 0.0)


@pytest.mark.parametrize("name", sorted(ROUTES))
def test_every_strategy_picks_a_candidate_and_repeats_itself(name):
    """A strategy returns one of its candidates, and the same one for the same view, request, time and seed."""
    names = [chosen(name, cluster(4), ask(blocks=blocks(1, 2), tenant="t"), seed=3) for _ in range(2)]
    assert names[0] == names[1]
    assert names[0] in {"e0", "e1", "e2", "e3"}


def test_round_robin_takes_turns():
    """Six requests on three engines go twice to each."""
    view = cluster(3)
    assert Counter(chosen("round_robin", view, ask()) for _ in range(6)) == {"e0": 2, "e1": 2, "e2": 2}


@pytest.mark.parametrize(
    "name", ["least_loaded", "lmetric", "predicted_latency", "load_balanced", "kv_aware", "locality"]
)
def test_strategies_that_look_at_load_avoid_the_busy(name):
    """With nothing cached the idle engine is chosen."""
    view = cluster(3)
    load(view, "e0", 4)
    load(view, "e2", 4)
    assert chosen(name, view, ask()) == "e1"


@pytest.mark.parametrize(
    "name", ["lmetric", "predicted_latency", "load_balanced", "kv_aware", "locality", "threshold_radix"]
)
def test_strategies_that_look_at_prefixes_follow_them(name):
    """Among equally idle engines the holder of the prefix is chosen, and its hit is reported."""
    view = cluster(3)
    view.prefix.record("e2", blocks(1, 2, 3, 4, 5))
    request = ask(100, blocks=blocks(1, 2, 3, 4, 5, 6))
    engines = list(view.engines.values())
    decision = route_named(name)(view, request, engines, 0.0, random.Random(0))
    assert (decision.engine.engine_id, decision.hit_tokens) == ("e2", 80)


@pytest.mark.parametrize("name", ["affinity", "locality", "predicted_latency", "load_balanced", "topology_aware"])
def test_affinity_never_wins_against_a_long_wait(name):
    """An owner with a queue far beyond the objective is passed over."""
    view = cluster(3, zone=["a/x", "a/y", "b/z"])
    request = ask(100, blocks=blocks(1, 2, 3), session="s", zone="a/x")
    for owner in view.engines:
        view.prefix.record(owner, blocks(1, 2, 3))
    home = chosen(name, view, request)
    load(view, home, 8, tokens=5000)
    assert chosen(name, view, request) != home


def test_affinity_keeps_sessions_when_an_engine_leaves():
    """Rendezvous hashing moves only the sessions of the engine that left."""
    view = cluster(4)
    before = {s: chosen("affinity", view, ask(session=f"s{s}")) for s in range(200)}
    view.remove("e3")
    after = {s: chosen("affinity", view, ask(session=f"s{s}")) for s in range(200)}
    assert all(after[s] == home for s, home in before.items() if home != "e3")
    assert min(Counter(before.values()).values()) > 20


def test_topology_prefers_the_same_host():
    """The engine that shares most of the zone is chosen among equally loaded ones."""
    view = cluster(3, zone=["eu/h1/s0", "eu/h2/s0", "us/h3/s0"])
    assert chosen("topology_aware", view, ask(zone="eu/h2/s1")) == "e1"


def test_consistent_hash_bounds_the_load():
    """A popular prefix spills over to the next engine instead of piling up."""
    view = cluster(4)
    ledger = Ledger()
    for _ in range(20):
        engine = view.engines[chosen("consistent_hash", view, ask(blocks=blocks(7)))]
        ledger.take(engine, 10, 10, 0.0)
    assert max(e.running for e in view.engines.values()) <= 1.25 * 20 / 4 + 2


def test_unknown_names_are_refused_with_the_known_ones():
    """Neither a policy nor a strategy is silently replaced."""
    with pytest.raises(InvalidArgumentError, match="power_of_two"):
        route_named("fastest")
    with pytest.raises(InvalidArgumentError, match="aegaeon"):
        policy_named("fastest")


def test_slo_aware_takes_the_tightest_fit():
    """Best fit keeps the idle engine free when a busier one still meets the objective."""
    view = cluster(3)
    load(view, "e1", 1, tokens=1000)
    load(view, "e2", 1, tokens=5000)
    (engine,) = best_fit(view, ask(100), list(view.engines.values()), 0.0)
    assert engine.engine_id == "e1"


def test_cost_optimized_takes_the_cheapest_that_meets_the_objective():
    """The cheap engine is used until it would miss, then the dear one."""
    view = cluster(2, cost=[1.0, 5.0])
    narrow = POLICIES["cost_optimized"].narrow
    assert [e.engine_id for e in narrow(view, ask(), list(view.engines.values()), 0.0)] == ["e0"]
    load(view, "e0", 8, tokens=5000)
    assert [e.engine_id for e in narrow(view, ask(), list(view.engines.values()), 0.0)] == ["e1"]


def test_hybrid_leaves_slots_to_chat():
    """Embeddings do not take the last quarter of an engine, chat may."""
    view = cluster(1)
    load(view, "e0", 8)
    narrow = POLICIES["hybrid"].narrow
    engines = list(view.engines.values())
    assert list(narrow(view, ask(kind="embedding"), engines, 0.0)) == []
    assert list(narrow(view, ask(), engines, 0.0)) == engines


def started(policy: str = "priority", engines=(("e0", "m", ""),), slots: int = 1, **config) -> ControlState:
    admission = config.pop("admission", AdmissionConfig(overcommit=0.0))
    state = ControlState(
        CoreConfig(scheduling_policy=policy, prior=PRIOR, admission=admission, **config), random.Random(0)
    )
    for name, model, device in engines:
        profile = EngineProfile(engine_id=name, model=model, slots=slots, n_blocks=64, device=device)
        state.on_event(EngineJoined(profile), 0.0)
        state.on_event(EngineStateChanged(name, "READY"), 0.0)
    return state


def arrive(state: ControlState, request_id: str, now: float, **more):
    view = RequestView(request_id=request_id, model=more.pop("model", "m"), prompt_tokens=10, arrived_at=now, **more)
    return state.on_event(RequestArrived(view), now)


def drain(state: ControlState, now: float) -> list[str]:
    """Finish what runs, one by one; return the order in which requests were sent."""
    from sagellm_control_plane.events import AttemptFinished

    order = []
    while state.active:
        running = [r for r in state.records.all() if r.attempts]
        if not running:
            break
        name = running[0].request.request_id
        number = next(iter(running[0].attempts))
        state.on_event(FirstToken(name, number), now)
        now += 0.1
        for command in state.on_event(AttemptFinished(name, number, 5), now):
            if isinstance(command, Dispatch):
                order.append(command.request_id)
    return order


def test_urgent_requests_overtake_and_deadlines_come_first():
    """Bands go first; within a band the adaptive policy takes the earliest deadline."""
    state = started("adaptive")
    arrive(state, "running", 0.0)
    arrive(state, "background", 0.1, priority=4)
    arrive(state, "normal", 0.2)
    arrive(state, "soon", 0.3, deadline_s=50.0)
    arrive(state, "critical", 0.4, priority=0)
    assert drain(state, 1.0) == ["critical", "soon", "normal", "background"]


def test_fifo_knows_no_urgency():
    """First come, first served, whatever the band and the tenant."""
    state = started("fifo")
    for i, priority in enumerate([2, 4, 0, 1]):
        arrive(state, f"r{i}", i / 10, priority=priority, tenant=f"t{i % 2}")
    assert drain(state, 1.0) == ["r1", "r2", "r3"]


def test_a_flood_of_one_tenant_does_not_starve_another():
    """With virtual token counters two tenants are served in turn, whatever each of them sends."""
    state = started("priority")
    arrive(state, "first", 0.0, tenant="loud")
    for i in range(20):
        arrive(state, f"loud{i}", 0.01 * i, tenant="loud")
    for i in range(5):
        arrive(state, f"quiet{i}", 0.5 + 0.01 * i, tenant="quiet")
    order = drain(state, 1.0)
    assert sum(name.startswith("quiet") for name in order[:10]) == 5


def test_a_full_queue_refuses_the_least_urgent():
    """Beyond the bound a newcomer is refused with 429, unless somebody less urgent waits: that one is shed for it."""
    state = started("priority", admission=AdmissionConfig(overcommit=0.0, max_waiting=2))
    arrive(state, "running", 0.0)
    arrive(state, "low", 0.1, priority=3)
    arrive(state, "normal", 0.2)
    (refused,) = arrive(state, "late", 0.3)
    assert isinstance(refused, Fail)
    assert (refused.request_id, refused.error.code) == ("low", ErrorCode.RESOURCE_EXHAUSTED)
    (refused,) = arrive(state, "later", 0.4)
    assert refused.request_id == "later"
    assert refused.error.retry_after_s is not None
    assert drain(state, 1.0) == ["normal", "late"]


def test_predicted_misses_are_refused_only_under_pressure():
    """A request that will be late is let in while it harms nobody, and refused with Retry-After once others wait."""
    config = AdmissionConfig(slo=SLO(ttft_s=1.0))
    admission, view = Admission(config), cluster(1)
    engine = view.engines["e0"]
    decision = route_named("least_loaded")(view, ask(1500), [engine], 0.0, random.Random(0))
    assert admission.judge(ask(1500), decision, 0.0) is None
    load(view, "e0", 3, tokens=1000)
    for i in range(20):
        late = admission.judge(ask(1500), decision, i * 0.01)
    assert late is not None
    assert late > 1.0


def test_engines_are_kept_free_for_urgent_requests():
    """While urgent requests come, others may not use the least loaded engine."""
    admission, view = Admission(AdmissionConfig(slo=SLO(), reserve=0.2)), cluster(3)
    load(view, "e1", 2)
    engines = list(view.engines.values())
    assert len(admission.narrow(engines, ask(), 0.0)) == 3
    assert len(admission.narrow(engines, ask(priority=0), 1.0)) == 3
    left = admission.narrow(engines, ask(), 2.0)
    assert len(left) == 2
    assert len(admission.narrow(engines, ask(), 100.0)) == 3


def test_models_on_one_device_take_turns():
    """Aegaeon: requests of the other model wait until the group is done, then have their turn."""
    state = started("aegaeon", engines=(("a", "m", "gpu0"), ("b", "n", "gpu0")), slots=4)
    sent = [c.request_id for c in arrive(state, "m1", 0.0) + arrive(state, "m2", 0.1)]
    assert sent == ["m1", "m2"]
    assert arrive(state, "n1", 0.2, model="n") == []
    assert drain(state, 1.0) == ["n1"]


def test_a_model_does_not_keep_the_device_beyond_its_group():
    """While another model waits, a turn takes in eight requests and no more."""
    state = started("aegaeon", engines=(("a", "m", "gpu0"), ("b", "n", "gpu0")), slots=32)
    arrive(state, "m0", 0.0)
    arrive(state, "n0", 0.01, model="n")
    sent = [c.request_id for i in range(1, 20) for c in arrive(state, f"m{i}", 0.02 + i / 1000)]
    assert len(sent) == 7
    order = drain(state, 0.1)
    assert order.index("n0") < order.index("m8")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4), st.booleans()), max_size=40))
def test_the_queue_gives_back_what_it_took(rows):
    """Whatever is pushed and removed in between, every request left comes out exactly once, urgent bands first."""
    queue = WaitingQueue(POLICIES["priority"], TokenCounters(FairnessConfig()), fair=True)
    kept = {}
    for i, (tenant, priority, remove) in enumerate(rows):
        request = RequestView(
            request_id=str(i), model="m", prompt_tokens=1, tenant=tenant, priority=priority, arrived_at=float(i)
        )
        queue.push(request)
        kept[str(i)] = priority
        if remove:
            queue.remove(str(i))
            del kept[str(i)]
    assert len(queue) == len(kept)
    out = []
    while (head := queue.peek()) is not None:
        queue.remove(head.request_id)
        out.append(head.request_id)
    assert sorted(out) == sorted(kept)
    assert [kept[name] for name in out] == sorted(kept.values())


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.lists(st.integers(0, 30), max_size=8)), max_size=30))
def test_the_prefix_index_agrees_with_itself_and_stays_bounded(routed):
    """Both directions of the index name the same blocks, and no engine is believed to hold more than it can."""
    index = PrefixIndex()
    for name in "abc":
        index.set_capacity(name, 10)
    for name, ids in routed:
        index.record(name, [i.to_bytes(4, "big") for i in dict.fromkeys(ids)])
        assert index.size(name) <= 10
    held = {(name, key) for name in "abc" for key in index._blocks[name]}
    links = set()
    for key, of_key in index._holders.items():
        links |= {(name, key) for name in ([of_key] if isinstance(of_key, str) else of_key)}
    assert held == links
    for name in "abc":
        index.drop_engine(name)
    assert index.keys == 0


def test_block_events_are_exact_and_a_gap_asks_for_a_snapshot():
    """Events in order are applied, old ones ignored, a gap is reported, and a snapshot repairs it."""
    index = PrefixIndex()
    index.set_capacity("a", 100)
    one, two, three = blocks(1, 2, 3)
    assert index.apply("a", 1, [one, two], [])
    assert index.apply("a", 1, [three], [])
    assert index.depth("a", [one, two, three]) == 2
    assert not index.apply("a", 3, [three], [])
    index.snapshot("a", 5, [one])
    assert index.depth("a", [one, two]) == 1
    assert index.apply("a", 6, [], [one])
    assert index.holders([one], 8) == []
    assert index.apply("a", 7, [two], [], cleared=True)
    assert index.size("a") == 1


@given(st.floats(1e-5, 1e-3), st.floats(0.0, 0.05), st.floats(0.0, 0.01))
def test_predicted_latency_learns_the_engine(per_token, fixed, per_sequence):
    """After a hundred observations the prediction is within 5 % of a linear engine, wherever it started."""
    model, rng = LatencyModel(LatencyPrior()), random.Random(1)
    for _ in range(150):
        tokens, decoding = rng.randrange(10, 5000), rng.randrange(0, 20)
        model.learn_ttft(tokens, decoding, fixed + per_token * tokens + per_sequence * decoding)
    truth = fixed + per_token * 3000 + per_sequence * 5
    assert model.ttft(3000, 5) == pytest.approx(truth, rel=0.05)


def test_a_lease_is_given_back_exactly_once():
    """Giving a lease back twice is an error, and the counters are those of the open leases."""
    view, ledger = cluster(1), Ledger()
    engine = view.engines["e0"]
    lease = ledger.take(engine, 100, 120, 0.0)
    ledger.first_token(lease, 1.0)
    assert (engine.running, engine.decoding, engine.prefill_tokens, engine.context_tokens) == (1, 1, 0, 120)
    ledger.give_back(lease)
    assert (engine.running, engine.decoding, engine.context_tokens) == (0, 0, 0)
    with pytest.raises(LedgerError):
        ledger.give_back(lease)


def test_the_breaker_opens_tries_once_and_closes():
    """After failures in a row nothing is sent; then one request tries; its success closes, its failure doubles the pause."""
    breaker = Breaker(BreakerConfig(failures=2, open_s=1.0))
    breaker.on_failure(0.0)
    assert breaker.state(0.0) == "closed"
    breaker.on_failure(0.1)
    assert (breaker.allows(0.5), breaker.allows(1.2)) == (False, True)
    breaker.on_dispatch(1.2)
    assert not breaker.allows(1.3)
    breaker.on_failure(1.4)
    assert (breaker.allows(3.3), breaker.allows(3.5)) == (False, True)
    breaker.on_dispatch(3.5)
    breaker.on_success()
    assert breaker.state(3.6) == "closed"
