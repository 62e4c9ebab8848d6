"""lm-eval over HTTP against the engine in this process: the same scores, by log-likelihood and by generation."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sagellm import compose
from sagellm_protocol.generation import ChatMessage, ChoiceDelta, GenerationRequest, GenerationStart
from sagellm_protocol.sampling import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
MODEL = "smollm2:135m"
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
    "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Ireland": "Dublin",
    "Cuba": "Havana", "Kenya": "Nairobi", "Peru": "Lima", "Turkey": "Ankara",
}  # fmt: skip


def choice(question: str, right: str, wrong: list[str]) -> dict[str, Any]:
    choices = sorted({right, *wrong})
    return {"q": question, "choices": choices, "answer": choices.index(right)}


CITIES = list(CAPITALS.values())
CHOICES = [
    *(
        choice(f"The capital of {land} is", city, [CITIES[(k + step) % len(CITIES)] for step in (3, 7, 11)])
        for k, (land, city) in enumerate(CAPITALS.items())
    ),
    *(
        choice(f"{a} + {b} =", str(a + b), [str(a + b + off) for off in (-10, 1, 10)])
        for a, b in ((17, 25), (38, 46), (52, 29), (64, 18), (73, 19), (81, 57), (36, 36), (47, 95), (28, 67), (59, 13))
    ),
]
EXAMPLES = "Capital of Canada: Ottawa\nCapital of India: New Delhi\n"
ANSWERS = [{"q": f"{EXAMPLES}Capital of {land}:", "a": city} for land, city in CAPITALS.items()]
TASKS = {
    "choices": """\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.json}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
""",
    "answers": """\
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/answers.json}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: a
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 8, temperature: 0}}
filter_list: [{{name: strip, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match, ignore_case: true, ignore_punctuation: true}}]
""",
}


@pytest.fixture(scope="module")
def over_http(
    start_server: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    python_with: Callable[[str, list[str]], Path],
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("choices", CHOICES), ("answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(TASKS[name].format(folder=folder))
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    server = start_server(MODEL)
    done = subprocess.run(
        [
            python_with("lm-eval", ["lm_eval[api]"]),
            HERE / "checks" / "lm_eval_python.py",
            server.root_url,
            MODEL,
            folder,
        ],
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    server.stop()
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class InProcess:
    """The same sums, straight from the engine of this process."""

    def __init__(self, house: compose.House) -> None:
        self.manager = house.manager
        self.text = house.manager.chat_model(MODEL)
        self.numbers = itertools.count()

    async def loglikelihood(self, context: str, continuation: str) -> float:
        """Return ln P(continuation | context); tokens as lm-eval cuts them."""
        whole = self.text.tokenize(context + continuation, add_special_tokens=False)
        start = len(self.text.tokenize(context, add_special_tokens=False))
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, ignore_eos=True)
        request = GenerationRequest(
            request_id=f"r{next(self.numbers)}", model=MODEL, prompt=tuple(whole), sampling=sampling
        )
        (first,) = [e async for e in self.manager.generate(request) if isinstance(e, GenerationStart)]
        assert first.prompt_logprobs is not None
        return sum(entry.logprob for entry in first.prompt_logprobs[start:] if entry is not None)

    async def text_of(self, **content: Any) -> str:
        sampling = SamplingParams(max_tokens=8, temperature=0.0, stop=content.pop("stop"))
        request = GenerationRequest(request_id=f"r{next(self.numbers)}", model=MODEL, sampling=sampling, **content)
        events = self.manager.generate(request)
        return "".join([e.text async for e in events if isinstance(e, ChoiceDelta)])


async def scores(stops: tuple[str, ...]) -> dict[str, Any]:
    house = await compose.start_embedded(MODEL)
    try:
        engine = InProcess(house)
        likely = []
        for row in CHOICES:
            likely.append([await engine.loglikelihood(row["q"], f" {choice}") for choice in row["choices"]])
        completed = [await engine.text_of(prompt=r["q"], stop=stops) for r in ANSWERS]
        answered = [
            await engine.text_of(messages=(ChatMessage(role="user", content=r["q"]),), stop=stops) for r in ANSWERS
        ]
    finally:
        await house.close()
    right = [row.index(max(row)) == r["answer"] for row, r in zip(likely, CHOICES, strict=True)]
    return {
        "acc": sum(right) / len(right),
        "loglikelihoods": likely,
        "completed": matched(completed),
        "answered": matched(answered),
    }


def matched(texts: list[str]) -> dict[str, Any]:
    right = [text.strip().lower() == r["a"].lower() for text, r in zip(texts, ANSWERS, strict=True)]
    return {"exact_match": sum(right) / len(right), "texts": texts}


def test_scores_are_those_of_the_engine(over_http: dict[str, Any]) -> None:
    """Accuracy, every log-likelihood and every generated text are the same through lm-eval's HTTP clients as in process."""
    own = asyncio.run(scores(("\n", ".", "<|im_end|>")))
    assert over_http["acc"] == pytest.approx(own["acc"], abs=1e-3)
    assert 0.25 < own["acc"] < 1  # above chance, so that equal means something
    flat = [value for row in over_http["loglikelihoods"] for value in row]
    assert flat == pytest.approx([value for row in own["loglikelihoods"] for value in row], abs=1e-3)
    for name in ("completed", "answered"):
        assert [text.strip() for text in over_http[name]["texts"]] == [text.strip() for text in own[name]["texts"]]
    assert over_http["completed"]["exact_match"] == pytest.approx(own["completed"]["exact_match"], abs=1e-3)
    assert over_http["answered"]["exact_match"] == pytest.approx(own["answered"]["exact_match"], abs=1e-3)
