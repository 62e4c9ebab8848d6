import contextlib
import json
import math

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_protocol import (
    ChatMessage,
    Error,
    ErrorCode,
    GrammarSpec,
    KVHandle,
    Metrics,
    Request,
    Response,
    SamplingParams,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    TokenDelta,
    TokenLogprob,
    codec,
)
from sagellm_protocol.embedding import EmbedRequest
from sagellm_protocol.errors import InvalidArgumentError, ProtocolVersionError
from sagellm_protocol.handover import KVTicket
from sagellm_protocol.registry import TYPES

# A seed, a token or a count: what JSON and msgpack both carry exactly.
ints = st.integers(1, 2**31 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
unit = st.floats(0, 1, exclude_min=True, width=32)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)

st.register_type_strategy(int, ints)
st.register_type_strategy(str, text)
st.register_type_strategy(float, unit)

sampling = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_p=unit,
    top_k=st.integers(0, 1000),
    min_p=unit,
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    max_tokens=st.none() | st.integers(100, 1000),
    min_tokens=st.integers(0, 100),
    stop=st.lists(text, max_size=3).map(tuple),
    stop_token_ids=st.lists(ints, max_size=3).map(tuple),
    logit_bias=st.none() | st.dictionaries(ints, st.floats(-100, 100), max_size=3),
    logprobs=st.none() | st.integers(0, 20),
    grammar=st.none() | st.builds(GrammarSpec, kind=st.sampled_from(["json_schema", "regex"]), source=text),
)
metrics = st.builds(
    Metrics, tbt_ms=unit, tpot_ms=st.none() | unit, itl_list=st.lists(unit, max_size=4).map(tuple), timestamps=st.none()
)
failed = st.builds(Error)
one_text = st.one_of(
    st.fixed_dictionaries({"prompt": text}),
    st.fixed_dictionaries({"messages": st.lists(st.builds(ChatMessage), min_size=1, max_size=3).map(tuple)}),
)
ids = st.fixed_dictionaries({"request_id": text, "trace_id": text, "engine_id": text})
tokens = st.lists(ints, max_size=4).map(tuple)

alternative = st.builds(
    TokenLogprob, token_id=ints, logprob=unit, text=text, data=st.binary(max_size=4), top=st.just(())
)

SPECIAL = {
    "KVTicket": st.lists(ints, max_size=3).map(
        lambda sums: KVTicket(
            name="kv-1",
            fingerprint="f",
            block_size=2,
            block_bytes=8,
            token_ids=(5,) * 2 * len(sums),
            checksums=tuple(sums),
        )
    ),
    "TokenLogprob": st.builds(
        TokenLogprob,
        token_id=ints,
        logprob=unit,
        text=text,
        data=st.binary(max_size=4),
        top=st.lists(alternative, max_size=2).map(tuple),
    ),
    "SamplingParams": sampling,
    "EmbedRequest": st.builds(
        EmbedRequest,
        request_id=text,
        inputs=st.lists(st.lists(ints, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple),
        token_types=st.just(()),
        task=st.sampled_from(["embed", "classify"]),
        dimensions=st.none() | ints,
        target_ids=st.just(()),
    ),
    "Metrics": metrics,
    "Request": st.builds(
        lambda either, **kw: Request(**either, **kw),
        one_text,
        request_id=text,
        trace_id=text,
        model=text,
        max_tokens=ints,
        stream=st.booleans(),
        sampling_params=st.none() | sampling,
        kv_budget_tokens=st.none() | ints,
        phase=st.sampled_from([None, "prefill", "decode"]),
        metadata=st.dictionaries(text, json_values, max_size=3),
    ),
    "Response": st.builds(
        Response, finish_reason=st.just("error"), metrics=st.none() | metrics, error=st.none() | failed
    ),
    "StreamEventDelta": st.builds(
        lambda names, ids, text, tokens: StreamEventDelta(**ids, **{names[0]: text, names[1]: tokens}),
        st.sampled_from([("content", "content_tokens"), ("chunk", "chunk_tokens"), ("content", "chunk_tokens")]),
        ids,
        text,
        tokens,
    ),
    "StreamEventEnd": st.builds(
        lambda name, ids, text, **kw: StreamEventEnd(**ids, **{name: text}, **kw),
        st.sampled_from(["content", "output_text"]),
        ids,
        text,
        output_tokens=tokens,
        finish_reason=st.just("error"),
        metrics=st.none() | metrics,
        error=st.none() | failed,
    ),
}


def values(cls: type[msgspec.Struct]) -> st.SearchStrategy:
    """Any value of a protocol type."""
    if cls.__name__ in SPECIAL:
        return SPECIAL[cls.__name__]
    fields = {f.name: _field(f.type) for f in msgspec.structs.fields(cls)}
    return st.builds(cls, **fields)


def _field(annotation: object) -> st.SearchStrategy:
    return _of(msgspec.inspect.type_info(annotation))


def _of(info: msgspec.inspect.Type) -> st.SearchStrategy:
    i = msgspec.inspect
    simple = {
        i.IntType: ints, i.StrType: text, i.FloatType: unit, i.BoolType: st.booleans(),
        i.NoneType: st.none(), i.BytesType: st.binary(max_size=8), i.AnyType: json_values,
    }  # fmt: skip
    if type(info) in simple:
        return simple[type(info)]
    if isinstance(info, i.UnionType):
        return st.one_of([_of(t) for t in info.types])
    if isinstance(info, i.VarTupleType):
        return st.lists(_of(info.item_type), max_size=2).map(tuple)
    if isinstance(info, i.DictType):
        return st.dictionaries(_of(info.key_type), _of(info.value_type), max_size=3)
    if isinstance(info, i.LiteralType):
        return st.sampled_from(info.values)
    if isinstance(info, i.EnumType):
        return st.sampled_from(list(info.cls))
    if isinstance(info, i.StructType):
        return st.deferred(lambda: values(info.cls))
    raise AssertionError(f"no strategy for {info}")


@pytest.mark.parametrize("format", ["json", "msgpack"])
@pytest.mark.parametrize("name", sorted(TYPES))
def test_round_trip(name, format):
    """Every type of the protocol comes back equal from both codecs."""

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(values(TYPES[name]))
    def check(value):
        assert codec.decode(codec.encode(value, format), format) == value

    check()


@given(st.binary(max_size=200), st.sampled_from(["json", "msgpack"]))
def test_garbage_is_refused(data, format):
    """Random bytes raise an error of our tree and nothing else."""
    with pytest.raises((InvalidArgumentError, ProtocolVersionError)):
        codec.decode(data, format)


@given(values(Request), st.integers(0, 10_000), st.sampled_from(["json", "msgpack"]))
def test_truncation_is_refused(value, cut, format):
    """An envelope that was cut anywhere is refused as malformed."""
    data = codec.encode(value, format)
    with pytest.raises(InvalidArgumentError):
        codec.decode(data[: cut % len(data)], format)


@given(values(Request), st.data())
def test_flipped_bytes_never_escape_the_tree(value, data):
    """A corrupted envelope decodes to a valid value or raises an error of our tree."""
    raw = bytearray(codec.encode(value, "msgpack"))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidArgumentError, ProtocolVersionError):
        codec.decode(raw, "msgpack")


def test_unknown_version():
    """Another version is refused with both versions in the message."""
    with pytest.raises(ProtocolVersionError, match=r"'0\.2'.*0\.1"):
        codec.decode(b'{"v":"0.2","type":"Request","body":{}}')


def test_unknown_type():
    """A type that the protocol lacks is refused by name."""
    with pytest.raises(InvalidArgumentError, match="'Pickle' is unknown"):
        codec.decode(b'{"v":"0.1","type":"Pickle","body":{}}')


def test_only_protocol_types_are_encoded():
    """A struct of somebody else is refused, also under the name of one of ours."""
    other = msgspec.defstruct("Request", [("x", int)])
    with pytest.raises(InvalidArgumentError, match="not a type of protocol"):
        codec.encode(other(1))


def test_oversize():
    """An envelope above the limit is refused before it is parsed, with both numbers."""
    with pytest.raises(InvalidArgumentError, match="11 bytes, the limit is 10"):
        codec.decode(b" " * 11, max_bytes=10)


def test_deep_nesting():
    """Nesting deep enough to exhaust the stack is an error and not a crash."""
    body = b'{"handle_id":"h","request_id":"r","num_tokens":1,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(InvalidArgumentError):
        codec.decode(b'{"v":"0.1","type":"KVHandle","body":' + body + b"}")


def test_wrong_type_for_from_json():
    """Asking for one type and getting another is an error that names both."""
    data = codec.to_json(KVHandle(handle_id="h", request_id="r", num_tokens=1))
    with pytest.raises(InvalidArgumentError, match="holds a KVHandle, expected a Request"):
        codec.from_json(data, Request)
    assert codec.from_json(data, KVHandle).num_tokens == 1


@pytest.mark.parametrize("format", ["json", "msgpack"])
def test_alias_names_decode(format):
    """The short names of the event types are accepted on decoding."""
    event = StreamEventStart(request_id="r", trace_id="t", engine_id="e")
    module = getattr(msgspec, format)
    envelope = module.decode(codec.encode(event, format))
    envelope["type"] = "StartEvent"
    assert codec.decode(module.encode(envelope), format) == event


def test_infinite_logprob_survives_msgpack():
    """A log-probability of -inf crosses the wire."""
    delta = TokenLogprob(token_id=1, logprob=-math.inf)
    assert codec.from_msgpack(codec.to_msgpack(delta), TokenLogprob).logprob == -math.inf


def test_surrogates_are_refused():
    """Text that UTF-8 cannot hold is refused on encoding."""
    with pytest.raises(InvalidArgumentError, match="cannot carry"):
        codec.encode(TokenDelta(request_id="\ud800"))


def test_unknown_error_code_is_refused():
    """An error code outside the tree is refused."""
    with pytest.raises(InvalidArgumentError, match="Invalid enum value"):
        codec.decode(b'{"v":"0.1","type":"Error","body":{"code":"nope","message":"m"}}')


def test_schema_covers_every_type():
    """The JSON Schema defines every type and has one branch for each."""
    from sagellm_protocol.schema import json_schema

    schema = json.loads(json.dumps(json_schema()))
    assert set(TYPES) <= set(schema["$defs"])
    assert {b["properties"]["type"]["const"] for b in schema["oneOf"]} == set(TYPES)
    assert set(schema["$defs"]["Request"]["required"]) == {"request_id", "trace_id", "model", "max_tokens"}
    assert ErrorCode.INTERNAL.value in schema["$defs"]["ErrorCode"]["enum"]
