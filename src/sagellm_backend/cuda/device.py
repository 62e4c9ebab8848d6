"""Which GPU a thread works on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from sagellm_backend.cuda.settings import CudaSettings

__all__ = ["on_device"]


def on_device(settings: CudaSettings) -> AbstractContextManager[object]:
    """Work on the settings' device: it is a property of the thread, and the thread that steps need not be the one that loaded.

    Kernels, streams and events are made for the thread's device, whichever tensors they are given.
    """
    if not settings.on_gpu:
        return nullcontext()
    chosen: AbstractContextManager[object] = torch.cuda.device(settings.device)
    return chosen
