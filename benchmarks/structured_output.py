"""Random JSON schemas on a real model: how many answers are instances of their schema (all of them, or it is a bug).

    python benchmarks/structured_output.py MODEL.gguf [--count 200] [--seed 0] [--json OUT.json]

Requests run 16 at a time through the engine, drawn at temperature 1, and are checked by the `jsonschema` package.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from sagellm_core.build import build_engine
from sagellm_core.config import EngineConfig, Limits
from sagellm_core.local import LocalEngine
from sagellm_core.text import TextChatModel, load_chat_model
from sagellm_protocol.generation import ChatMessage, GenerationRequest
from sagellm_protocol.sampling import GrammarSpec, SamplingParams

NAMES = ["name", "age", "città", "x y", "items", "id", "größe", 'say "hi"', "ok", "nested", "価格", "a/b~c"]


@dataclass
class Report:
    """What came of a run; `failures` have schema, text and finish reason."""

    count: int
    valid: int = 0
    seconds: float = 0.0
    tokens: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)


class SchemaMaker:
    """Draws schemas whose instances have an end: strings, arrays and the digits of numbers are bounded."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def schema(self) -> dict[str, Any]:
        """Return a schema whose root is an object."""
        root = self._object(0)
        if self._rng.random() < 0.3:
            root["$defs"] = {"part": self._value(2)}
            root["properties"]["part"] = {"$ref": "#/$defs/part"}
            root["required"] = [*root["required"], "part"]
        if self._rng.random() < 0.2:  # a list that refers to itself, of limited length
            link = {
                "type": "object",
                "properties": {"v": {"type": "integer", "minimum": 0, "maximum": 9}},
                "additionalProperties": False,
            }
            link["properties"]["rest"] = {"type": "array", "items": {"$ref": "#/$defs/link"}, "maxItems": 1}
            root.setdefault("$defs", {})["link"] = link
            root["properties"]["link"] = {"$ref": "#/$defs/link"}
        return root

    def _value(self, depth: int) -> dict[str, Any]:
        kinds = [self._string, self._number, self._choice, lambda _: {"type": "boolean"}, lambda _: {"type": "null"}]
        if depth < 3:
            kinds += [self._object, self._array, self._any_of]
        return self._rng.choice(kinds)(depth)

    def _object(self, depth: int) -> dict[str, Any]:
        rng = self._rng
        names = rng.sample(NAMES, rng.randint(1, 4))
        required = [name for name in names if rng.random() < 0.8]
        out = {"type": "object", "properties": {name: self._value(depth + 1) for name in names}, "required": required}
        return out | {"additionalProperties": False}

    def _array(self, depth: int) -> dict[str, Any]:
        low = self._rng.randint(0, 2)
        return {
            "type": "array",
            "items": self._value(depth + 1),
            "minItems": low,
            "maxItems": low + self._rng.randint(0, 2),
        }

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._value(depth + 1) for _ in range(self._rng.randint(2, 3))]}

    def _string(self, _: int) -> dict[str, Any]:
        rng = self._rng
        return rng.choice(
            [
                {"type": "string", "maxLength": rng.randint(1, 24)},
                {"type": "string", "minLength": 2, "maxLength": 8},
                {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
                {"type": "string", "pattern": "^(red|green|blue){1,2}$"},
                {"type": "string", "format": "date"},
                {"type": "string", "format": "uuid"},
                {"type": "string", "format": "ipv4"},
            ]
        )

    def _number(self, _: int) -> dict[str, Any]:
        rng = self._rng
        low = rng.randint(-50, 50)
        return rng.choice(
            [
                {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)},
                {"type": "number", "minimum": low, "maximum": low + 1, "multipleOf": 0.25},
                {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
            ]
        )

    def _choice(self, _: int) -> dict[str, Any]:
        return self._rng.choice([{"enum": ["a", "ü", 1, None, True]}, {"const": "only"}, {"enum": [1.5, -2]}])


async def ask(
    engine: LocalEngine, model: TextChatModel, index: int, schema: dict[str, Any], seed: int
) -> tuple[str, str, int]:
    """Return text, finish reason and number of tokens of one answer."""
    request = GenerationRequest(
        request_id=f"schema-{index}",
        model=model.model_id,
        messages=(ChatMessage(role="user", content=f"Answer with JSON for the schema {json.dumps(schema)[:400]}"),),
        sampling=SamplingParams(
            temperature=1.0,
            seed=seed,
            max_tokens=1500,
            grammar=GrammarSpec(kind="json_schema", source=json.dumps(schema)),
        ),
    )
    prepared = model.prepare(request)
    decoder = model.decoder(prepared, 0)
    text, reason, tokens = "", "", 0
    async for delta in engine.stream(prepared.engine_requests[0]):
        tokens += len(delta.token_ids)
        if delta.error is not None:
            return delta.error.message, "error", tokens
        out = decoder.push(delta)
        if out is not None:
            text, reason = text + out.text, out.finish_reason or reason
    return text, reason, tokens


async def run(path: Path, count: int, seed: int) -> Report:
    """Run `count` schemas."""
    sys.setrecursionlimit(20_000)  # the validator recurses into chains of links
    model = load_chat_model(path, "model", 4096)
    maker = SchemaMaker(seed)
    schemas = [maker.schema() for _ in range(count)]
    report = Report(count)
    engine = LocalEngine(
        build_engine(EngineConfig(model=str(path), model_id="model", limits=Limits(n_ctx=4096, parallel=16)))
    )
    slots = asyncio.Semaphore(16)

    async def one(index: int) -> None:
        async with slots:
            text, reason, tokens = await ask(engine, model, index, schemas[index], seed + index)
        report.tokens += tokens
        if reason == "stop" and _valid(schemas[index], text):
            report.valid += 1
        else:
            report.failures.append({"schema": schemas[index], "text": text, "reason": reason})

    start = time.perf_counter()
    try:
        await asyncio.gather(*(one(index) for index in range(count)))
    finally:
        await engine.close()
    report.seconds = time.perf_counter() - start
    return report


def _valid(schema: dict[str, Any], text: str) -> bool:
    try:
        return Draft202012Validator(schema).is_valid(json.loads(text))
    except ValueError:
        return False


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = asyncio.run(run(options.model, options.count, options.seed))
    print(f"{report.valid} of {report.count} valid, {report.tokens} tokens in {report.seconds:.1f} s")
    for failure in report.failures[:5]:
        print(failure["reason"], failure["text"][:300], json.dumps(failure["schema"])[:300])
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=1))


if __name__ == "__main__":
    main()
