"""The model store as the gateway's `ModelLibrary`: what Ollama's tags, pull, delete and copy act on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from sagellm import store
from sagellm_gateway.library import LibraryModel, PullProgress

__all__ = ["StoreLibrary"]


class StoreLibrary:
    """Models on disk; calls that block run in a thread."""

    def models(self) -> Sequence[LibraryModel]:
        """Return what is on disk."""
        return [_row(model) for model in store.installed()]

    async def pull(self, name: str) -> AsyncIterator[PullProgress]:
        """Fetch a model; the last item has the status ``success``.

        Raises:
            ModelNotFoundError: no source has it.
        """
        from sagellm.store.pull import pull

        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[PullProgress] = asyncio.Queue()

        def report(what: str, done: int, total: int) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, PullProgress(status=what, total=total, completed=done))

        # Only names of the catalogue: a request must not read files of this machine.
        catalogued = str(store.ModelName.parse(name))
        fetching = asyncio.create_task(asyncio.to_thread(pull, catalogued, progress=report))
        while not (fetching.done() and steps.empty()):
            with contextlib.suppress(asyncio.TimeoutError):
                yield await asyncio.wait_for(steps.get(), 0.2)
        await fetching
        yield PullProgress(status="success")

    async def delete(self, name: str) -> None:
        """Remove a model from disk.

        Raises:
            ModelNotFoundError: it is not there.
        """
        await asyncio.to_thread(store.remove, name)

    async def copy(self, source: str, destination: str) -> None:
        """Give a model a second name.

        Raises:
            ModelNotFoundError: `source` is not there.
        """
        await asyncio.to_thread(store.copy, source, destination)


def _row(model: store.StoredModel) -> LibraryModel:
    files = model.manifest.get("files", {})
    weights = max(files.values(), key=lambda facts: int(facts["size"]), default={"sha256": ""})
    return LibraryModel(
        name=model.name,
        size=model.size_bytes,
        digest=str(weights["sha256"]),
        modified_at=float(model.manifest.get("pulled_at", 0)),
        details={"format": "gguf" if model.path.suffix == ".gguf" else "safetensors"},
    )
