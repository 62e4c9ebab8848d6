"""Structured output: grammars compiled off the step loop by llguidance, token masks for each draw.

A grammar is first compiled in a process of its own, which may be killed; only what passed there within the time and memory limits is
compiled here, on a thread, for the vocabulary. Compiled grammars are kept, by the bytes that they take.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from sagellm_core.grammar_worker import CheckWorker
from sagellm_core.masks import MaskFiller, Masks
from sagellm_protocol.errors import InvalidArgumentError, SageError, UnavailableError
from sagellm_protocol.sampling import GrammarSpec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from sagellm_core.text.tokenizer import TextTokenizer

__all__ = ["GrammarConstraint", "GrammarLimits", "LLGuidanceCompiler", "grammar_text"]

_PARAM = "grammar"
_ENTRY_BYTES, _BYTES_A_CHAR = 64 << 10, 64


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What a grammar may cost.

    Attributes:
        source_bytes: of its text.
        compile_s: time to compile.
        compile_bytes: memory of the process that compiles.
        cache_bytes: of all compiled grammars that are kept.
    """

    source_bytes: int = 256 << 10
    compile_s: float = 10.0
    compile_bytes: int = 2 << 30
    cache_bytes: int = 64 << 20


def grammar_text(spec: GrammarSpec) -> str:
    """Return `spec` in llguidance's own form.

    Raises:
        InvalidArgumentError: the source is no JSON where JSON is needed, or an empty choice.
    """
    from llguidance import LLMatcher

    if spec.kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type":"object"}', overrides=_options())
    if spec.kind == "json_schema":
        schema = _json(spec.source, "the JSON schema")
        if not isinstance(schema, dict | bool):
            raise InvalidArgumentError("the JSON schema is no object: pass a schema", param=_PARAM)
        return LLMatcher.grammar_from_json_schema(spec.source, overrides=_options())
    if spec.kind == "choice":
        choices = _json(spec.source, "the list of choices")
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise InvalidArgumentError("choice needs a list of strings that are not empty", param=_PARAM)
        return LLMatcher.grammar_from_lark("start: " + " | ".join(msgspec.json.encode(c).decode() for c in choices))
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.source)
    return LLMatcher.grammar_from_lark(_lark(spec.source))


def _options() -> Any:
    from sagellm_core.text.tool_prompt import JSON_STYLE

    return dict(JSON_STYLE)


def _lark(source: str) -> str:
    """Lark as it is; EBNF (``rule ::= …``, llama.cpp's GBNF) converted."""
    if "::=" not in source:
        return source
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    try:
        return str(any_to_lark(source))
    except GbnfToLarkError as error:
        raise InvalidArgumentError(f"the EBNF grammar is malformed: {error}", param=_PARAM) from error


def _json(source: str, what: str) -> Any:
    try:
        return msgspec.json.decode(source)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgumentError(f"{what} is no JSON ({error})", param=_PARAM) from error


class GrammarConstraint:
    """A grammar in the middle of one sequence (`sagellm_core.request.Constraint`)."""

    def __init__(self, compiled: Future[LLMatcher]) -> None:
        self._compiled = compiled
        self._matcher: LLMatcher | None = None
        self._left = False

    @property
    def finished(self) -> bool:
        """Whether nothing but an end-of-sequence token may follow."""
        return self._matcher is not None and self._matcher.is_stopped()

    def ready(self) -> bool:
        """Return False while the grammar is being compiled.

        Raises:
            SageError: it cannot be compiled.
        """
        if self._matcher is None and self._compiled.done():
            self._matcher = self._compiled.result().deep_copy()
        return self._matcher is not None

    @property
    def matcher(self) -> LLMatcher | None:
        """The grammar at this place; None once the sequence has left it, and then nothing is allowed."""
        return None if self._left else self._ready()

    def allowed(self, draft: Sequence[int]) -> int:
        """Return how many tokens of `draft` the grammar allows in a row; it does not move."""
        return 0 if self._left or not draft else self._ready().validate_tokens(list(draft))

    def accept(self, token_id: int) -> None:
        """Move on by an emitted token."""
        matcher = self._ready()
        if matcher.validate_tokens([token_id]):
            matcher.consume_token(token_id)
        else:
            self._left = True

    def fork(self) -> GrammarConstraint:
        """Return an independent constraint at the same place."""
        copy = GrammarConstraint(self._compiled)
        copy._matcher = self._ready().deep_copy()
        copy._left = self._left
        return copy

    def _ready(self) -> LLMatcher:
        if self._matcher is None:
            self._matcher = self._compiled.result().deep_copy()
        return self._matcher


class LLGuidanceCompiler:
    """Makes constraints for one vocabulary (`sagellm_core.request.GrammarCompiler`)."""

    def __init__(
        self, load_tokenizer: Callable[[], TextTokenizer], vocab_size: int, limits: GrammarLimits | None = None
    ) -> None:
        """Do nothing yet: the tokenizer is loaded with the first grammar, on the compiling thread.

        Args:
            load_tokenizer: gives the model's tokenizer.
            vocab_size: of the model; masks have that many bits.
            limits: what a grammar may cost.
        """
        self._load, self._vocab_size, self._limits = load_tokenizer, vocab_size, limits or GrammarLimits()
        self._worker = CheckWorker(timeout_s=self._limits.compile_s, limit_bytes=self._limits.compile_bytes)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._filler = MaskFiller(vocab_size)
        self._cache: OrderedDict[GrammarSpec, tuple[Future[LLMatcher], int]] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._closed = False

    @property
    def cached_bytes(self) -> int:
        """Estimated bytes of the compiled grammars that are kept."""
        with self._lock:
            return sum(size for _, size in self._cache.values())

    def compile(self, spec: GrammarSpec) -> GrammarConstraint:
        """Return at once; the constraint says when it is ready.

        Raises:
            InvalidArgumentError: the grammar is seen to be wrong without compiling it.
        """
        size = len(spec.source.encode())
        if size > self._limits.source_bytes:
            raise InvalidArgumentError(
                f"the grammar has {size} bytes, {self._limits.source_bytes} are allowed: simplify it", param=_PARAM
            )
        with self._lock:
            if self._closed:
                raise UnavailableError("the engine is stopping: send the request again")
            entry = self._cache.get(spec)
            if entry is None:
                text = grammar_text(spec)
                try:
                    entry = self._thread.submit(self._compile, spec, text), _ENTRY_BYTES
                except RuntimeError as error:  # the interpreter is ending: its pools take no more work
                    raise UnavailableError("the engine is stopping: send the request again") from error
                self._cache[spec] = entry
            self._cache.move_to_end(spec)
            return GrammarConstraint(entry[0])

    def masks(self, asked: Sequence[tuple[GrammarConstraint, Sequence[int]]]) -> Masks:
        """Begin to write the masks of a step: for each constraint one for the next token and one after each token of its draft.

        Each draft is one that its constraint allows. Returns at once; the constraints must not move before `Masks.wait` returned.
        """
        return self._filler.begin([(constraint.matcher, draft) for constraint, draft in asked])

    def close(self) -> None:
        """Stop compiling and kill the worker. Idempotent."""
        with self._lock:
            self._closed = True
            self._cache.clear()
        self._worker.close()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._filler.close()
        self._worker.close()

    def _compile(self, spec: GrammarSpec, text: str) -> LLMatcher:
        try:
            verdict = self._worker.check(text)
            if verdict.error is not None:
                raise InvalidArgumentError(_explained(spec, verdict.error), param=_PARAM)
            matcher = self._matcher(text)
            if matcher.is_error():
                raise InvalidArgumentError(_explained(spec, matcher.get_error()), param=_PARAM)
        except SageError:
            with self._lock:
                self._cache.pop(spec, None)
            raise
        self._keep(spec, max(verdict.bytes, _ENTRY_BYTES + _BYTES_A_CHAR * len(text)))
        return matcher

    def _keep(self, spec: GrammarSpec, size: int) -> None:
        """Book the grammar's bytes and drop the least recently used ones beyond the cap."""
        with self._lock:
            if spec in self._cache:
                self._cache[spec] = self._cache[spec][0], size
            total = sum(entry[1] for entry in self._cache.values())
            while total > self._limits.cache_bytes and self._cache:
                total -= self._cache.popitem(last=False)[1][1]

    def _matcher(self, text: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        if self._tokenizer is None:
            self._tokenizer = _ll_tokenizer(self._load(), self._vocab_size)
        return LLMatcher(self._tokenizer, text, log_level=0, limits=LLParserLimits(verbose_errors=False))


class _Vocabulary:
    """The model's tokens as llguidance wants them."""

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int) -> None:
        ends = tokenizer.info.eos_token_ids
        self.eos_token_id = ends[0] if ends else 0
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = sorted(i for i in tokenizer.specials.ids if i < vocab_size)
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode_pieces([plain])


def _ll_tokenizer(tokenizer: TextTokenizer, vocab_size: int) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = [i for i in tokenizer.info.eos_token_ids if i < vocab_size]
    if not ends:
        raise InvalidArgumentError("the model has no end-of-sequence token: structured output cannot end", param=_PARAM)
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)), n_vocab=vocab_size, eos_token=ends)


_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*?)\]")


def _explained(spec: GrammarSpec, error: str) -> str:
    """The compiler's message as ours: what is wrong, and what to do."""
    first = error.strip().splitlines()[0] if error.strip() else "it cannot be compiled"
    if match := _UNIMPLEMENTED.search(error):
        return f"the JSON schema uses {match[1]}, which structured output does not support: leave it out"
    if "oneOf" in error:
        return 'the JSON schema uses "oneOf" with alternatives that may overlap: use "anyOf"'
    name = {"json_schema": "JSON schema", "lark": "grammar"}.get(spec.kind, spec.kind)
    return f"the {name} is refused: {first}"
