"""Compile every kernel for a GPU that is not here, down to machine code: run by test_cuda_compile.py in a process of its own.

Launches are caught: what would run is compiled for ``sys.argv[1]`` (80, 90), and one JSON object a kernel is printed.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sagellm_backend.base import BLOCK_SIZE
from sagellm_backend.cuda.kernels import draw, vector
from sagellm_backend.cuda.kernels.row_attention import RowAttention
from sagellm_backend.cuda.matrix import Matrix, to_fp8, to_q4, to_q8
from sagellm_backend.cuda.ops import AttentionShape, Rotation
from sagellm_backend.cuda.plan import DeviceStep
from sagellm_backend.cuda.triton_ops import TritonOps
from sagellm_backend.cuda.weights import Projection

CHIP = int(sys.argv[1])
CHOSEN = sys.argv[2:]
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}
DONE: set[str] = set()


def compile_only(self: JITFunction, *args: object, grid: object, warmup: object, **keywords: object) -> None:
    """In the place of a launch."""
    names = [p.name for p in self.params]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in keywords.items() if k in names}
    options = {k: v for k, v in keywords.items() if k not in names}
    signature, constants, attributes = {}, {}, {}
    for index, p in enumerate(self.params):
        value = values[p.name]
        # Triton makes a constant of 1 itself, and notes what 16 divides, unless the kernel asks it not to.
        special = not p.do_not_specialize
        is_one = special and not isinstance(value, torch.Tensor) and value == 1
        if p.is_constexpr or value is None or is_one:
            signature[p.name], constants[p.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[p.name] = TYPES[value.dtype]
        else:
            signature[p.name] = "i32" if isinstance(value, int) else "fp32"
        divides = isinstance(value, int) and value % 16 == 0 and special and not p.is_constexpr
        if isinstance(value, torch.Tensor) or divides:
            attributes[(index,)] = [
                ["tt.divisibility", 16]
            ]  # as a launch would find: it lets loads be wide and pipelined
    key = f"{self.__name__}{signature}{constants}"
    if key in DONE:
        return
    DONE.add(key)
    compiled = triton.compile(
        ASTSource(self, signature, constants, attributes), target=GPUTarget("cuda", CHIP, 32), options=options
    )
    shown = {"kernel": self.__name__, "shared": compiled.metadata.shared, "cubin": len(compiled.asm["cubin"])}
    print(json.dumps(shown | {"fused_f64": compiled.asm["ptx"].count("fma.rn.f64")}), flush=True)  # noqa: T201  read by the test


def step(rows: int, tiles: int) -> DeviceStep:
    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    return DeviceStep(
        tokens=ints(rows),
        positions=ints(rows),
        slots=ints(rows),
        starts=ints(2),
        firsts=ints(2),
        lengths=ints(2),
        tables=ints(2, 200),
        short=ints(tiles, 2),
        long=ints(tiles, 2),
        logit_rows=ints(rows),
    )


def small(dtype: torch.dtype) -> None:
    """Norms, activations, rotation, embedding."""
    ops = TritonOps(dtype, 4)
    x, branch, weight = torch.randn(3, 4096), torch.randn(3, 4096).to(dtype), torch.ones(4096)
    ops.residual_norm(x, None, None, weight, 1e-5, 1.0)
    ops.residual_norm(x, branch, None, weight, 1e-5, 1.0)
    ops.residual_norm(x, branch, weight, None, 1e-5, 0.5)
    ops.norm(branch, weight, 1e-5)
    tokens = torch.zeros(3, dtype=torch.int32)
    ops.follow(tokens, tokens)
    ops.angles(tokens, torch.ones(64, dtype=torch.float64), 1.0)
    for kind in ("silu", "gelu_tanh", "gelu"):
        ops.activate(branch, kind)  # type: ignore[arg-type]
    cache = torch.zeros(8, 2, 4, BLOCK_SIZE, 128, dtype=dtype)
    shape = AttentionShape(16, 4, 128, 0.1, 0, 0.0)
    for interleaved, norms in ((False, None), (True, (weight[:128], weight[:128]))):
        rotation = Rotation(torch.zeros(3, 64), torch.zeros(3, 64), interleaved)
        ops.rotate_and_store(torch.zeros(3, 24 * 128, dtype=dtype), step(3, 1), rotation, cache, shape, norms, 1e-5)
    values = torch.randn(8, 64)
    for table in (Matrix("dense", values.to(dtype)), to_q8(values), to_q4(values)):
        ops.embed(table, torch.zeros(3, dtype=torch.int32), 1.0)


def products(dtype: torch.dtype, kind: str) -> None:
    """Products in every shape of tile, plain and grouped."""
    values = torch.randn(128, 128)
    makers = {"dense": lambda v: Matrix("dense", v.to(dtype)), "q8": to_q8, "q4": to_q4, "fp8": to_fp8}
    matrix = makers[kind](values)
    stack = makers[kind](values[None])
    for rows in (1, 100, 200):
        x = torch.zeros(rows, 128, dtype=dtype)
        ops = TritonOps(dtype, 4)
        ops.matmul(x, matrix, exact=True)
        if kind != "dense":
            ops.linear(x, Projection((matrix,), (("0.o", 128),), torch.zeros(128, dtype=dtype)))
        source = torch.arange(rows)
        ops.grouped(x, stack, ops.routes(source, torch.zeros_like(source), 1))
    TritonOps(dtype, 4, invariant=True).matmul(torch.zeros(1, 128, dtype=dtype), matrix)


def attend(dtype: torch.dtype) -> None:
    """Attention with split keys, without, and with fixed spans; windowed and capped."""
    for head_dim, group in ((128, 4), (64, 3), (256, 8)):
        cache = torch.zeros(8, 2, 2, BLOCK_SIZE, head_dim, dtype=dtype)
        q = torch.zeros(3, 2 * group, head_dim, dtype=dtype)
        for window, cap in ((0, 0.0), (100, 30.0)):
            shape = AttentionShape(2 * group, 2, head_dim, 0.1, window, cap)
            TritonOps(dtype, group).attend(q, step(3, 2), cache, shape)
            TritonOps(dtype, group, invariant=True).attend(q, step(3, 2), cache, shape)


def single(dtype: torch.dtype) -> None:
    """What decode steps of one sequence launch, in the shapes of a small and of a large model."""
    for d, heads, kv, d_ff, early in ((1024, 16, 8, 3072, False), (4096, 32, 8, 14336, CHIP >= 90)):
        x, gain, bias = torch.zeros(1, d), torch.zeros(d), torch.zeros(d, dtype=dtype)
        vector.product(x, torch.empty((heads + 2 * kv) * 128, d, dtype=dtype), dtype, gain=gain, eps=1e-5, early=early)
        attention = RowAttention(1, heads, kv, 128, x.device, early=early)
        cache, norms = torch.zeros(8, 2, kv, BLOCK_SIZE, 128, dtype=dtype), (gain[:128], gain[:128])
        rotation = Rotation(torch.zeros(1, 64), torch.zeros(1, 64), interleaved=early)
        qkv = torch.zeros(1, (heads + 2 * kv) * 128, dtype=dtype)
        inner, attended = torch.zeros(1, d_ff, dtype=dtype), torch.zeros(1, heads * 128, dtype=dtype)
        attention.attend(qkv, step(1, 1), rotation, cache, norms, 1e-5, scale=0.1, window=0, cap=0.0)
        attention.attend(qkv, step(1, 1), rotation, cache, None, 1e-5, scale=0.1, window=100, cap=30.0)
        vector.add_product(x, attended, torch.empty(d, heads * 128, dtype=dtype), 1.0, bias=bias, early=early)
        vector.gated_product(x, torch.empty(2 * d_ff, d, dtype=dtype), gain, "silu", dtype, eps=1e-5, early=early)
        vector.add_product(x, inner, torch.empty(d, d_ff, dtype=dtype), 1.0, early=early)
        vector.product(x, torch.empty(32000, d, dtype=dtype), torch.float32, gain=gain, eps=1e-5, early=early)


def draws() -> None:
    """Plain draws and masks."""
    z, ints = torch.randn(2, 3000), torch.zeros(2, dtype=torch.int64)
    best, scale = z.max(dim=1).values, torch.ones(2, dtype=torch.float64)
    draw.chunk_sums(z, best, scale)
    draw.pick_in_chunk(z, best, scale, ints, ints)
    draw.apply_masks(z, ints, torch.zeros(2, 94, dtype=torch.int32))


def main() -> None:
    """Compile what was chosen, or all."""
    JITFunction.run = compile_only
    jobs = {"draws": draws}
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)):
        jobs |= {f"small-{name}": lambda d=dtype: small(d), f"attend-{name}": lambda d=dtype: attend(d)}
        jobs |= {f"single-{name}": lambda d=dtype: single(d)}
        kinds = ("dense", "q8", "q4", "fp8") if CHIP >= 89 else ("dense", "q8", "q4")
        jobs |= {f"{kind}-{name}": lambda d=dtype, k=kind: products(d, k) for kind in kinds}
    for name in CHOSEN or jobs:
        jobs[name]()


if __name__ == "__main__":
    main()
