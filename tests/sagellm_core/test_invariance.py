"""Bit for bit: a sequence's tokens and log-probabilities are the same however it is run, on every device that promises it."""

import json
import re

import msgspec
import numpy as np
import pytest

from sagellm_backend.base import LoadOptions
from sagellm_backend.blas import set_blas_threads
from sagellm_backend.conformance_specs import SPECS, random_weights
from sagellm_backend.registry import load as load_backend
from sagellm_core.build import build_engine
from sagellm_core.config import CacheOptions, EngineConfig, Limits, SpeculationOptions
from sagellm_core.engine import Engine, EngineSettings
from sagellm_core.grammar import LLGuidanceCompiler
from sagellm_core.speculation import DraftSpeculator, NgramSpeculator
from sagellm_core.spill import DiskTier
from sagellm_core.testing import collect
from sagellm_core.text.bytes_model import EOS, IM_END, ByteChatModel
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.sampling import GrammarSpec, SamplingParams

SPEC = SPECS["llama"]
WEIGHTS = random_weights(SPEC)
PROMPTS = [5, 40, 17, 64, 33, 16]


@pytest.fixture(autouse=True, scope="module")
def one_blas_thread():
    """Tiny products: threads of a BLAS that wait for each other cost a hundred times the work."""
    set_blas_threads(1)


@pytest.fixture(params=["reference", "cpu"], scope="module")
def backend(request):
    found = load_backend(request.param)
    reason = found.available()
    if reason is not None:
        pytest.skip(reason)
    return found


def tiny_engine(backend, *, n_blocks=64, max_rows=64, caching=True, speculator=None, spill_dir=None, grammars=None):
    options = LoadOptions(n_blocks=n_blocks, max_rows=max_rows + 6, max_logit_rows=64)
    runner = backend.load(SPEC, WEIGHTS, options)
    settings = EngineSettings(
        engine_id="tiny",
        model="tiny",
        n_ctx=128,
        max_running=6,
        max_rows=max_rows,
        max_logit_rows=64,
        prefix_caching=caching,
    )
    guess = DraftSpeculator(backend.load(SPEC, WEIGHTS, options), 4) if speculator == "draft" else speculator
    spill = None if spill_dir is None else DiskTier(runner.kv, spill_dir, 256 * runner.kv.block_bytes)
    return Engine(runner, settings, speculator=guess, spill=spill, grammars=grammars)


def requests(temperature=None, **sampling):
    rng = np.random.default_rng(5)
    shared = rng.integers(0, SPEC.vocab_size, 40).tolist()
    out = []
    for index, length in enumerate(PROMPTS):
        own = rng.integers(0, SPEC.vocab_size, length).tolist()
        warmth = index % 2 * 1.0 if temperature is None else temperature
        how = {"temperature": warmth, "seed": index, "max_tokens": 30, "ignore_eos": True, "logprobs": 2, **sampling}
        out.append(
            EngineRequest(
                request_id=f"r{index}", prompt_token_ids=(*shared, *own)[: 60 + index], sampling=SamplingParams(**how)
            )
        )
    return out


def results(out):
    return {name: (o.token_ids, o.logprobs, o.deltas[0].prompt_logprobs) for name, o in out.items()}


def finish(engine, batch):
    out = results(collect(engine, batch))
    engine.check_integrity()
    status = engine.status()
    assert status.blocks_used == 0
    return out, status


@pytest.fixture(scope="module")
def alone(backend):
    engine = tiny_engine(backend, caching=False)
    out = {}
    for request in requests():
        out |= finish(engine, [request])[0]
    engine.close()
    return out


def test_in_a_batch(backend, alone):
    """Six sequences at once give what each gives alone."""
    assert finish(tiny_engine(backend), requests())[0] == alone


@pytest.mark.parametrize("max_rows", [7, 16, 23])
def test_with_any_chunking(backend, alone, max_rows):
    """Prompts cut into chunks of any size, mixed with decode rows."""
    assert finish(tiny_engine(backend, max_rows=max_rows), requests())[0] == alone


def test_after_a_prefix_hit(backend, alone):
    """From cached blocks, the partial ones by copy on write."""
    engine = tiny_engine(backend)
    collect(engine, requests())
    before = engine.status()
    out, after = finish(engine, requests())
    assert out == alone
    assert after.prefix_hits - before.prefix_hits > 6 * 40


def test_after_forced_preemption(backend, alone):
    """With blocks for two or three sequences the others are pushed back and computed again."""
    out, status = finish(tiny_engine(backend, n_blocks=13, max_rows=40), requests())
    assert out == alone
    assert status.preemptions > 0


def test_after_spill_and_return(backend, alone, tmp_path):
    """Blocks go to disk, come back, and are what they were."""
    engine = tiny_engine(backend, n_blocks=13, max_rows=40, spill_dir=tmp_path)
    collect(engine, requests())
    out, status = finish(engine, requests())
    assert out == alone
    assert status.spill_hits > 0
    assert status.spill_errors == 0
    engine.close()


def test_with_ngram_speculation(backend, alone):
    """Guesses from the sequence's own past are verified exactly, also when sampling."""
    engine = tiny_engine(backend, speculator=NgramSpeculator(6, 2, 1))
    out, status = finish(engine, requests())
    assert out == alone
    assert status.draft_tokens > 0


def test_with_a_draft_model(backend, alone):
    """Guesses of another model too; the same model as draft is always right when greedy."""
    out, status = finish(tiny_engine(backend, speculator="draft"), requests())
    assert out == alone
    _, status = finish(tiny_engine(backend, speculator="draft"), requests(temperature=0.0))
    assert status.accepted_tokens == status.draft_tokens > 50
    assert status.steps < 30


def test_a_continuation_elsewhere(backend, alone):
    """The second half, computed by another engine from what the first emitted, is the second half."""
    for request in requests():
        tokens = alone[request.request_id][0]
        moved = EngineRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            emitted_token_ids=tuple(tokens[:13]),
            sampling=request.sampling,
        )
        out, _ = finish(tiny_engine(backend), [moved])
        assert out[request.request_id][:2] == (tokens[13:], alone[request.request_id][1][13:])


def test_re_scoring_equals_generating(backend, alone):
    """Log-probabilities while generating equal prompt_logprobs of the same text within 1e-3."""
    for request in requests():
        tokens, logprobs, _ = alone[request.request_id]
        text = (*request.prompt_token_ids, *tokens)
        scoring = EngineRequest(
            request_id="s",
            prompt_token_ids=text,
            sampling=SamplingParams(temperature=0.0, seed=0, max_tokens=1, prompt_logprobs=0),
        )
        scores = finish(tiny_engine(backend), [scoring])[0]["s"][2]
        got = [entry.logprob for entry in scores[len(request.prompt_token_ids) :]]
        np.testing.assert_allclose(got, logprobs, atol=1e-3)


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["order", "orders"]},
        "ids": {"type": "array", "items": {"const": "id"}, "maxItems": 9},
    },
    "required": ["kind", "ids"],
    "additionalProperties": False,
}
GRAMMARS = [
    GrammarSpec(kind="json_schema", source=json.dumps(SCHEMA)),
    GrammarSpec(kind="regex", source="(ab|ba|c){40,60}"),
    GrammarSpec(kind="choice", source='["the same again and again and again", "the same the same"]'),
]


@pytest.fixture(scope="module")
def constrained(backend):
    """Requests whose output must match a grammar, and what each gives alone."""
    batch = [
        EngineRequest(
            request_id=f"r{index}",
            prompt_token_ids=request.prompt_token_ids,
            eos_token_ids=(EOS, IM_END),
            sampling=msgspec.structs.replace(
                request.sampling, grammar=GRAMMARS[index % 3], max_tokens=60, ignore_eos=False
            ),
        )
        for index, request in enumerate(requests())
    ]
    engine = tiny_engine(backend, caching=False, grammars=byte_grammars())
    out = {}
    for request in batch:
        out |= finish(engine, [request])[0]
    engine.close()
    return batch, out


def byte_grammars():
    return LLGuidanceCompiler(lambda: ByteChatModel("m", 4096).tokenizer, SPEC.vocab_size)


def test_masks_written_beside_the_layers_give_what_the_grammar_says(constrained):
    """Every output that ended by itself is a sentence of its grammar."""
    batch, out = constrained
    for request in batch:
        text = bytes(out[request.request_id][0]).decode()
        if request.sampling.grammar.kind == "json_schema":
            value = json.loads(text)
            assert value["kind"] in ("order", "orders")
            assert set(value["ids"]) <= {"id"}
        elif request.sampling.grammar.kind == "regex":
            assert re.fullmatch("(ab|ba|c)+a?b?", text)
        else:
            assert text in json.loads(request.sampling.grammar.source)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"max_rows": 7},
        {"n_blocks": 11, "max_rows": 40},
        {"speculator": "ngram"},
        {"speculator": "ngram", "n_blocks": 11, "max_rows": 40},
        {"speculator": "draft"},
    ],
    ids=str,
)
def test_under_a_grammar(backend, constrained, how):
    """Batch, chunks, preemption and verified guesses change nothing for outputs that must match a grammar."""
    batch, want = constrained
    guess = NgramSpeculator(6, 2, 1) if how.get("speculator") == "ngram" else how.get("speculator")
    engine = tiny_engine(backend, **{**how, "speculator": guess}, grammars=byte_grammars())
    out, status = finish(engine, batch)
    engine.close()
    assert out == want
    assert "n_blocks" not in how or status.preemptions > 0
    if how.get("speculator") == "ngram":  # a random model drafts what no grammar allows: its guesses are cut
        assert 0 < status.accepted_tokens <= status.draft_tokens


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_a_real_model(default_model_path, tmp_path):
    """SmolLM2 on the default device: batch, chunks, cache, preemption, spill, n-gram and draft all give the same bits."""
    text = "The engine keeps blocks of keys and values, and the scheduler shares one budget of rows. " * 12

    from sagellm_core.text import load_chat_model

    ids = load_chat_model(default_model_path, "m").tokenize(text)

    def make(rows=256, blocks=None, spill=None, method="none"):
        return build_engine(
            EngineConfig(
                model=str(default_model_path),
                limits=Limits(n_ctx=256, parallel=6, max_batch_tokens=rows),
                cache=CacheOptions(kv_bytes=None if blocks is None else blocks * block_bytes, spill_dir=spill),
                speculation=SpeculationOptions(
                    method=method, draft_model=str(default_model_path) if method == "draft" else None
                ),
            )
        )

    def sequence(index):
        how = SamplingParams(temperature=float(index % 2), seed=index, max_tokens=40, ignore_eos=True, logprobs=1)
        prompt = tuple(ids[(index // 3) * 7 :][: 20 + index * 13])
        return EngineRequest(request_id=f"r{index}", prompt_token_ids=prompt, sampling=how)

    batch = [sequence(index) for index in range(6)]
    block_bytes = 0
    engine = make()
    block_bytes = engine.describe().block_bytes
    want = {}
    for request in batch:
        engine.clear_cache()
        want |= finish(engine, [request])[0]
    engine.clear_cache()
    assert finish(engine, batch)[0] == want
    assert finish(engine, batch)[0] == want
    engine.close()
    for how in (
        {"rows": 19},
        {"blocks": 17, "spill": str(tmp_path)},
        {"method": "ngram"},
        {"method": "draft"},
    ):
        engine = make(**how)
        assert finish(engine, batch)[0] == want, how
        if "blocks" in how:
            out, status = finish(engine, batch)
            assert out == want, how
            assert status.preemptions > 0
            assert status.evictions > 0
            assert status.spill_hits > 0
        engine.close()
