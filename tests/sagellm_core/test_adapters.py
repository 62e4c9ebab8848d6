from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from tiny_models import write_model

from sagellm_backend.base import LoadOptions, Runner
from sagellm_backend.conformance import SequenceRun, run_batch
from sagellm_backend.conformance_specs import SPECS, random_adapter, random_ids, random_weights
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.tensors import Tensor
from sagellm_core.adapters import AdapterTable
from sagellm_core.engine import Engine, EngineSettings
from sagellm_core.loader import open_model
from sagellm_core.loader.adapter import open_adapter
from sagellm_core.local import LocalEngine
from sagellm_protocol.embedding import EmbedRequest
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import InvalidArgumentError, ModelFileError, ResourceExhaustedError, UnsupportedError
from sagellm_protocol.sampling import SamplingParams

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "lora.json").read_text())["cases"]
FAMILIES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "families.json").read_text())["families"]
SPEC = SPECS["llama"]


def write_adapter(folder: Path, case: dict[str, Any], **changes: Any) -> Path:
    return write_model(folder, case, stem="adapter_model", config="adapter_config.json", **changes)


@pytest.mark.parametrize("name", CASES)
def test_adapter_equals_peft(name: str, tmp_path: Path) -> None:
    """A PEFT directory on its base model gives PEFT's logits within 1e-4, fused projections and patterns included."""
    case = CASES[name]
    base = write_model(tmp_path / "base", FAMILIES[case["family"]])
    with open_model(base) as model:
        runner = ReferenceBackend().load(model.spec, model.weights, LoadOptions(n_blocks=4))
    runner.load_adapter(0, open_adapter(write_adapter(tmp_path / "lora", case), name, model.spec))
    got = run_batch([(SequenceRun(runner, [0, 1]), case["ids"])], [row()], adapters=np.zeros(1, np.int32)).logits
    assert got is not None
    np.testing.assert_allclose(got[0], case["logits"], atol=1e-4)


def row() -> Any:
    from sagellm_backend.conformance import GREEDY

    return GREEDY


def test_interleaved_heads_get_permuted_factors(tmp_path: Path) -> None:
    """On a model whose Q and K rows are interleaved (GGUF), the adapter has the effect that it has on the original."""
    case = CASES["all"]
    base = write_model(tmp_path / "base", FAMILIES["llama"])
    adapter_path = write_adapter(tmp_path / "lora", case)
    logits = []
    with open_model(base) as model:
        spec = model.spec
        twin = msgspec.structs.replace(spec, rope=msgspec.structs.replace(spec.rope, layout="interleaved"))
        for which in (spec, twin):
            weights = {slot: model.weights[slot] for slot in spec.slots()}
            if which is twin:
                weights = {slot: interleave(slot, tensor, spec) for slot, tensor in weights.items()}
            runner = ReferenceBackend().load(which, weights, LoadOptions(n_blocks=4))
            runner.load_adapter(0, open_adapter(adapter_path, "a", which))
            run = SequenceRun(runner, [0, 1])
            logits.append(run_batch([(run, case["ids"])], [row()], adapters=np.zeros(1, np.int32)).logits)
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


def interleave(slot: str, tensor: Tensor, spec: Any) -> Tensor:
    """Permute rows as llama.cpp's converter does."""
    heads = {"q": spec.n_heads, "k": spec.n_kv_heads}.get(slot.partition(".")[2])
    if heads is None:
        return tensor
    array = tensor.data.view("<f4").reshape(heads, 2, spec.head_dim // 2, -1).swapaxes(1, 2)
    return Tensor.of(np.ascontiguousarray(array).reshape(tensor.shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "rank is 0"),
    ],
)
def test_other_kinds_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """What is more than B·A is refused by its key, never ignored."""
    with pytest.raises(ModelFileError, match=message):
        open_adapter(write_adapter(tmp_path / "a", CASES["all"], **changes), "a", _spec(tmp_path))


def _spec(tmp_path: Path) -> Any:
    with open_model(write_model(tmp_path / "base", FAMILIES["llama"])) as model:
        return model.spec


def test_foreign_and_broken_files_are_refused(tmp_path: Path) -> None:
    """An adapter of another model, of modules that cannot be adapted, or with half its factors is refused."""
    spec = _spec(tmp_path)
    with pytest.raises(ModelFileError, match="another model"):
        open_adapter(write_adapter(tmp_path / "a", CASES["all"]), "a", msgspec.structs.replace(spec, d_model=64))
    head = {"tensors": {f"base_model.model.lm_head.lora_{s}.weight": [4, 4] for s in "AB"}}
    with pytest.raises(ModelFileError, match="lm_head"):
        open_adapter(write_adapter(tmp_path / "b", CASES["all"] | head), "a", spec)
    half = {k: v for k, v in CASES["all"]["tensors"].items() if "layers.0.self_attn.q_proj.lora_B" not in k}
    with pytest.raises(ModelFileError, match="only one of the factors"):
        open_adapter(write_adapter(tmp_path / "c", CASES["all"] | {"tensors": half}), "a", spec)
    with pytest.raises(ModelFileError, match=r"adapter_config\.json"):
        open_adapter(tmp_path / "none", "a", spec)


def load() -> Runner:
    return ReferenceBackend().load(SPEC, random_weights(SPEC), LoadOptions(n_blocks=32, max_rows=64))


def engine(**settings: Any) -> Engine:
    return Engine(load(), EngineSettings(engine_id="e", model="m", n_ctx=200, max_rows=40, **settings))


def request(name: str, adapter: str | None) -> EngineRequest:
    sampling = SamplingParams(temperature=0.9, seed=5, max_tokens=12)
    return EngineRequest(
        request_id=name, prompt_token_ids=tuple(random_ids(SPEC, 40)), sampling=sampling, adapter=adapter
    )


def run(subject: Engine, *requests: EngineRequest) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {r.request_id: [] for r in requests}
    for r in requests:
        subject.add(r)
    while subject.has_work:
        for delta in subject.step():
            assert delta.error is None
            out[delta.request_id] += delta.token_ids
        subject.check_integrity()
    return out


def test_adapters_share_a_batch() -> None:
    """Requests with two adapters and with none, of one prompt, get in one batch the tokens that they get alone."""
    subject = engine()
    for seed in (1, 2):
        subject.load_adapter(random_adapter(SPEC, seed=seed))
    names = {"a": "random-1", "b": "random-2", "c": None, "d": "random-1"}
    together = run(subject, *(request(n, adapter) for n, adapter in names.items()))
    assert together["a"] == together["d"]
    assert len({tuple(t) for t in together.values()}) == 3
    for name, adapter in names.items():
        assert run(subject, request(name, adapter))[name] == together[name]  # with its prefix in the cache
    assert subject.status().adapters == ("random-1", "random-2")


def test_prefixes_of_adapters_are_apart() -> None:
    """A prompt that is cached for one adapter is not found for another, and not after its name came back."""
    subject = engine()
    subject.load_adapter(random_adapter(SPEC, seed=1))
    run(subject, request("a", "random-1"))
    before = subject.status().prefix_hits
    base = run(subject, request("b", None))["b"]
    assert subject.status().prefix_hits == before
    subject.unload_adapter("random-1")
    changed = random_adapter(SPEC, seed=9)
    subject.load_adapter(type(changed)("random-1", changed.factors))
    again = run(subject, request("c", "random-1"))["c"]
    assert subject.status().prefix_hits == before
    assert again != base


def test_names_are_checked() -> None:
    """An unknown adapter is refused with the loaded ones, a taken name too, and one in use cannot be unloaded."""
    subject = engine()
    subject.load_adapter(random_adapter(SPEC, seed=1))
    with pytest.raises(InvalidArgumentError, match=r"'x' is not loaded; loaded are: random-1"):
        subject.add(request("a", "x"))
    with pytest.raises(InvalidArgumentError, match="taken"):
        subject.load_adapter(random_adapter(SPEC, seed=1))
    subject.add(request("a", "random-1"))
    with pytest.raises(InvalidArgumentError, match="1 sequences use"):
        subject.unload_adapter("random-1")
    subject.abort("a")
    subject.unload_adapter("random-1")
    with pytest.raises(InvalidArgumentError, match="not loaded"):
        subject.unload_adapter("random-1")


def test_adapters_have_a_cap() -> None:
    """More bytes of adapters than the cap are refused with the numbers; unloading makes room."""
    size = random_adapter(SPEC).nbytes
    subject = engine(adapter_bytes=size + 100)
    subject.load_adapter(random_adapter(SPEC, seed=1))
    with pytest.raises(ResourceExhaustedError, match="unload another"):
        subject.load_adapter(random_adapter(SPEC, seed=2))
    subject.unload_adapter("random-1")
    subject.load_adapter(random_adapter(SPEC, seed=2))


def test_a_backend_without_adapters_says_so() -> None:
    """On a device that takes no adapters, loading one is refused by name."""
    with pytest.raises(UnsupportedError, match="takes no adapters"):
        AdapterTable(cast(Runner, object()), 1 << 30).load(random_adapter(SPEC))


def test_embeddings_use_adapters() -> None:
    """An embedding request with an adapter gives another vector than one without."""
    subject = engine()
    subject.load_adapter(random_adapter(SPEC, seed=1))
    out: list[Any] = []
    for name in ("random-1", None):
        subject.embed(EmbedRequest(request_id=str(name), inputs=((1, 2, 3),), adapter=name), out.append)
    with pytest.raises(InvalidArgumentError, match="1 sequences use"):
        subject.unload_adapter("random-1")
    while subject.has_work:
        subject.step()
    assert out[0].data != out[1].data


async def test_adapters_come_and_go_while_the_engine_runs(tmp_path: Path) -> None:
    """LocalEngine loads a PEFT directory beside a running stream and unloads it again; errors reach the caller."""
    base = write_model(tmp_path / "base", FAMILIES["llama"])
    with open_model(base) as model:
        runner = ReferenceBackend().load(model.spec, model.weights, LoadOptions(n_blocks=32))
    client = LocalEngine(Engine(runner, EngineSettings(engine_id="e", model="m", n_ctx=200)))

    async def generate(name: str, adapter: str | None, count: int) -> list[int]:
        sampling = SamplingParams(temperature=0.0, seed=1, max_tokens=count)
        asked = EngineRequest(request_id=name, prompt_token_ids=(3, 4, 5), sampling=sampling, adapter=adapter)
        return [t async for delta in client.stream(asked) for t in delta.token_ids]

    background = asyncio.create_task(generate("bg", None, 150))
    await client.load_adapter("x", str(write_adapter(tmp_path / "lora", CASES["all"])))
    assert await generate("a", "x", 10) != await generate("b", None, 10)
    with pytest.raises(ModelFileError):
        await client.load_adapter("y", str(tmp_path / "none"))
    await client.unload_adapter("x")
    with pytest.raises(InvalidArgumentError):
        await client.unload_adapter("x")
    assert len(await background) == 150
    await client.close()
