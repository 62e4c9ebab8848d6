"""What one engine does with its sequences, over the simulated device."""

import numpy as np
import pytest

from sagellm_backend.mock import Latency, MockRunner, Next
from sagellm_core.speculation import NgramSpeculator
from sagellm_core.testing import collect, mock_engine, run_alone
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import (
    ContextLengthError,
    DeadlineExceededError,
    EngineDiedError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
    UnsupportedError,
)
from sagellm_protocol.sampling import GrammarSpec, SamplingParams

PROMPT = b"The river is wide and the forest is quiet. "


def request(name="r", prompt=PROMPT, *, eos=(257, 259), emitted=(), **sampling):
    how = {"temperature": 0.0, "seed": 3, "max_tokens": 24, **sampling}
    fields = {
        key: how.pop(key) for key in ("priority", "deadline_s", "cache_salt", "adapter", "bad_token_ids") if key in how
    }
    return EngineRequest(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        emitted_token_ids=tuple(emitted),
        eos_token_ids=eos,
        sampling=SamplingParams(**how),
        **fields,
    )


def run(engine, *requests):
    out = collect(engine, requests)
    engine.check_integrity()
    assert engine.status().blocks_used == 0
    return out


def one(req, **how):
    return run(mock_engine(**how), req)[req.request_id]


def test_first_delta_has_the_prompt_length_and_only_the_last_a_finish_reason():
    """The deltas of a sequence are framed as the port says."""
    out = one(request(ignore_eos=True))
    assert out.deltas[0].prompt_tokens == len(PROMPT)
    assert [d.finish_reason for d in out.deltas[:-1]] == [None] * (len(out.deltas) - 1)
    assert out.finish_reason == "length"
    assert len(out.token_ids) == 24


def test_an_end_token_stops_and_is_not_part_of_the_output():
    """The eos id is reported as stop_token_id only."""
    out = one(request(max_tokens=2000))
    assert out.finish_reason == "stop"
    assert out.deltas[-1].stop_token_id == 257
    assert 257 not in out.token_ids


def test_a_stop_id_ends_the_output_before_itself():
    """Stop ids work like eos and also with ignore_eos."""
    out = one(request(stop_token_ids=(ord("e"),), ignore_eos=True, max_tokens=200))
    assert out.deltas[-1].stop_token_id == ord("e")
    assert out.text == run_alone(request(ignore_eos=True, max_tokens=200)).text.split("e")[0]


def test_ignore_eos_goes_on_to_the_length_limit():
    """With ignore_eos the eos id is an ordinary token."""
    out = one(request(ignore_eos=True, max_tokens=400))
    assert len(out.token_ids) == 400
    assert 257 in out.token_ids


def test_min_tokens_bans_every_end_until_then():
    """No eos or stop id is drawn before min_tokens."""
    free = one(request(max_tokens=1000))
    least = len(free.token_ids) + 30
    out = one(request(max_tokens=1000, min_tokens=least))
    assert len(out.token_ids) >= least
    assert out.token_ids[: len(free.token_ids)] == free.token_ids


def test_the_seed_and_nothing_else_decides_sampled_tokens():
    """Same seed, same tokens, in any company; another seed, other tokens."""
    hot = {"temperature": 2.0, "ignore_eos": True, "max_tokens": 60}
    alone = one(request("a", seed=11, **hot)).token_ids
    crowd = run(
        mock_engine(max_rows=20), *(request(f"r{i}", PROMPT[i:], seed=11 if i == 0 else i, **hot) for i in range(9))
    )
    assert crowd["r0"].token_ids == alone
    assert one(request("a", seed=12, **hot)).token_ids != alone


def test_a_continuation_on_another_engine_draws_what_the_first_would_have_drawn():
    """Emitted tokens are not emitted again and the stream of draws goes on after them."""
    whole = one(request(temperature=1.5, max_tokens=40, ignore_eos=True)).token_ids
    rest = one(request(temperature=1.5, max_tokens=40, ignore_eos=True, emitted=whole[:17]))
    assert rest.token_ids == whole[17:]
    assert rest.deltas[0].prompt_tokens == len(PROMPT)


def test_a_continuation_that_has_nothing_left_ends_by_length():
    """All max_tokens were emitted elsewhere: the sequence ends at once and takes no block."""
    out = one(request(max_tokens=5, emitted=b"seven"))
    assert (out.finish_reason, out.token_ids, out.deltas[0].prompt_tokens) == ("length", [], len(PROMPT))


def test_logprobs_name_the_token_and_its_alternatives():
    """Each emitted token has its log-probability and as many alternatives as were asked for."""
    out = one(request(logprobs=3))
    entries = [entry for delta in out.deltas for entry in delta.logprobs or ()]
    assert [entry.token_id for entry in entries] == out.token_ids
    for entry in entries:
        assert len(entry.top) == 3
        assert entry.top[0].token_id == entry.token_id
        assert entry.logprob == entry.top[0].logprob <= 0


@pytest.mark.parametrize("rows", [8, 33, 256])
def test_prompt_logprobs_equal_those_of_generating_the_same_text(rows):
    """Re-scoring prompt + output as a prompt gives the log-probabilities of generating it, whatever the chunks."""
    made = one(request(logprobs=0, temperature=1.0, ignore_eos=True))
    text = bytes(PROMPT) + bytes(made.token_ids)
    out = one(request(prompt=text, prompt_logprobs=2, max_tokens=1), max_rows=rows, max_logit_rows=20, max_running=4)
    scores = out.deltas[0].prompt_logprobs
    assert len(scores) == len(text)
    assert scores[0] is None
    assert [entry.token_id for entry in scores[1:]] == list(text[1:])
    np.testing.assert_allclose([s.logprob for s in scores[len(PROMPT) :]], made.logprobs, atol=1e-6)


def test_twenty_alternatives_of_every_token_of_prompt_and_output():
    """The most that may be asked for comes whole, most likely first, for each token but the first."""
    out = one(request(logprobs=20, prompt_logprobs=20, temperature=1.0))
    scores = out.deltas[0].prompt_logprobs
    entries = [*scores[1:], *(entry for delta in out.deltas for entry in delta.logprobs)]
    assert len(entries) == len(PROMPT) - 1 + len(out.token_ids)
    for entry in entries:
        values = [other.logprob for other in entry.top]
        assert len({other.token_id for other in entry.top}) == 20
        assert values == sorted(values, reverse=True)


def test_prompt_logprobs_are_complete_after_a_prefix_hit():
    """Rows whose scores are wanted are computed although their blocks are cached."""
    engine = mock_engine()
    first = run(engine, request("a", PROMPT * 3, prompt_logprobs=0))["a"]
    again = run(engine, request("b", PROMPT * 3, prompt_logprobs=0))["b"]
    assert again.deltas[0].prompt_logprobs == first.deltas[0].prompt_logprobs
    assert again.deltas[0].cached_tokens == 0


@pytest.mark.parametrize("length", [15, 16, 17, 32, 43])
def test_a_repeated_prompt_is_taken_from_the_cache_up_to_its_last_token(length):
    """Full blocks are found again; one row at least is computed for the next token."""
    engine = mock_engine()
    cold = run(engine, request("a", PROMPT[:length]))["a"]
    warm = run(engine, request("b", PROMPT[:length]))["b"]
    assert warm.token_ids == cold.token_ids
    assert cold.deltas[0].cached_tokens == 0
    assert warm.deltas[0].cached_tokens == min(length // 16 * 16, length - 1)


def test_copies_of_one_prompt_compute_it_once_and_part_when_they_write():
    """With n > 1 the first choice computes the prompt, the others share its blocks, the partial one by copy on write."""
    engine = mock_engine(max_rows=64)
    out = run(engine, *(request(f"r/{k}", PROMPT * 4, seed=k, temperature=2.0, ignore_eos=True) for k in range(4)))
    status = engine.status()
    n_prompt = len(PROMPT) * 4
    assert status.prefix_hits == 3 * (n_prompt - 1)
    assert status.copied_blocks >= 3
    for k in range(4):
        alone = run_alone(request(f"r/{k}", PROMPT * 4, seed=k, temperature=2.0, ignore_eos=True))
        assert out[f"r/{k}"].token_ids == alone.token_ids
    assert len({tuple(o.token_ids) for o in out.values()}) > 1


def test_tenants_do_not_share_blocks():
    """Another cache salt finds nothing."""
    engine = mock_engine()
    run(engine, request("a", PROMPT * 2, cache_salt="x"))
    assert run(engine, request("b", PROMPT * 2, cache_salt="y"))["b"].deltas[0].cached_tokens == 0
    assert run(engine, request("c", PROMPT * 2, cache_salt="x"))["c"].deltas[0].cached_tokens > 0


def test_preempted_sequences_go_on_with_the_same_tokens():
    """Too few blocks for all: some are pushed back, computed again, and end as if alone."""
    engine = mock_engine(n_blocks=14, n_ctx=160, max_running=4, max_rows=40)
    requests = [request(f"r{i}", PROMPT[i:], temperature=1.0, seed=i, max_tokens=80, ignore_eos=True) for i in range(4)]
    out = run(engine, *requests)
    assert engine.status().preemptions > 0
    for req in requests:
        assert out[req.request_id].token_ids == run_alone(req).token_ids


def test_bad_words_never_complete():
    """The last token of a banned sequence is not drawn where the output ends with the rest of it."""
    text = one(request(ignore_eos=True, max_tokens=60)).text
    word = text.split()[2].encode()
    out = one(request(ignore_eos=True, max_tokens=60, bad_words=(word.decode(),), bad_token_ids=(tuple(word),)))
    assert word.decode() not in out.text
    assert out.text.startswith(text[: text.index(word.decode())])


def test_an_abort_frees_queued_prefilling_and_decoding_sequences_within_the_step():
    """Whatever a sequence is doing, aborting it gives its blocks back at once and says cancelled."""
    engine = mock_engine(max_rows=32, max_running=2)
    for name, prompt in (("decoding", b"ab"), ("prefilling", PROMPT * 5), ("queued", PROMPT)):
        engine.add(request(name, prompt))
    engine.step()
    assert engine.status().running == 2
    for name in ("decoding", "prefilling", "queued"):
        assert engine.abort(name)
        assert not engine.abort(name)
    assert engine.status().blocks_used == 0
    engine.check_integrity()
    assert [(d.request_id, d.finish_reason) for d in engine.step()] == [
        ("decoding", "cancelled"),
        ("prefilling", "cancelled"),
        ("queued", "cancelled"),
    ]
    assert not engine.has_work


def test_a_deadline_ends_a_waiting_and_a_running_sequence():
    """The deadline counts from submission; what was emitted before stays emitted."""
    now = [0.0]
    engine = mock_engine(clock=lambda: now[0], max_running=1)
    engine.add(request("running", deadline_s=10.0, max_tokens=1000, ignore_eos=True))
    engine.add(request("waiting", deadline_s=5.0))
    seen = {}
    for _ in range(12):
        now[0] += 1.0
        for delta in engine.step():
            seen.setdefault(delta.request_id, []).append((now[0], delta))
    at, last = seen["waiting"][-1]
    assert at == 5.0
    assert DeadlineExceededError.code == last.error.code
    assert seen["running"][-1][0] == 10.0
    assert len(seen["running"]) == 10
    engine.check_integrity()


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"prompt": ()}, InvalidArgumentError, "prompt"),
        ({"prompt": (5, 260)}, InvalidArgumentError, "prompt"),
        ({"prompt": (-1,)}, InvalidArgumentError, "prompt"),
        ({"seed": None}, InvalidArgumentError, "seed"),
        ({"max_tokens": None}, InvalidArgumentError, "max_tokens"),
        ({"max_tokens": 2048}, ContextLengthError, "max_tokens"),
        ({"prompt": PROMPT * 50}, ContextLengthError, "prompt"),
        ({"stop_token_ids": (1000,)}, InvalidArgumentError, "stop_token_ids"),
        ({"logit_bias": {777: 1.0}}, InvalidArgumentError, "logit_bias"),
        ({"allowed_token_ids": (999,)}, InvalidArgumentError, "allowed_token_ids"),
        ({"bad_words": ("x",)}, UnsupportedError, "bad_words"),
        ({"adapter": "tuned"}, InvalidArgumentError, "adapter"),
        ({"grammar": GrammarSpec(kind="json_object")}, InvalidArgumentError, "grammar"),
    ],
)
def test_a_wrong_request_is_refused_by_name_and_leaves_nothing(change, error, param):
    """What cannot be done is refused before it is queued, with the field at fault."""
    engine = mock_engine()
    with pytest.raises(error) as caught:
        engine.add(request(**change))
    assert caught.value.param == param
    assert not engine.has_work


def test_a_sequence_that_would_not_fit_the_cache_is_refused_with_both_numbers():
    """Longer than all KV blocks together: ContextLengthError names the sum and the room."""
    engine = mock_engine(n_blocks=4, n_ctx=2048)
    with pytest.raises(ContextLengthError, match=r"67 tokens, the KV cache holds 64"):
        engine.add(request())


def test_a_full_queue_refuses_and_says_when_to_come_back():
    """The limit max_waiting bounds the queue."""
    engine = mock_engine(max_waiting=2)
    engine.add(request("a"))
    engine.add(request("b"))
    with pytest.raises(ResourceExhaustedError) as caught:
        engine.add(request("c"))
    assert caught.value.retry_after_s is not None


def test_a_duplicate_id_is_refused():
    """Two sequences of one id at the same time cannot be told apart."""
    engine = mock_engine()
    engine.add(request("a"))
    with pytest.raises(InvalidArgumentError, match="already"):
        engine.add(request("a"))


def test_a_draining_engine_finishes_and_takes_no_more():
    """Draining keeps what is running and refuses what is new."""
    engine = mock_engine()
    engine.add(request("a"))
    engine.drain()
    with pytest.raises(UnavailableError, match="draining"):
        engine.add(request("b"))
    assert run(engine)["a"].finish_reason == "length"
    assert engine.status().draining


def test_a_sequence_for_which_nothing_may_be_drawn_fails_alone():
    """Bias and masks that exclude all tokens fail that sequence; its neighbour is not touched."""
    out = run(
        mock_engine(),
        request("bad", allowed_token_ids=(65,), bad_token_ids=((65,),)),
        request("good"),
    )
    assert isinstance(out["bad"].error, InvalidArgumentError)
    assert out["good"].token_ids == run_alone(request("good")).token_ids


class Breaking:
    """A runner that raises at chosen steps."""

    def __init__(self, monkeypatch, failing):
        self.steps = 0
        original = MockRunner.step

        def step(runner, batch):
            self.steps += 1
            if failing(self.steps, batch):
                raise RuntimeError("secret path /home/x")
            return original(runner, batch)

        monkeypatch.setattr(MockRunner, "step", step)


def test_a_failed_step_fails_its_sequences_and_the_engine_goes_on(monkeypatch):
    """An exception of the device ends the sequences of that step with an error that holds no secret."""
    Breaking(monkeypatch, lambda n, _: n == 3)
    engine = mock_engine()
    out = run(engine, request("a", ignore_eos=True), request("b", b"other", ignore_eos=True))
    for collected in out.values():
        assert isinstance(collected.error, InternalError)
        assert "secret" not in collected.error.message
    assert engine.died is None
    assert run(engine, request("c"))["c"].token_ids == run_alone(request("c")).token_ids


def test_an_engine_whose_steps_keep_failing_dies_and_says_so(monkeypatch):
    """After max_failures failed steps in a row everybody gets engine_died and nothing new is taken."""
    Breaking(monkeypatch, lambda *_: True)
    engine = mock_engine(max_running=1)
    out = collect(engine, [request(f"r{i}") for i in range(5)])
    assert [type(o.error) for o in out.values()] == [InternalError] * 2 + [EngineDiedError] * 3
    with pytest.raises(EngineDiedError):
        engine.add(request("late"))
    engine.check_integrity()


def test_speculation_changes_the_number_of_steps_and_nothing_else():
    """With n-gram guessing the tokens and log-probabilities are the same, greedy and sampled."""
    loop = b"one two three. " * 3

    def repeat(tokens, _):
        return Next((int(tokens[-15]) if tokens.size % 50 else ord("!"),))

    for temperature in (0.0, 1.0):
        how = {"temperature": temperature, "logprobs": 1, "ignore_eos": True, "max_tokens": 120}
        plain_engine = mock_engine(next_token=repeat)
        guess_engine = mock_engine(next_token=repeat, speculator=NgramSpeculator(6, 3, 1))
        plain = run(plain_engine, request("a", loop, **how))["a"]
        guessed = run(guess_engine, request("a", loop, **how))["a"]
        assert guessed.token_ids == plain.token_ids
        assert guessed.logprobs == plain.logprobs
        status = guess_engine.status()
        assert 60 < status.accepted_tokens < status.draft_tokens
        assert status.steps + status.accepted_tokens == plain_engine.status().steps


def test_metrics_are_measured():
    """Counters and histograms follow what happened, on the engine's own clock."""
    now = [0.0]

    def clock():
        now[0] += 0.25
        return now[0]

    engine = mock_engine(clock=clock)
    run(engine, request("a", max_tokens=6), request("b", PROMPT[3:], max_tokens=6))
    status = engine.status()
    assert (status.prompt_tokens, status.generation_tokens) == (2 * len(PROMPT) - 3, 12)
    assert (status.finished, status.running, status.waiting) == (2, 0, 0)
    assert sum(status.histograms["ttft_s"].counts) == 2
    assert sum(status.histograms["itl_s"].counts) == 10
    assert sum(status.histograms["tpot_s"].counts) == 2
    assert sum(status.histograms["step_s"].counts) == status.steps
    assert status.histograms["batch_rows"].sum == 2 * len(PROMPT) - 3 + 10
    assert status.step_seconds == pytest.approx(0.25 * status.steps)
    assert status.rss_bytes > 0


def test_block_events_tell_what_the_cache_holds():
    """Replaying the events gives the names of all findable blocks; numbers grow by one."""
    engine = mock_engine(n_blocks=8, n_ctx=128)
    for i in range(6):
        run(engine, request(f"r{i}", bytes([65 + i]) * 40, max_tokens=20, ignore_eos=True))
    events = engine.block_events(0)
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    held = set()
    for event in events:
        (held.add if event.kind == "stored" else held.remove)(event.block_hash)
    assert len(held) == engine.status().blocks_cached
    assert engine.block_events(events[-3].seq) == events[-2:]
    assert engine.status().evictions > 0


def test_want_description():
    """The description has the sizes that the engine was given."""
    described = mock_engine(n_blocks=99, n_ctx=512, engine_id="e").describe()
    assert (described.engine_id, described.n_blocks, described.context_length, described.vocab_size) == (
        "e",
        99,
        512,
        260,
    )


def test_simulated_time_passes_on_the_device():
    """The latency model's seconds are spent in the step."""
    engine = mock_engine(latency=Latency(base=0.004, prefill_row=0.0001, sequence=0.001))
    run(engine, request("a", max_tokens=3))
    assert engine.status().step_seconds >= 3 * 0.005 + len(PROMPT) * 0.0001


class LateMasks:
    """A grammar that allows one byte only, whose masks are written when somebody waits for them, and not before."""

    def __init__(self):
        self.log = []
        self.finished = False

    def compile(self, spec):
        return self

    def ready(self):
        return True

    def allowed(self, draft):
        return len(draft)

    def accept(self, token_id):
        self.log.append("accept")

    def masks(self, asked):
        self.log.append("begin")
        self.rows = np.zeros((len(asked), 9), np.uint32)
        return self

    def wait(self):
        self.log.append("wait")
        self.rows[:, ord("x") // 32] = 1 << ord("x") % 32

    def close(self):
        pass


def test_masks_are_read_after_the_layers_and_a_grammar_moves_after_that(monkeypatch):
    """A step begins masks, runs, waits for them, draws; a step that fails first still waits before its grammars move on."""
    grammars = LateMasks()
    original = MockRunner._fill_logits
    monkeypatch.setattr(MockRunner, "_fill_logits", lambda *args: grammars.log.append("layers") or original(*args))
    engine = mock_engine(grammars=grammars)
    how = {"grammar": GrammarSpec(kind="regex", source="x*"), "ignore_eos": True, "max_tokens": 3}
    assert run(engine, request(**how))["r"].text == "xxx"
    assert grammars.log[:4] == ["begin", "layers", "wait", "wait"]
    assert grammars.log[4] == "accept"
    grammars.log.clear()
    Breaking(monkeypatch, lambda n, _: n == 2)
    assert isinstance(run(engine, request(**how))["r"].error, InternalError)
    assert grammars.log == ["begin", "layers", "wait", "wait", "accept", "begin", "wait"]
