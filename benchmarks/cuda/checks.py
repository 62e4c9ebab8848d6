"""Whether the results are right on this GPU: the kit, each operation, real models, fixed bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sagellm_backend.base import BLOCK_SIZE, LoadOptions, StepBatch
from sagellm_backend.conformance import CHECKS, Kit, SequenceRun
from sagellm_backend.cuda import CudaBackend
from sagellm_backend.cuda.matrix import Matrix, to_fp8, to_q4, to_q8
from sagellm_backend.cuda.ops import AttentionShape, Rotation, TorchOps
from sagellm_backend.cuda.plan import DeviceStep, plan_step, upload
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.cuda.triton_ops import TritonOps
from sagellm_backend.cuda.weights import Projection
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.sampling import log_softmax

Row = dict[str, object]
MOST_ERROR = 1e-2


def kit_rows(settings: CudaSettings) -> list[Row]:
    """Every check in float32, in bfloat16, and bitwise in batch-invariant mode."""
    kits = {
        "f32": Kit(CudaBackend(replace(settings, dtype="f32")), tolerance=2e-3, format_tolerance=2e-3),
        "bf16": Kit(CudaBackend(replace(settings, dtype="bf16")), tolerance=0.2, format_tolerance=0.2),
        "bf16, batch-invariant": Kit(
            CudaBackend(replace(settings, dtype="bf16", invariant=True)), tolerance=0.2, format_tolerance=0.2
        ),
    }
    out: list[Row] = []
    for name, kit in kits.items():
        failed = [text for text in (_failure(check, kit) for check in CHECKS) if text]
        out.append(
            {
                "work": f"conformance kit, {name}",
                "value": f"{len(CHECKS) - len(failed)} of {len(CHECKS)}",
                "ok": not failed,
            }
        )
        out += [{"work": f"  {name}", "value": text[:400], "ok": False} for text in failed]
    return out


def _failure(check: Callable[[Kit], None], kit: Kit) -> str:
    try:
        check(kit)
    except Exception as error:  # noqa: BLE001  one check's failure must not hide the others' results
        return f"{check.__name__}: {type(error).__name__}: {error}"
    return ""


def op_rows(device: str) -> list[Row]:
    """‖out − ref‖ / ‖ref‖ of each operation in bf16 against the same in float32 torch."""
    exact, ours = TorchOps(torch.float32), TritonOps(torch.bfloat16, 4)
    fixed = TritonOps(torch.bfloat16, 4, invariant=True)
    out: list[Row] = []

    def add(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        error = float((got.double() - want.double()).norm() / want.double().norm())
        out.append({"work": f"error of {name}", "value": f"{error:.2e}", "ok": error < MOST_ERROR})

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    for rows in (1, 16, 200):
        x, branch, weight = torch.randn(rows, 4096, device=device), normal(rows, 4096), torch.rand(4096, device=device)
        want = exact.residual_norm(x.clone(), branch.float(), None, weight, 1e-5, 1.0)
        add(f"residual norm, {rows} rows", ours.residual_norm(x.clone(), branch, None, weight, 1e-5, 1.0)[1], want[1])
        gate_up = normal(rows, 8192)
        for kind in ("silu", "gelu_tanh", "gelu"):
            add(f"{kind}, {rows} rows", ours.activate(gate_up, kind), exact.activate(gate_up.float(), kind))
        a, w = normal(rows, 4096), torch.randn(6144, 4096, device=device) / 64
        for kind, matrix in {
            "dense": Matrix("dense", w.bfloat16()),
            "q8": to_q8(w),
            "q4": to_q4(w),
            "fp8": to_fp8(w),
        }.items():
            if kind == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
                continue
            want_product = exact.matmul(a.float(), matrix, exact=True)
            projection = Projection((matrix,), (("0.o", 6144),))
            add(f"product with {kind}, {rows} rows", ours.linear(a, projection), want_product)
            add(f"product with {kind}, {rows} rows, fixed tiles", fixed.linear(a, projection), want_product)
        stack = Matrix("dense", torch.stack([w[:512].bfloat16() * (i + 1) for i in range(8)]))
        chosen = torch.randint(0, 8, (rows * 2,), device=device)
        source = torch.arange(rows * 2, device=device) // 2
        want_group = exact.grouped(a.float(), stack, exact.routes(source, chosen, 8))
        add(f"grouped product, {rows} rows", ours.grouped(a, stack, ours.routes(source, chosen, 8)), want_group)
    out += _attention_rows(device, exact, (("", ours), (", fixed spans", fixed)))
    return out


def _attention_rows(device: str, exact: TorchOps, variants: tuple[tuple[str, TritonOps], ...]) -> list[Row]:
    out: list[Row] = []
    for lengths, starts in (([1] * 4, [5, 300, 1023, 2000]), ([200, 1, 77], [0, 900, 513])):
        for window, cap in ((0, 0.0), (256, 30.0)):
            shape = AttentionShape(16, 4, 128, 1 / math.sqrt(128), window, cap)
            cache = torch.randn(512, 2, 4, BLOCK_SIZE, 128, device=device).bfloat16()
            qkv = torch.randn(sum(lengths), 24 * 128, device=device).bfloat16()
            weights = (torch.rand(128, device=device), torch.rand(128, device=device))
            angles = torch.randn(sum(lengths), 64, device=device)
            rotation = Rotation(angles.cos(), angles.sin(), interleaved=False)
            base = cache.float()
            want_q = exact.rotate_and_store(
                qkv.float(), _step(lengths, starts, exact, device), rotation, base, shape, weights, 1e-5
            )
            want = exact.attend(want_q, _step(lengths, starts, exact, device), base, shape)
            for suffix, ops in variants:
                mine = cache.clone()
                step = _step(lengths, starts, ops, device)
                q = ops.rotate_and_store(qkv, step, rotation, mine, shape, weights, 1e-5)
                error = float((mine.double() - base.double()).norm() / base.double().norm())
                name = f"{lengths} rows at {starts}, window {window}, cap {cap:g}{suffix}"
                out.append(
                    {"work": f"error of rotation and store, {name}", "value": f"{error:.2e}", "ok": error < MOST_ERROR}
                )
                got = ops.attend(q, step, mine, shape)
                error = float((got.double() - want.double()).norm() / want.double().norm())
                out.append({"work": f"error of attention, {name}", "value": f"{error:.2e}", "ok": error < MOST_ERROR})
    return out


def _step(lengths: list[int], starts: list[int], ops: TorchOps, device: str) -> DeviceStep:
    width = max(-(-(a + b) // BLOCK_SIZE) for a, b in zip(lengths, starts, strict=True))
    batch = StepBatch(
        token_ids=np.zeros(sum(lengths), np.int32),
        starts=np.array(starts, np.int32),
        lengths=np.array(lengths, np.int32),
        block_tables=np.arange(len(lengths) * width, dtype=np.int32).reshape(-1, width),
        logit_rows=np.zeros(0, np.int32),
        sampling=[],
    )
    return upload(plan_step(batch, ops.short_rows, ops.long_rows), device)


def quality_rows(settings: CudaSettings, models: list[Path]) -> list[Row]:
    """Top-1 agreement and KL against the float32 reference on the same weights, over a text's worth of positions."""
    from sagellm_core.loader import open_model
    from sagellm_core.text.load import load_tokenizer

    text = Path(__file__).with_name("text.txt").read_text(encoding="utf-8")
    out: list[Row] = []
    for path in models:
        ids = load_tokenizer(str(path)).encode(text)[:192]
        with open_model(path) as files:
            options = LoadOptions(n_blocks=16, max_rows=256, max_logit_rows=256)
            runs = [
                SequenceRun(b.load(files.spec, files.weights, options), range(16))
                for b in (ReferenceBackend(), CudaBackend(settings))
            ]
        agree, kl = 0, 0.0
        for token in ids:
            want, got = (log_softmax(run.feed([token])) for run in runs)
            agree += int(want.argmax() == got.argmax())
            kl += float((np.exp(want.astype(np.float64)) * (want.astype(np.float64) - got)).sum())
        share, mean = agree / len(ids), kl / len(ids)
        runs[1].runner.close()
        out.append(
            {
                "work": f"{path.name}: top-1 agreement, mean KL over {len(ids)} positions",
                "value": f"{share:.1%}, {mean:.2e}",
                "ok": share > 0.95 and mean < 0.02,
            }
        )
    return out
