"""Programmatic dependent launch (compute capability 9.0): a kernel begins while the one before it ends.

A kernel that was launched so may read, before `await_before`, only what no kernel of the step writes (weights), and must not
write anything. Both instructions do nothing in a kernel that was launched as usual.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["await_before", "release_next"]


@triton.jit
def await_before():
    """Wait until all that the kernels before wrote can be seen."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def release_next():
    """Let the next kernel begin as soon as all programs of this one run."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip
