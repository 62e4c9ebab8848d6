"""Going on with a broken stream: what is left out, what comes, and what is refused."""

import json
import re

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_gateway.resume import Resume, remaining, size
from sagellm_protocol.generation import ChoiceDelta, GenerationEnd, ToolCallDelta, Usage

pieces = st.one_of(
    st.builds(lambda t: ("reasoning", t), st.text(max_size=4)),
    st.builds(lambda t: ("text", t), st.text(max_size=4)),
    st.builds(lambda t: ("head", t), st.sampled_from(["f", "g"])),
    st.builds(lambda t: ("arguments", t), st.text(max_size=4)),
)


def delta(kind: str, text: str) -> ChoiceDelta:
    if kind == "head":
        return ChoiceDelta(tool_calls=(ToolCallDelta(index=0, id="call_1", name=text),))
    if kind == "arguments":
        return ChoiceDelta(tool_calls=(ToolCallDelta(index=0, arguments=text),))
    return ChoiceDelta(**{kind: text})


def spelled(deltas: list[ChoiceDelta]) -> str:
    """All characters in order, the head of a call as one."""
    out = ""
    for d in deltas:
        out += d.reasoning + d.text
        for call in d.tool_calls:
            out += ("#" if call.name is not None else "") + call.arguments
    return out


async def gather(deltas: list[ChoiceDelta], count: int) -> list[ChoiceDelta]:
    async def events():
        for d in deltas:
            yield d
        yield GenerationEnd(usage=Usage(prompt_tokens=1, completion_tokens=1))

    seen = [event async for event in remaining(events(), (count,))]
    assert type(seen.pop()) is GenerationEnd
    return seen


@given(st.lists(pieces, max_size=10), st.integers(0, 50))
async def test_exactly_the_rest_comes(parts, count):
    """Whatever was sent, the rest is the whole without its first characters, however the whole was cut into deltas."""
    deltas = [delta(kind, text) for kind, text in parts]
    whole = spelled(deltas)
    assert len(whole) == sum(size(d) for d in deltas)
    assert spelled(await gather(deltas, count)) == whole[count:]


@given(st.lists(st.tuples(st.text(max_size=3), st.integers(1, 3)), max_size=8), st.integers(0, 30))
async def test_tokens_of_what_was_sent_are_counted(parts, count):
    """The tokens of all deltas come with the rest, those of deltas that are left out with the next one."""
    deltas = [ChoiceDelta(text=text, token_ids=(1,) * tokens) for text, tokens in parts]
    deltas.append(ChoiceDelta(token_ids=(1,), finish_reason="stop"))
    rest = await gather(deltas, count)
    assert sum(len(d.token_ids) for d in rest) == sum(len(d.token_ids) for d in deltas)


async def test_the_end_of_a_choice_always_comes():
    """A client that had every character still gets the finish reason."""
    (last,) = await gather([ChoiceDelta(text="abc", finish_reason="stop")], 3)
    assert (last.text, last.finish_reason) == ("", "stop")


BODY = {
    "model": "mock", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 60, "temperature": 1.0, "stream": True, "ignore_eos": True,
}  # fmt: skip


def read(url: str, headers: dict[str, str], body: dict[str, object] = BODY) -> list[tuple[str, dict[str, object]]]:
    """(id, chunk) of every event; an id that is not given anew is empty."""
    reply = httpx2.post(f"{url}/chat/completions", json=body, headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text
    events = []
    for block in reply.text.split("\n\n"):
        found = re.fullmatch(r"(?:id: (\S+)\n)?data: (\{.*\})", block)
        if found:
            events.append((found[1] or "", json.loads(found[2])))
    return events


def content(events: list[tuple[str, dict[str, object]]], index: int = 0) -> str:
    choices = [choice for _, chunk in events for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def ends(events: list[tuple[str, dict[str, object]]]) -> dict[int, str]:
    return {c["index"]: c["finish_reason"] for _, chunk in events for c in chunk["choices"] if c["finish_reason"]}


def test_without_the_header_nothing_changes(mock_server):
    """A client that did not ask gets no ids."""
    assert {event_id for event_id, _ in read(mock_server.base_url, {})} == {""}


@pytest.mark.parametrize("n", [1, 2])
def test_every_event_is_a_place_to_go_on(mock_server, n):
    """From each id the same request gives the rest: same answer id, no character missing or twice, no seed needed."""
    body = {**BODY, "n": n}
    whole = read(mock_server.base_url, {"X-Stream-Resume": "true"}, body)
    ids = [event_id for event_id, _ in whole if event_id]
    assert ids
    for at in (0, len(ids) // 2, len(ids) - 1):
        cut = next(k for k, (event_id, _) in enumerate(whole) if event_id == ids[at]) + 1
        rest = read(mock_server.base_url, {"Last-Event-ID": ids[at]}, body)
        for index in range(n):
            assert content(whole[:cut], index) + content(rest, index) == content(whole, index)
        assert {chunk["id"] for _, chunk in rest} == {whole[0][1]["id"]}
        assert ends(rest) == ends(whole)


@pytest.mark.parametrize(
    ("headers", "changes", "said"),
    [
        ({"Last-Event-ID": "nonsense"}, {}, "not the id of an event"),
        ({"Last-Event-ID": "cmpl-" + "a" * 24 + ".3"}, {}, "not the id of an event"),
        ({"Last-Event-ID": "chatcmpl-" + "a" * 24 + ".3"}, {"n": 2}, "counts 1 choices, the request asks for 2"),
        ({"X-Stream-Resume": "1"}, {"logprobs": True}, "logprobs cannot be resumed"),
    ],
)
def test_what_cannot_be_resumed(mock_server, headers, changes, said):
    """An id that is none of ours, another request, and logprobs are refused with the reason."""
    reply = httpx2.post(
        f"{mock_server.base_url}/chat/completions", json={**BODY, **changes}, headers=headers, timeout=60
    )
    assert reply.status_code in (400, 422, 501)
    assert said in reply.json()["error"]["message"]


@pytest.mark.parametrize("echo", [False, True])
def test_completions_go_on_too(mock_server, echo):
    """A plain completion is resumed like a chat, with or without the prompt in front; a list of prompts is refused."""
    url = f"{mock_server.base_url}/completions"
    body = {"model": "mock", "prompt": "once upon", "max_tokens": 30, "temperature": 1.0, "stream": True, "echo": echo}

    def events(headers: dict[str, str]) -> list[tuple[str, str]]:
        reply = httpx2.post(url, json=body, headers=headers, timeout=60)
        found = re.findall(r"(?:id: (\S+)\n)?data: (\{.*\})\n\n", reply.text)
        return [(event_id, json.loads(data)["choices"][0]["text"]) for event_id, data in found]

    whole = events({"X-Stream-Resume": "true"})
    middle = len(whole) // 2
    rest = events({"Last-Event-ID": whole[middle][0]})
    text = "".join(piece for _, piece in whole)
    assert "".join(piece for _, piece in whole[: middle + 1] + rest) == text
    assert text.startswith("once upon") == echo
    several = httpx2.post(url, json={**body, "prompt": ["a", "b"]}, headers={"X-Stream-Resume": "true"}, timeout=60)
    assert several.status_code >= 400
    assert "several prompts" in several.text


def test_own_seed_is_kept():
    """A request with a seed of its own is repeated with that one; one without gets the same from the same id."""
    from sagellm_protocol import GenerationRequest, SamplingParams

    given_seed = GenerationRequest(request_id="chatcmpl-1", model="m", prompt="p", sampling=SamplingParams(seed=4))
    assert Resume().prepare(given_seed).sampling.seed == 4
    none = GenerationRequest(request_id="chatcmpl-1", model="m", prompt="p")
    again = GenerationRequest(request_id="chatcmpl-2", model="m", prompt="p")
    first = Resume().prepare(none)
    second = Resume("chatcmpl-1", (3,)).prepare(again)
    assert first.sampling.seed == second.sampling.seed is not None
    assert first.request_id != second.request_id
