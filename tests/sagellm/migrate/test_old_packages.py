"""Public names of isagellm 0.1 - 0.5 in the six packages."""

import importlib
import warnings

import pytest

from sagellm.migrate.packages import GONE, MOVED
from sagellm_protocol.errors import UnsupportedError
from sagellm_protocol.types import Request

MOVES = [(package, name, new) for package, names in MOVED.items() for name, new in names.items()]
LOSSES = [(package, name) for package, names in GONE.items() for name in names]


@pytest.mark.parametrize(("package", "name", "new"), MOVES)
def test_a_moved_name_gives_the_new_object_and_warns(package, name, new):
    """`old is new`, with a DeprecationWarning that says where it is now."""
    module, _, attribute = new.partition(":")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        old = getattr(importlib.import_module(package), name)
    assert old is getattr(importlib.import_module(module), attribute)
    assert name == "__version__" or any(new.replace(":", ".") in str(w.message) for w in caught)


@pytest.mark.parametrize(("package", "name"), LOSSES)
def test_a_lost_name_says_what_to_use(package, name):
    """The ImportError names the package, the name and a way on."""
    with pytest.raises(ImportError, match=f"{package}.{name} of isagellm 0.5 has no successor: .{{10}}"):
        getattr(importlib.import_module(package), name)


@pytest.mark.parametrize("package", sorted(MOVED))
def test_an_unknown_name_is_an_attribute_error(package):
    """What no version had fails as in any module, so that hasattr and submodule imports work."""
    assert not hasattr(importlib.import_module(package), "NoSuchName")


async def test_the_old_engine_class_answers():
    """LLMEngine starts, executes, generates, streams, reports and stops; MockEngine is it over the simulated device."""
    from sagellm.llm_engine import LLMEngineConfig, MockEngine, create_engine

    async with MockEngine() as engine:
        assert await engine.health_check()
        request = Request(
            request_id="a", trace_id="a", model=engine.model, prompt="Good", max_tokens=8, temperature=0.0
        )
        executed = await engine.execute(request)
        generated = await engine.generate("Good", max_tokens=8)
        assert executed.error is None
        assert executed.output_text == generated.output_text
        events = [event async for event in engine.stream("Good", max_tokens=8)]
        assert "".join(e.content for e in events[1:-1]) == generated.output_text == events[-1].content
        assert (await engine.generate(messages=[{"role": "user", "content": "Hi"}], max_tokens=4)).output_tokens
        assert engine.get_info()["model"] == engine.model
    assert not await engine.health_check()
    created = create_engine(LLMEngineConfig(model_path="mock"))
    await created.start()
    await created.stop()


def test_fields_without_meaning_are_refused_by_name():
    """A value of the old class that would be ignored is an error."""
    from sagellm.llm_engine import LLMEngineConfig

    with pytest.raises(UnsupportedError, match="tensor_parallel_size is 2"):
        LLMEngineConfig(model_path="mock", tensor_parallel_size=2)
