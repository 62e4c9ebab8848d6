from __future__ import annotations

import asyncio

import numpy as np
import pytest

from sagellm_backend.base import LoadOptions, Runner, StepBatch, StepResult
from sagellm_backend.conformance import SequenceRun, run_batch
from sagellm_backend.conformance_specs import SPECS, random_ids, random_weights
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.sampling import log_softmax
from sagellm_core.engine import Engine, EngineSettings
from sagellm_core.local import LocalEngine
from sagellm_protocol.embedding import EmbedRequest, EmbedResult
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import (
    ContextLengthError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SageError,
    UnavailableError,
    UnsupportedError,
)
from sagellm_protocol.ports import EmbeddingClient
from sagellm_protocol.sampling import SamplingParams

SPEC = SPECS["llama"]


def load(n_blocks: int = 16) -> Runner:
    return ReferenceBackend().load(SPEC, random_weights(SPEC), LoadOptions(n_blocks=n_blocks, max_rows=64))


def engine(runner: Runner | None = None, **settings: object) -> Engine:
    defaults = {"n_ctx": 200, "max_rows": 24, "max_logit_rows": 2}
    return Engine(runner or load(), EngineSettings(engine_id="e", model="m", **{**defaults, **settings}))


def hidden_of(ids: list[int]) -> np.ndarray:
    """Hidden states of all rows, one run for each prefix."""
    runner = load()
    run = SequenceRun(runner, range(16))
    rows = []
    for token in ids:
        result = run_batch([(run, [token])], [], want_hidden=True)
        assert result.hidden is not None
        rows.append(result.hidden[0])
    return np.array(rows)


def run(subject: Engine, *requests: EmbedRequest) -> list[EmbedResult | SageError]:
    out: dict[str, EmbedResult | SageError] = {}
    for request in requests:
        subject.embed(request, lambda outcome, name=request.request_id: out.__setitem__(name, outcome))
    for _ in range(200):
        subject.step()
        subject.check_integrity()
        if not subject.has_work:
            break
    assert subject.status().blocks_used == 0
    return [out[request.request_id] for request in requests]


def request(*inputs: list[int], name: str = "r", **fields: object) -> EmbedRequest:
    return EmbedRequest(request_id=name, inputs=tuple(tuple(i) for i in inputs), **fields)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "model"])
def test_pooling_equals_its_definition(pooling: str) -> None:
    """Pooled vectors equal those made of all hidden states, over chunks, for inputs of several lengths at once."""
    inputs = [random_ids(SPEC, n, seed=n) for n in (1, 5, 40, 70)]
    (result,) = run(engine(), request(*inputs, pooling=pooling, normalize=False))
    assert isinstance(result, EmbedResult)
    assert result.prompt_tokens == 116
    for got, ids in zip(result.vectors(), inputs, strict=True):
        hidden = hidden_of(ids)
        want = {"mean": hidden.mean(0), "cls": hidden[0]}.get(pooling, hidden[-1])
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_vectors_have_length_one_unless_told_otherwise() -> None:
    """Embeddings of a decoder are normalised by default, after the cut to `dimensions`."""
    ids = random_ids(SPEC, 9)
    (result,) = run(engine(), request(ids, dimensions=7))
    assert isinstance(result, EmbedResult)
    assert result.width == 7
    assert np.linalg.norm(result.vectors()[0]) == pytest.approx(1, abs=1e-6)


def test_chunks_and_company_do_not_matter() -> None:
    """The bits of a vector are the same whatever the chunk size and whoever is beside it."""
    ids = random_ids(SPEC, 50)
    (alone,) = run(engine(max_rows=64), request(ids, pooling="mean"))
    others = request(*(random_ids(SPEC, n, seed=n) for n in (30, 3, 17)), name="others")
    for max_rows in (7, 24):
        results = run(engine(max_rows=max_rows), others, request(ids, pooling="mean"))
        assert isinstance(results[1], EmbedResult)
        assert isinstance(alone, EmbedResult)
        assert results[1].data == alone.data


def test_logprobs_of_targets() -> None:
    """The task logprobs gives the next token's log-probabilities of the targets, more inputs than logit rows included."""
    inputs = [random_ids(SPEC, n, seed=n) for n in (4, 30, 8, 2, 11)]
    (result,) = run(engine(), request(*inputs, task="logprobs", target_ids=(7, 3)))
    assert isinstance(result, EmbedResult)
    for got, ids in zip(result.vectors(), inputs, strict=True):
        logits = SequenceRun(load(), range(16)).feed(ids)
        np.testing.assert_allclose(got, log_softmax(logits)[[7, 3]], atol=1e-6)


def test_generation_goes_on_beside_it() -> None:
    """A sequence that is generated meanwhile gets the tokens that it gets alone, and the prefix cache stays sound."""

    def generate(subject: Engine) -> list[int]:
        sampling = SamplingParams(temperature=0.8, seed=4, max_tokens=20)
        subject.add(EngineRequest(request_id="g", prompt_token_ids=tuple(random_ids(SPEC, 30)), sampling=sampling))
        tokens: list[int] = []
        for _ in range(100):
            for delta in subject.step():
                tokens += delta.token_ids
            subject.check_integrity()
            if not subject.has_work:
                return tokens
        raise AssertionError("not finished")

    alone = generate(engine())
    subject = engine()
    outcomes: list[object] = []
    subject.embed(request(*(random_ids(SPEC, 60, seed=s) for s in range(4))), outcomes.append)
    assert generate(subject) == alone
    assert isinstance(outcomes[0], EmbedResult)


def test_inputs_wait_for_blocks() -> None:
    """Inputs that do not fit the pool together are computed one after another."""
    inputs = [random_ids(SPEC, 60, seed=s) for s in range(5)]
    (result,) = run(engine(load(n_blocks=6)), request(*inputs))
    assert isinstance(result, EmbedResult)
    assert len(result.vectors()) == 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": ((SPEC.vocab_size,),)}, InvalidArgumentError, "outside of the vocabulary"),
        ({"inputs": ((1,) * 201,)}, ContextLengthError, "201 tokens.*takes 200"),
        ({"dimensions": SPEC.d_model + 1}, InvalidArgumentError, "dimensions"),
        ({"task": "classify"}, UnsupportedError, "no classifier"),
        ({"token_types": ((0,),)}, UnsupportedError, "token types"),
        ({"task": "logprobs", "target_ids": (-1,)}, InvalidArgumentError, "outside of the vocabulary"),
    ],
)
def test_what_cannot_be_done_is_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    """A request that a decoder cannot serve is refused by name, before anything runs."""
    with pytest.raises(error, match=message):
        engine().embed(EmbedRequest(**{"request_id": "r", "inputs": ((1,),), **change}), lambda _: None)


def test_the_queue_is_bounded() -> None:
    """More inputs than the queue holds are refused with both numbers; what is there goes on."""
    subject = engine(max_waiting=3)
    subject.embed(request([1], [2]), lambda _: None)
    with pytest.raises(ResourceExhaustedError, match="2 inputs are waiting, the queue holds 3"):
        subject.embed(request([1], [2], name="more"), lambda _: None)
    subject.embed(request([1], name="one"), lambda _: None)


def test_duplicate_ids_are_refused() -> None:
    """Two requests of one id at the same time are refused; after the first ended the id is free."""
    subject = engine()
    subject.embed(request([1]), lambda _: None)
    with pytest.raises(InvalidArgumentError, match="already here"):
        subject.embed(request([2]), lambda _: None)
    run(subject, request([1], name="other"))
    run(subject, request([2]))


def test_deadline_and_abort_give_blocks_back() -> None:
    """A request that expires or is aborted half-way leaves no block behind; only the expired one is told."""
    now = [0.0]
    subject = Engine(
        load(), EngineSettings(engine_id="e", model="m", n_ctx=200, max_rows=8, max_logit_rows=2), clock=lambda: now[0]
    )
    outcomes: list[object] = []
    subject.embed(request([1] * 50, name="slow", deadline_s=1.0), outcomes.append)
    subject.embed(request([1] * 50, name="gone"), outcomes.append)
    subject.step()
    assert subject.status().blocks_used > 0
    assert subject.abort_embed("gone")
    assert not subject.abort_embed("gone")
    now[0] = 2.0
    subject.step()
    assert [type(o) for o in outcomes] == [DeadlineExceededError]
    assert subject.status().blocks_used == 0
    assert not subject.has_work


class _Failing:
    """A runner whose steps fail."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def step(self, batch: StepBatch) -> StepResult:
        raise RuntimeError("boom")


def test_device_failure_reaches_the_request() -> None:
    """A step that fails ends the requests with an error and leaves no block behind."""
    subject = engine(_Failing(load()))
    (outcome,) = run(subject, request([1, 2]))
    assert isinstance(outcome, InternalError)
    assert "RuntimeError" in outcome.message


async def test_local_engine_embeds() -> None:
    """LocalEngine is an embedding client: concurrent requests, cancellation and closing behave."""
    client = LocalEngine(engine())
    assert isinstance(client, EmbeddingClient)
    results = await asyncio.gather(*(client.embed(request([n, n + 1], name=str(n))) for n in range(5)))
    assert len({r.data for r in results}) == 5
    with pytest.raises(InvalidArgumentError):
        await client.embed(request([10**6]))
    task = asyncio.create_task(client.embed(request([1] * 200, name="cancelled")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await client.check_integrity()
    await client.close()
    with pytest.raises(UnavailableError):
        await client.embed(request([1]))
