"""The paged KV cache on the device."""

from __future__ import annotations

from collections.abc import Sequence

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
        chosen = self.data[self._index(blocks)]
        return bytes(chosen.view(torch.uint8).cpu().numpy().data)

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
        content = torch.frombuffer(bytearray(view), dtype=torch.uint8).view(self.data.dtype)
        self.data[self._index(blocks)] = content.view(len(blocks), *self.data.shape[1:]).to(self.data.device)

    def _index(self, blocks: Sequence[int]) -> torch.Tensor:
        return torch.tensor([int(block) for block in blocks], dtype=torch.int64, device=self.data.device)

    def _check(self, blocks: Sequence[int]) -> None:
        if not self.data.shape[0]:
            raise RuntimeError("the runner is closed: its cache is gone")
        for block in blocks:
            if not 0 <= block < self._n_blocks:
                raise ValueError(f"block {block} is out of range: the cache has 0 to {self._n_blocks - 1}")
