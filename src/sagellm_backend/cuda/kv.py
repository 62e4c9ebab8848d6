"""The paged KV cache on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sagellm_backend.base import BLOCK_SIZE
from sagellm_backend.spec import DecoderSpec

__all__ = ["CudaKV"]


class CudaKV:
    """Keys and values, (n_blocks + 1, layers, 2, kv_heads, BLOCK_SIZE, head_dim): a block is contiguous, and so is a head in it.

    The last block is nobody's: rows that only fill a CUDA graph's batch write there.
    """

    def __init__(self, spec: DecoderSpec, n_blocks: int, dtype: torch.dtype, device: str) -> None:
        shape = (n_blocks + 1, spec.n_layers, 2, spec.n_kv_heads, BLOCK_SIZE, spec.head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self._n_blocks = n_blocks
        self._block_bytes = int(self.data[0].numel() * self.data.element_size())

    @property
    def n_blocks(self) -> int:
        """Blocks that it holds."""
        return self._n_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers, K and V."""
        return self._block_bytes

    @property
    def spare(self) -> int:
        """Number of the block that is nobody's."""
        return self._n_blocks

    def close(self) -> None:
        """Free the memory; sizes stay known."""
        self.data = self.data[:0].clone()

    def layer(self, layer: int) -> torch.Tensor:
        """View (n_blocks + 1, 2, kv_heads, BLOCK_SIZE, head_dim)."""
        return self.data[:, layer]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) pairs, in order.

        Raises:
            ValueError: a block number is out of range; nothing is copied then.
        """
        self._check([block for pair in pairs for block in pair])
        for source, destination in pairs:
            self.data[destination].copy_(self.data[source])

    def export_blocks(self, blocks: Sequence[int]) -> bytes:
        """Return the blocks' content, `block_bytes` each; waits for the steps before.

        Raises:
            ValueError: a block number is out of range.
        """
        self._check(blocks)
        # Block by block into pinned memory: gathered on the device they would need room there that nobody planned.
        host = self._host(len(blocks))
        for place, block in zip(host, blocks, strict=True):
            place.copy_(self.data[block], non_blocking=True)
        self._wait()
        return bytes(host.view(torch.uint8).numpy().data)

    def import_blocks(self, blocks: Sequence[int], data: bytes | memoryview) -> None:
        """Fill blocks with exported content.

        Raises:
            ValueError: `data` is not ``len(blocks) * block_bytes`` long, or a block number is out of range.
        """
        self._check(blocks)
        view = memoryview(data).cast("B")
        if view.nbytes != len(blocks) * self._block_bytes:
            raise ValueError(f"{view.nbytes} bytes for {len(blocks)} blocks of {self._block_bytes} bytes")
        if not blocks:
            return
        host = self._host(len(blocks))
        host.view(torch.uint8).view(-1).numpy()[:] = np.frombuffer(view, np.uint8)
        for place, block in zip(host, blocks, strict=True):
            self.data[block].copy_(place, non_blocking=True)
        self._wait()

    def _host(self, n_blocks: int) -> torch.Tensor:
        """Room for blocks on the host, pinned for a GPU."""
        return torch.empty((n_blocks, *self.data.shape[1:]), dtype=self.data.dtype, pin_memory=self.data.is_cuda)

    def _wait(self) -> None:
        if self.data.is_cuda:
            torch.cuda.current_stream(self.data.device).synchronize()

    def _check(self, blocks: Sequence[int]) -> None:
        if not self.data.shape[0]:
            raise RuntimeError("the runner is closed: its cache is gone")
        for block in blocks:
            if not 0 <= block < self._n_blocks:
                raise ValueError(f"block {block} is out of range: the cache has 0 to {self._n_blocks - 1}")
