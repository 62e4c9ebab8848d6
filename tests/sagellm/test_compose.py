"""The place where concrete parts meet."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagellm import compose


@pytest.mark.model
def test_a_context_for_several_models_is_that_of_the_chat_models(
    default_model_path: Path, minilm_model_path: Path
) -> None:
    """One --ctx for a house with an embedding model does not ask more of that than it was made for; for it alone it does."""
    changes = {"limits": {"n_ctx": 2048, "parallel": 4}}
    chat = compose.engine_config("smollm2:135m", changes, shared=True)
    embedding = compose.engine_config("minilm:l6", changes, shared=True)
    assert (chat.limits.n_ctx, chat.limits.parallel) == (2048, 4)
    assert (embedding.limits.n_ctx, embedding.limits.parallel) == (None, 4)
    assert compose.engine_config("minilm:l6", changes).limits.n_ctx == 2048
    assert compose.StoreCatalog([chat], changes).config("minilm:l6").limits.n_ctx is None
