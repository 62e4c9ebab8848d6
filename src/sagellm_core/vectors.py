"""From pooled hidden states to what a client gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.embedding import EmbedRequest, EmbedResult
from sagellm_protocol.errors import InvalidArgumentError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Float32 = npt.NDArray[np.float32]

__all__ = ["check_dimensions", "embed_result"]


def check_dimensions(request: EmbedRequest, width: int) -> None:
    """Check that a model of `width` numbers a vector can give what is asked for.

    Raises:
        InvalidArgumentError: more dimensions than the model has, or dimensions of something that is no embedding.
    """
    if request.dimensions is None:
        return
    if request.task != "embed":
        raise InvalidArgumentError("dimensions belong to embeddings: leave them out", param="dimensions")
    if request.dimensions > width:
        raise InvalidArgumentError(
            f"dimensions is {request.dimensions}, the model's vectors have {width}: ask for at most that",
            param="dimensions",
        )


def embed_result(request: EmbedRequest, vectors: Float32, *, normalize: bool) -> EmbedResult:
    """Cut to the wanted dimensions, scale to length 1 if wanted (`normalize` is the model's default), and pack."""
    import numpy as np

    if request.task == "embed":
        vectors = vectors[:, : request.dimensions]
        if normalize if request.normalize is None else request.normalize:
            length = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.maximum(length, np.finfo(np.float32).tiny)
    return EmbedResult(
        request_id=request.request_id,
        width=vectors.shape[1],
        data=np.ascontiguousarray(vectors, dtype="<f4").tobytes(),
        prompt_tokens=sum(len(ids) for ids in request.inputs),
    )
