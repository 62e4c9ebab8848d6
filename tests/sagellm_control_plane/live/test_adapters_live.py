from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from sagellm_backend.base import LoadOptions
from sagellm_backend.conformance_specs import SPECS, random_adapter, random_weights
from sagellm_backend.reference import ReferenceBackend
from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_core.engine import Engine, EngineSettings
from sagellm_core.loader import adapter as adapter_files
from sagellm_core.local import LocalEngine
from sagellm_core.text.bytes_model import ByteChatModel
from sagellm_protocol.embedding import EmbeddingRequest
from sagellm_protocol.errors import InvalidArgumentError, ModelFileError, ModelNotFoundError
from sagellm_protocol.generation import GenerationRequest
from sagellm_protocol.sampling import SamplingParams

SPEC = SPECS["llama"]


def engine(engine_id: str) -> LocalEngine:
    runner = ReferenceBackend().load(SPEC, random_weights(SPEC), LoadOptions(n_blocks=32, max_rows=64))
    return LocalEngine(Engine(runner, EngineSettings(engine_id=engine_id, model="m", n_ctx=200, max_rows=64)))


@pytest.fixture
async def manager(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ControlPlaneManager]:
    """Two engines of one model; an adapter's path is its seed, and "bad" cannot be read."""

    def open_adapter(path: str, name: str, spec: object) -> object:
        if path == "bad":
            raise ModelFileError("adapter_config.json is missing")
        found = random_adapter(SPEC, seed=int(path))
        return type(found)(name, found.factors)

    monkeypatch.setattr(adapter_files, "open_adapter", open_adapter)
    manager = ControlPlaneManager(mode="local", routing_strategy="round_robin", seed=1)
    await manager.start()
    text = ByteChatModel("m", 200)
    for name in ("one", "two"):
        await manager.add_engine(engine(name), text)
    yield manager
    await manager.stop()


async def tokens(manager: ControlPlaneManager, model: str, name: str, adapter: str | None = None) -> str:
    sampling = SamplingParams(temperature=0.0, seed=1, max_tokens=12, ignore_eos=True)
    request = GenerationRequest(request_id=name, model=model, prompt=(104, 105, 33), sampling=sampling, adapter=adapter)
    out: list[str] = []
    async for event in manager.generate(request):
        out.append(getattr(event, "text", None) or "")
    return "".join(out)


async def test_an_adapter_is_served_under_its_name(manager: ControlPlaneManager) -> None:
    """After loading, the adapter's name is a model of its own, on every engine; after unloading it is unknown again."""
    base = await tokens(manager, "m", "a")
    info = await manager.load_adapter("tuned", "5")
    assert (info.name, info.model) == ("tuned", "m")
    listed = {m.id: m.parent for m in manager.list_models()}
    assert listed == {"m": "", "tuned": "m"}
    assert manager.chat_model("tuned").model_id == "m"
    answers = {await tokens(manager, "tuned", f"b{i}") for i in range(4)}  # round robin: both engines
    assert len(answers) == 1
    assert answers != {base}
    assert await tokens(manager, "m", "c", adapter="tuned") in answers
    assert await tokens(manager, "m", "d") == base
    await manager.unload_adapter("tuned")
    with pytest.raises(ModelNotFoundError, match="tuned"):
        await tokens(manager, "tuned", "e")


async def test_embeddings_take_the_adapters_name(manager: ControlPlaneManager) -> None:
    """An embedding request for an adapter's name reaches the engine with the adapter."""
    await manager.load_adapter("tuned", "5")
    base, tuned = [
        await manager.embed(EmbeddingRequest(request_id=model, model=model, inputs=((1, 2),)))
        for model in ("m", "tuned")
    ]
    assert base.data != tuned.data


async def test_all_engines_or_none(manager: ControlPlaneManager) -> None:
    """A path that an engine cannot read leaves the adapter on no engine, and its name free."""
    with pytest.raises(ModelFileError):
        await manager.load_adapter("tuned", "bad")
    assert [m.id for m in manager.list_models()] == ["m"]
    await manager.load_adapter("tuned", "3")


async def test_names_are_unique(manager: ControlPlaneManager) -> None:
    """A model's or an adapter's name cannot be given to another adapter; an unknown one cannot be unloaded."""
    await manager.load_adapter("tuned", "3")
    for name in ("m", "tuned"):
        with pytest.raises(InvalidArgumentError, match="already"):
            await manager.load_adapter(name, "4")
    with pytest.raises(ModelNotFoundError, match="tuned"):
        await manager.unload_adapter("other")
    with pytest.raises(ModelNotFoundError):
        await manager.load_adapter("x", "4", model="nothing")


async def test_several_models_need_the_models_name(manager: ControlPlaneManager) -> None:
    """With two models served, loading an adapter needs to say for which."""
    await manager.add_engine(engine("three"), ByteChatModel("n", 200))
    with pytest.raises(InvalidArgumentError, match="2 models"):
        await manager.load_adapter("tuned", "3")
    assert (await manager.load_adapter("tuned", "3", model="n")).model == "n"
