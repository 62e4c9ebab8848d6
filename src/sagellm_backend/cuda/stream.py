"""Bytes of a mapped file to the device, through two pinned buffers: one is filled from the file while the other one travels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Uploader"]

CHUNK_BYTES = 64 << 20


class Uploader:
    """Copies arrays of bytes to `device`."""

    def __init__(self, device: str, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._device = device
        pin = device.startswith("cuda")
        self._chunk = chunk_bytes
        self._buffers = [torch.empty(chunk_bytes if pin else 0, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        self._sent: list[Any] = [torch.cuda.Event() if pin else None for _ in range(2)]
        self._pinned = pin
        self._turn = 0

    def upload(self, data: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Return the bytes on the device, uint8[data.size]; the copy may still be under way on the current stream."""
        if not self._pinned:
            return torch.from_numpy(np.array(data, np.uint8)).to(self._device)
        out = torch.empty(data.size, dtype=torch.uint8, device=self._device)
        for start in range(0, data.size, self._chunk):
            part = data[start : start + self._chunk]
            buffer, sent = self._buffers[self._turn], self._sent[self._turn]
            sent.synchronize()  # at once where nothing was sent yet
            buffer[: part.size].numpy()[:] = part
            out[start : start + part.size].copy_(buffer[: part.size], non_blocking=True)
            sent.record()
            self._turn ^= 1
        return out
