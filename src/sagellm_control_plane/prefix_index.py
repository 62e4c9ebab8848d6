"""Which engine holds which prompt prefix.

A block's key is its name by content (`sagellm_protocol.prefix`): a hash chained with its predecessor's, so that one key stands for a whole prefix and the
blocks that an engine holds of a prompt are (nearly) always a prefix of the prompt's chain: depth is found by binary search.
Two feeds: what was routed where (`record`, approximate) and an engine's own block events (`apply`, exact).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

__all__ = ["PrefixIndex"]


class PrefixIndex:
    """Block keys -> engines, and for each engine its blocks in the order of last use."""

    def __init__(self) -> None:
        # Most blocks are held by one engine: its name alone takes a fifth of the memory of a dict with one key.
        self._holders: dict[bytes, str | dict[str, None]] = {}
        self._blocks: dict[str, OrderedDict[bytes, None]] = {}
        self._sequence: dict[str, int] = {}
        self._capacity: dict[str, int] = {}

    def set_capacity(self, engine_id: str, blocks: int) -> None:
        """Bound what is remembered of an engine to what it can hold."""
        self._capacity[engine_id] = max(blocks, 1)
        self._blocks.setdefault(engine_id, OrderedDict())

    def drop_engine(self, engine_id: str) -> None:
        """Forget an engine: it left, or it lost its memory."""
        for key in self._blocks.pop(engine_id, ()):
            self._unlink(engine_id, key)
        self._sequence.pop(engine_id, None)
        self._capacity.pop(engine_id, None)

    def clear_engine(self, engine_id: str) -> None:
        """Forget an engine's blocks and keep its capacity (it restarted)."""
        capacity = self._capacity.get(engine_id)
        self.drop_engine(engine_id)
        if capacity is not None:
            self.set_capacity(engine_id, capacity)

    def record(self, engine_id: str, blocks: Sequence[bytes]) -> None:
        """The engine was sent a prompt of these blocks: it will hold them, and evict the least recently used."""
        held = self._blocks.get(engine_id)
        if held is None:
            return
        holders = self._holders
        # Leaves first, so that the root ends up as the most recently used and is evicted last.
        for key in reversed(blocks):
            if key in held:
                held.move_to_end(key)
            else:
                held[key] = None
                of_key = holders.get(key)
                if of_key is None:
                    holders[key] = engine_id
                elif isinstance(of_key, dict):
                    of_key[engine_id] = None
                elif of_key != engine_id:
                    holders[key] = {of_key: None, engine_id: None}
        excess = len(held) - self._capacity[engine_id]
        for _ in range(excess):
            key, _none = held.popitem(last=False)
            self._unlink(engine_id, key)

    def depth(self, engine_id: str, blocks: Sequence[bytes]) -> int:
        """Leading blocks of the prompt that the engine holds."""
        held = self._blocks.get(engine_id)
        if not held or not blocks or blocks[0] not in held:
            return 0
        low, high = 1, len(blocks)
        while low < high:
            middle = (low + high + 1) // 2
            if blocks[middle - 1] in held:
                low = middle
            else:
                high = middle - 1
        return low

    def deepest(self, blocks: Sequence[bytes]) -> int:
        """Leading blocks of the prompt that any engine holds."""
        holders = self._holders
        if not blocks or blocks[0] not in holders:
            return 0
        low, high = 1, len(blocks)
        while low < high:
            middle = (low + high + 1) // 2
            if blocks[middle - 1] in holders:
                low = middle
            else:
                high = middle - 1
        return low

    def holders(self, blocks: Sequence[bytes], limit: int) -> list[str]:
        """Up to `limit` engines with the longest prefixes of the prompt, best first (halving the depth each round)."""
        depth = self.deepest(blocks)
        found: dict[str, None] = {}
        while depth > 0:
            of_key = self._holders[blocks[depth - 1]]
            for engine_id in (of_key,) if isinstance(of_key, str) else of_key:
                found[engine_id] = None
                if len(found) == limit:
                    return list(found)
            depth //= 2
        return list(found)

    def apply(
        self, engine_id: str, sequence: int, stored: Iterable[bytes], removed: Iterable[bytes], *, cleared: bool = False
    ) -> bool:
        """Take in an engine's own block event; the first one of an engine has the number 1.

        Returns:
            False when events before `sequence` are missing: the caller asks for a snapshot. Old events are ignored.
        """
        last = self._sequence.get(engine_id, 0)
        if sequence <= last:
            return True
        if sequence != last + 1:
            return False
        if cleared:
            self.snapshot(engine_id, sequence, ())
        self._sequence[engine_id] = sequence
        held = self._blocks.setdefault(engine_id, OrderedDict())
        for key in stored:
            held[key] = None
            held.move_to_end(key)
            self._link(engine_id, key)
        for key in removed:
            if key in held:
                del held[key]
                self._unlink(engine_id, key)
        return True

    def snapshot(self, engine_id: str, sequence: int, blocks: Iterable[bytes]) -> None:
        """Replace what is known of an engine by its own list, least recently used first."""
        for key in self._blocks.get(engine_id, ()):
            self._unlink(engine_id, key)
        held: OrderedDict[bytes, None] = OrderedDict()
        self._blocks[engine_id] = held
        for key in blocks:
            held[key] = None
            self._link(engine_id, key)
        self._sequence[engine_id] = sequence

    def size(self, engine_id: str) -> int:
        """Blocks that the engine is believed to hold."""
        return len(self._blocks.get(engine_id, ()))

    @property
    def keys(self) -> int:
        """Distinct blocks known; bounded by the sum of the capacities."""
        return len(self._holders)

    def _link(self, engine_id: str, key: bytes) -> None:
        of_key = self._holders.get(key)
        if of_key is None:
            self._holders[key] = engine_id
        elif isinstance(of_key, dict):
            of_key[engine_id] = None
        elif of_key != engine_id:
            self._holders[key] = {of_key: None, engine_id: None}

    def _unlink(self, engine_id: str, key: bytes) -> None:
        of_key = self._holders.get(key)
        if isinstance(of_key, dict):
            of_key.pop(engine_id, None)
            if len(of_key) == 1:
                self._holders[key] = next(iter(of_key))
        elif of_key == engine_id:
            del self._holders[key]
