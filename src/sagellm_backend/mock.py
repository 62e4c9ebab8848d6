"""A simulated device: KV blocks that hold token ids, a latency model, and text that depends on every cached token.

Nothing is faked around it: rows are written to blocks, and the next token is a pure function of the tokens that are read back
through the block table. A wrong block, a missed copy or a stale prefix changes the output, as it would with a real model.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sagellm_backend.adapter import Adapter, check_adapter
from sagellm_backend.base import (
    BLOCK_SIZE,
    Capability,
    LoadOptions,
    MemoryInfo,
    RowSampling,
    SequenceFailure,
    StepBatch,
    StepResult,
)
from sagellm_backend.checks import check_batch
from sagellm_backend.host import host_memory
from sagellm_backend.sampling import sample_rows
from sagellm_backend.spec import DecoderSpec, RopeSpec
from sagellm_backend.tensors import Weights
from sagellm_protocol.errors import EngineDiedError, SageError, UnsupportedError

__all__ = ["BYTE_VOCAB", "Latency", "MockBackend", "MockRunner", "Next", "NextToken", "WordSalad", "mock_spec"]

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

BYTE_VOCAB = 260
"""256 bytes, then bos, eos, im_start, im_end."""
EOS, IM_START, IM_END = 257, 258, 259

_PHRASES = (
    "a careful answer takes a little time",
    "bright windows look over the harbour",
    "children read quietly in the library",
    "day after day the engine counts its steps",
    "every letter finds its way home",
    "from the mountain one sees the whole valley",
    "green gardens grow beside the river",
    "here the road turns towards the village",
    "in winter the market opens late",
    "journeys begin with a small question",
    "light moves slowly over the paper",
    "many voices follow the same pattern",
    "night comes early between the hills",
    "one number is as good as another",
    "people often keep what they have written",
    "quiet work is seldom seen",
    "rain falls gently on the forest",
    "some stones are older than the town",
    "the teacher writes a line on the board",
    "under the bridge the water is deep",
    "when the signal changes everybody waits",
    "yellow leaves cover the narrow path",
)


def mock_spec(context_length: int = 8192) -> DecoderSpec:
    """Return the spec of the mock model: the byte vocabulary, and sizes that matter to nobody."""
    return DecoderSpec(
        architecture="mock",
        n_layers=1,
        d_model=32,
        n_heads=1,
        n_kv_heads=1,
        head_dim=32,
        d_ff=32,
        vocab_size=BYTE_VOCAB,
        context_length=context_length,
        norm_eps=1e-5,
        rope=RopeSpec(theta=10000.0, dim=32),
        attention_scale=1.0,
        tied_head=True,
    )


@dataclass(frozen=True, slots=True)
class Latency:
    """What a step costs, in seconds: `base` + `prefill_row` for each row of a chunk + `sequence` for each sequence."""

    base: float = 0.0
    prefill_row: float = 0.0
    sequence: float = 0.0

    def of(self, lengths: Int32) -> float:
        """Return the seconds of a step with so many rows for each sequence."""
        chunks = int(lengths[lengths > 1].sum())
        return self.base + self.prefill_row * chunks + self.sequence * lengths.size


@dataclass(frozen=True, slots=True)
class Next:
    """What the simulated model would say next.

    Attributes:
        ids: best first: the first has the logit `favour`, each further one 1 less, all others lie in [-2, 2].
        favour: see `ids`.
        seconds: that it takes to say it.
    """

    ids: Sequence[int]
    favour: float = 14.0
    seconds: float = 0.0


class NextToken(Protocol):
    """The simulated model: a pure function of the tokens so far."""

    def __call__(self, tokens: Int32, row: RowSampling, /) -> Next:
        """Return what comes after `tokens`, of which the last ``row.position`` were drawn.

        Raises:
            SageError: this sequence (or, with EngineDiedError, the device) fails here.
        """
        ...


class WordSalad:
    """Plain phrases in sentences: each phrase is picked by a checksum of all tokens before it.

    For the byte vocabulary only; with any other the checksum picks the id itself.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, tokens: Int32, row: RowSampling, /) -> Next:
        """Return the next byte of a phrase, a comma or a full stop, or the end after some sentences."""
        if self._vocab_size != BYTE_VOCAB:
            return Next((zlib.crc32(tokens.tobytes()) % self._vocab_size,))
        text = tokens[-64:]
        breaks = np.flatnonzero((text < 32) | (text > 255) | (text == ord(",")) | (text == ord(".")))
        fragment = text[breaks[-1] + 1 :] if breaks.size else text
        before = zlib.crc32(tokens[: tokens.size - fragment.size].tobytes())
        spelled = bytes((fragment & 255).astype(np.uint8)).lstrip(b" ").decode("latin-1")
        if spelled:
            return Next((_spell(spelled, before),))
        if fragment.size == 0 and text[-1] in (ord(","), ord(".")):
            first = row.target < 0 and row.position == 0  # a reply does not begin with its end
            if text[-1] == ord(".") and before & 1 and not first:
                return Next((IM_END if IM_START in tokens else EOS,))
            return Next((ord(" "),))
        picks = (_PHRASES[(before >> shift) % len(_PHRASES)][0] for shift in (0, 7, 14, 21))
        return Next(tuple(dict.fromkeys(map(ord, picks))))


def _spell(spelled: str, before: int) -> int:
    """Return the byte that goes on with a phrase that begins with `spelled`, or that ends it."""
    phrases = [phrase for phrase in _PHRASES if phrase.startswith(spelled)]
    phrase = phrases[before % len(phrases)] if phrases else spelled
    if phrase != spelled:
        return ord(phrase[len(spelled)])
    return ord(".") if (before >> 8) & 1 else ord(",")


class MockRunner:
    """A model on the simulated device."""

    def __init__(self, spec: DecoderSpec, options: LoadOptions, latency: Latency, next_token: NextToken) -> None:
        self._spec = spec
        self._options = options
        self._latency = latency
        self._next_token = next_token
        self._kv = MockKV(options.n_blocks)
        self._marks: dict[int, int] = {-1: 0}
        self._noise = np.random.default_rng(0).uniform(-2.0, 2.0, 8192).astype(np.float32)
        self._ids = np.arange(spec.vocab_size)

    @property
    def spec(self) -> DecoderSpec:
        """What it pretends to execute."""
        return self._spec

    @property
    def kv(self) -> MockKV:
        """Its KV cache."""
        return self._kv

    @property
    def weight_bytes(self) -> int:
        """0: there are none."""
        return 0

    def step(self, batch: StepBatch) -> StepResult:
        """Write the rows' ids to their blocks, then draw from logits that depend on what the blocks hold."""
        check_batch(batch, self._spec, self._options)
        seconds = self._latency.of(batch.lengths)
        positions = batch.positions
        owners = np.repeat(np.arange(batch.lengths.size), batch.lengths)
        marks = self._marks_of(batch)
        blocks = batch.block_tables[owners, positions // BLOCK_SIZE]
        self._kv.write(blocks, positions % BLOCK_SIZE, batch.token_ids + marks[owners])
        wanted = batch.logit_rows.tolist()
        seen = [
            self._read(batch.block_tables[owners[row]], int(positions[row]) + 1, marks[owners[row]]) for row in wanted
        ]
        if not batch.sampling:  # hidden states only
            time.sleep(seconds)
            return StepResult(np.empty(0, np.int32), np.empty(0, np.float32), hidden=self._hidden(seen))
        logits = np.empty((len(seen), self._spec.vocab_size), np.float32)
        for index, (tokens, how) in enumerate(zip(seen, batch.sampling, strict=True)):
            seconds = max(seconds, self._fill_logits(logits[index], tokens, how, int(owners[wanted[index]])))
        if seconds > 0.0:
            time.sleep(seconds)
        if batch.masks_ready is not None:
            batch.masks_ready()
        ids, logprobs, top_ids, top_logprobs = sample_rows(logits, batch.sampling)
        return StepResult(
            token_ids=ids,
            logprobs=logprobs,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            logits=logits if batch.want_logits else None,
            hidden=self._hidden(seen) if batch.want_hidden else None,
        )

    def load_adapter(self, number: int, adapter: Adapter) -> None:
        """Know an adapter as `number`; it changes what is written to the blocks, and so the text.

        Raises:
            ValueError: it does not fit the spec.
        """
        check_adapter(self._spec, adapter)
        digest = 0
        for slot in sorted(adapter.factors):
            for factor in adapter.factors[slot]:
                digest = zlib.crc32(factor.tobytes(), zlib.crc32(slot.encode(), digest))
        self._marks[number] = (1 + digest % 1023) << 20

    def unload_adapter(self, number: int) -> None:
        """Forget an adapter.

        Raises:
            KeyError: there is none of that number.
        """
        del self._marks[number]

    def close(self) -> None:
        """Nothing to free."""

    def _marks_of(self, batch: StepBatch) -> Int32:
        """What each sequence's adapter adds to the ids in its blocks, as an adapter's keys and values differ from the model's."""
        if batch.adapters is None:
            return np.zeros(batch.lengths.size, np.int32)
        return np.array([self._marks[number] for number in batch.adapters.tolist()], np.int32)

    def _read(self, table: Int32, n_tokens: int, mark: int) -> Int32:
        """Return the tokens of a sequence as its adapter sees them: another's blocks give ids that do not exist."""
        ids = self._kv.read(table, n_tokens) - mark
        return ids if mark == 0 else np.concatenate((np.array([mark], np.int32), ids))

    def _fill_logits(self, out: Float32, tokens: Int32, how: RowSampling, owner: int) -> float:
        """Write the logits after `tokens`, which belong to sequence `owner`; return the seconds that saying it takes."""
        digest = zlib.crc32(tokens.tobytes())
        out[:] = self._noise[(self._ids * 2654435761 + digest) % self._noise.size]
        try:
            said = self._next_token(tokens, how)
        except EngineDiedError:
            raise
        except SageError as error:
            raise SequenceFailure(owner, error) from error
        for rank, token_id in enumerate(said.ids):
            out[token_id] = said.favour - rank
        return said.seconds

    def _hidden(self, seen: Sequence[Int32]) -> Float32:
        rows = [
            np.random.default_rng(zlib.crc32(tokens.tobytes())).standard_normal(self._spec.d_model) for tokens in seen
        ]
        return np.array(rows, np.float32).reshape(len(seen), self._spec.d_model)


class MockKV:
    """Blocks of token ids."""

    def __init__(self, n_blocks: int) -> None:
        self._ids = np.full((n_blocks, BLOCK_SIZE), -1, np.int32)

    @property
    def n_blocks(self) -> int:
        """Blocks that it holds."""
        return int(self._ids.shape[0])

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return BLOCK_SIZE * 4

    def write(self, blocks: Int32, slots: Int32, ids: Int32) -> None:
        """Put `ids` into slots of blocks."""
        self._ids[blocks, slots] = ids

    def read(self, table: Int32, n_tokens: int) -> Int32:
        """Return the first `n_tokens` ids of a block table."""
        return self._ids[table[: -(-n_tokens // BLOCK_SIZE)]].reshape(-1)[:n_tokens]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, in order."""
        self._check([number for pair in pairs for number in pair])
        for source, destination in pairs:
            self._ids[destination] = self._ids[source]

    def export_blocks(self, blocks: Sequence[int]) -> bytes:
        """Return the blocks' content."""
        self._check(blocks)
        return self._ids[list(blocks)].tobytes()

    def import_blocks(self, blocks: Sequence[int], data: bytes | memoryview) -> None:
        """Fill blocks with exported content.

        Raises:
            ValueError: the length is wrong.
        """
        self._check(blocks)
        if len(data) != len(blocks) * self.block_bytes:
            raise ValueError(f"{len(blocks)} blocks have {len(blocks) * self.block_bytes} bytes, got {len(data)}")
        self._ids[list(blocks)] = np.frombuffer(data, np.int32).reshape(len(blocks), BLOCK_SIZE)

    def _check(self, blocks: Sequence[int]) -> None:
        bad = [number for number in blocks if not 0 <= number < self.n_blocks]
        if bad:
            raise ValueError(f"there is no block {bad[0]}: the cache has 0 to {self.n_blocks - 1}")


class MockBackend:
    """The simulated device.

    Args:
        latency: what a step costs; nothing by default.
        next_token: what the model says; `WordSalad` by default.
    """

    def __init__(self, latency: Latency | None = None, next_token: NextToken | None = None) -> None:
        self._latency = latency or Latency()
        self._next_token = next_token

    @property
    def name(self) -> str:
        """``mock``."""
        return "mock"

    def available(self) -> str | None:
        """None: it runs everywhere."""
        return None

    def capability(self) -> Capability:
        """Return what it pretends to do."""
        return Capability(device="mock", formats=("auto",), kv_dtypes=("auto",), batch_invariant=True)

    def memory(self) -> MemoryInfo:
        """Return the host's memory."""
        return host_memory()

    def kv_block_bytes(self, spec: DecoderSpec, kv_dtype: str) -> int:
        """Return the bytes of one block of ids."""
        del spec, kv_dtype
        return BLOCK_SIZE * 4

    def load(self, spec: DecoderSpec, weights: Weights, options: LoadOptions) -> MockRunner:
        """Return a runner; weights are not looked at.

        Raises:
            UnsupportedError: a precision was asked for.
        """
        del weights
        for name, value in (("quant", options.quant), ("kv_dtype", options.kv_dtype)):
            if value != "auto":
                raise UnsupportedError(f"the mock device has no precision {value!r}: leave {name} at auto", param=name)
        return MockRunner(spec, options, self._latency, self._next_token or WordSalad(spec.vocab_size))
