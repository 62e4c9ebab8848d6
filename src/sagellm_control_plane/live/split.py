"""One sequence on two engines: the prompt is computed on one, the tokens are drawn on the other.

After Splitwise (Patel et al., ISCA 2024) and DistServe (Zhong et al., OSDI 2024), with the blocks handed over as cached prefix
(design note 0013): whatever fails on the way, the second engine computes what it lacks, and the tokens are the same.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from sagellm_protocol.deltas import join_deltas
from sagellm_protocol.engine import EngineRequest, TokenDelta
from sagellm_protocol.errors import SageError
from sagellm_protocol.handover import KVExportRequest
from sagellm_protocol.ports import EngineClient, KVTransferClient

__all__ = ["SplitStats", "split_stream"]

_log = logging.getLogger(__name__)


class SplitStats:
    """What hand-overs did and cost, over all sequences.

    Attributes:
        transfers: that arrived.
        blocks, bytes, seconds: of those.
        fallbacks: sequences that went on without: the second engine computed the prompt again.
    """

    def __init__(self) -> None:
        self.transfers = 0
        self.blocks = 0
        self.bytes = 0
        self.seconds = 0.0
        self.fallbacks = 0


async def split_stream(
    prefill: EngineClient, decode: EngineClient, request: EngineRequest, stats: SplitStats
) -> AsyncGenerator[TokenDelta, None]:
    """Run `request`: its first token on `prefill`, the rest on `decode`. Closing the generator aborts it wherever it is.

    Raises:
        SageError: as `EngineClient.stream` of `decode` does. If `prefill` fails before the first token, `decode` does everything.
    """
    try:
        first = await _first_token(prefill, request)
    except SageError as error:
        _log.info("prefill on %s failed, going on unsplit: %s", prefill.engine_id, error.message)
        stats.fallbacks += 1
        first = None
    if first is None:
        async with aclosing(decode.stream(request)) as whole:
            async for delta in whole:
                yield delta
        return
    yield first
    if first.finish_reason is not None:
        return
    await _hand_over(prefill, decode, request, stats)
    rest = msgspec.structs.replace(
        request,
        emitted_token_ids=request.emitted_token_ids + first.token_ids,
        sampling=msgspec.structs.replace(request.sampling, prompt_logprobs=None),
    )
    async with aclosing(decode.stream(rest)) as deltas:
        async for delta in deltas:
            yield msgspec.structs.replace(delta, prompt_tokens=None) if delta.prompt_tokens is not None else delta


async def _first_token(prefill: EngineClient, request: EngineRequest) -> TokenDelta | None:
    """Return the first token as one delta, finished only if the sequence is; None if there was none."""
    done = len(request.emitted_token_ids)
    sampling = msgspec.structs.replace(
        request.sampling, max_tokens=done + 1, min_tokens=min(request.sampling.min_tokens, done + 1)
    )
    only_one = msgspec.structs.replace(request, sampling=sampling)
    async with aclosing(prefill.stream(only_one)) as deltas:
        seen = [delta async for delta in deltas]
    if not seen:
        return None
    last = seen[-1]
    if last.error is not None:
        raise SageError.from_wire(last.error)
    if last.finish_reason == "cancelled":
        return None
    joined = join_deltas(seen)
    limit = request.sampling.max_tokens
    goes_on = last.finish_reason == "length" and (limit is None or done + 1 < limit)
    return msgspec.structs.replace(joined, finish_reason=None) if goes_on else joined


async def _hand_over(prefill: EngineClient, decode: EngineClient, request: EngineRequest, stats: SplitStats) -> None:
    if not (isinstance(prefill, KVTransferClient) and isinstance(decode, KVTransferClient)):
        stats.fallbacks += 1
        return
    wanted = KVExportRequest(
        token_ids=request.prompt_token_ids + request.emitted_token_ids,
        adapter=request.adapter,
        cache_salt=request.cache_salt,
    )
    try:
        ticket = await prefill.export_kv(wanted)
    except SageError as error:
        _give_up(error, stats)
        return
    try:
        imported = await decode.import_kv(ticket)
    except SageError as error:
        _give_up(error, stats)
        try:
            await prefill.discard_kv(ticket.name)
        except SageError:
            return  # the engine is gone, and takes the file along
        return
    stats.transfers += 1
    stats.blocks += imported.stored
    stats.bytes += imported.stored * ticket.block_bytes
    stats.seconds += imported.seconds


def _give_up(error: SageError, stats: SplitStats) -> None:
    _log.info("KV hand-over failed, the prompt is computed again: %s", error.message)
    stats.fallbacks += 1
