from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sagellm.bench import quality
from sagellm.bench.quality import QualityPath, measure_quality, shipped_text
from sagellm.cli.main import main
from sagellm_backend.base import LoadOptions, Runner
from sagellm_backend.conformance import SequenceRun
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.sampling import log_softmax
from sagellm_core.loader import open_model
from sagellm_protocol.errors import InvalidArgumentError

VOCAB = 96


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama with a vocabulary of single bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    d, f = 64, 96
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, d), "model.norm.weight": (d,)}
    for layer in range(2):
        names = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (d, d), "self_attn.v_proj": (d, d)}
        names |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        names |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()}
    header, parts, at = {}, [], 0
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype("<f4") * (0.5 if "embed" in name else 1.5 / np.sqrt(shape[-1]))
        data = (np.ones(shape, "<f4") if "norm" in name else array).astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
    config = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": d, "intermediate_size": f, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "rope_theta": 10000.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    vocab = {chr(32 + i): i for i in range(95)} | {"<unk>": 95}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


TEXT = "the quick brown fox jumps over the lazy dog; " * 40


def test_numbers_equal_their_definitions(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexity, KL, agreement and error equal what one computes from all log-probabilities, over windows and chunks."""
    monkeypatch.setattr(quality, "WINDOW", 96)
    report = measure_quality(tiny, [QualityPath("q4", backend="reference")], text=TEXT, max_tokens=250)
    assert report.n_tokens == 249

    def logprobs(quant: str) -> np.ndarray:
        with open_model(tiny) as files:
            options = LoadOptions(n_blocks=6)
            runner: Runner = ReferenceBackend().load(files.spec, files.weights, replace(options, quant=quant))
        ids = [ord(c) - 32 for c in TEXT[:250]]
        out = []
        for start in range(0, 249, 96):
            run = SequenceRun(runner, range(6))
            out += [log_softmax(run.feed([t])).astype(np.float64) for t in ids[start : min(start + 96, 249)]]
        return np.array(out)

    truth = np.array([ord(c) - 32 for c in TEXT[1:250]])
    want, got = logprobs("auto"), logprobs("q4")
    rows = np.arange(249)
    assert report.reference_perplexity == pytest.approx(np.exp(-want[rows, truth].mean()), rel=1e-5)
    (row,) = report.rows
    assert row.perplexity == pytest.approx(np.exp(-got[rows, truth].mean()), rel=1e-5)
    assert row.ratio == pytest.approx(row.perplexity / report.reference_perplexity)
    divergence = (np.exp(want) * (want - got)).sum(1)
    assert row.kl == pytest.approx(divergence.mean(), rel=1e-3)
    assert row.kl_worst == pytest.approx(np.quantile(divergence, 0.99), rel=1e-3)
    assert row.top1 == pytest.approx((got.argmax(1) == want.argmax(1)).mean())
    assert row.logprob_error == pytest.approx(np.abs(got[rows, truth] - want[rows, truth]).mean(), rel=1e-3)


def test_the_reference_against_itself_is_exact(tiny: Path) -> None:
    """The same path as the reference has divergence 0 and agrees everywhere; progress reaches the end."""
    seen: list[tuple[int, int]] = []
    report = measure_quality(
        tiny,
        [QualityPath(backend="reference")],
        text=TEXT,
        max_tokens=130,
        progress=lambda done, total: seen.append((done, total)),
    )
    (row,) = report.rows
    assert (row.kl, row.top1, row.ratio, row.logprob_error) == (0, 1, 1, 0)
    assert seen[-1] == (129, 129)
    assert "| reference auto |" in report.table()


def test_a_text_too_short_is_refused(tiny: Path) -> None:
    """A text of one token cannot be scored."""
    with pytest.raises(InvalidArgumentError, match="1 tokens"):
        measure_quality(tiny, [], text="a")


def test_the_command_prints_the_report(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`bench quality` judges the precisions that are asked for; an unknown one is refused by name."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["bench", "quality", str(tiny), "--backend", "reference", "--tokens", "40", "--text", str(text)]
    assert main([*command, "--quant", "q8", "--quant", "bf16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in report["rows"]] == ["reference q8", "reference bf16"]
    assert report["n_tokens"] == 39
    assert main([*command, "--quant", "q3"]) == 1
    assert "q3" in capsys.readouterr().err


def test_the_shipped_text_is_long() -> None:
    """The text that Python ships is more than 20,000 tokens of any vocabulary."""
    assert len(shipped_text()) > 200_000


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_quality_gate(default_model_path: Path) -> None:
    """On 20,000 tokens, q8 and bf16 stay within 1 % of float32's perplexity, 4-bit files within 3 %."""
    report = measure_quality(default_model_path, [QualityPath(), QualityPath("q8"), QualityPath("bf16")])
    limits = {"cpu auto": 0.03, "cpu q8": 0.01, "cpu bf16": 0.01}
    for row in report.rows:
        assert abs(row.ratio - 1) <= limits[row.label], report.table()
