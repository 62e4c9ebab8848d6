"""The text side of a model: the `ChatModel` port over a tokenizer and a chat template. Holds no weights."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from sagellm_core.text.builtin_templates import builtin_template
from sagellm_core.text.chat_prompt import chat_prompt, constrained_sampling
from sagellm_core.text.decoder import ChoiceDecoder, spell_logprobs
from sagellm_core.text.parsing.select import ParserPlan
from sagellm_core.text.tokenizer import TextTokenizer
from sagellm_protocol.embedding import EmbeddingRequest, EmbedRequest, ScoreRequest
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import ContextLengthError, InvalidArgumentError, UnsupportedError
from sagellm_protocol.generation import ChatMessage, GenerationRequest, TokenLogprob
from sagellm_protocol.ports import PreparedRequest, TextDecoder
from sagellm_protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from sagellm_core.text.template import ChatTemplate

__all__ = ["Prepared", "TextChatModel", "derived_seed"]

MAX_CHOICES = 128
_SUSPECT = 8  # characters a token: twice of what is usual
_CUT = 64


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request after templating and tokenisation (`PreparedRequest`)."""

    source: GenerationRequest
    engine_requests: tuple[EngineRequest, ...]
    plan: ParserPlan = field(default_factory=ParserPlan)
    text: bytes | None = None


@dataclass(slots=True)
class TextChatModel:
    """A `ChatModel`.

    Attributes:
        model_id: name it is served under.
        tokenizer: text <-> ids.
        context_length: tokens, prompt and output together.
        sampling_defaults: what the model's makers recommend; empty where they do not say.
    """

    model_id: str
    tokenizer: TextTokenizer
    context_length: int
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    _templates: dict[bool, ChatTemplate] = field(default_factory=dict, repr=False)

    def prepare(self, request: GenerationRequest) -> Prepared:
        """Template, tokenise and check `request`.

        Raises:
            InvalidArgumentError: empty messages, a parameter out of range, a token id out of the vocabulary.
            ContextLengthError: prompt (+ max_tokens where given) does not fit; the message has both numbers.
            UnsupportedError: something that this model cannot do, by name.
        """
        if not 1 <= request.n <= MAX_CHOICES:
            raise InvalidArgumentError(f"n is {request.n}: it must lie in [1, {MAX_CHOICES}]", param="n")
        prompt, param, plan = self._prompt(request)
        sampling = self._resolved(constrained_sampling(request, plan, self.tokenizer.specials), len(prompt), param)
        bad = tuple(ids for word in sampling.bad_words for ids in self._bad_word(word))
        requests = tuple(
            EngineRequest(
                request_id=request.request_id if request.n == 1 else f"{request.request_id}/{choice}",
                prompt_token_ids=prompt,
                sampling=msgspec.structs.replace(sampling, seed=derived_seed(sampling.seed or 0, choice)),
                trace_id=request.trace_id,
                eos_token_ids=self._ends(request),
                bad_token_ids=bad,
                priority=request.priority,
                deadline_s=request.deadline_s,
                cache_salt=request.tenant,
                adapter=request.adapter,
                source=request,
            )
            for choice in range(request.n)
        )
        return Prepared(request, requests, plan)

    def prepare_embedding(self, request: EmbeddingRequest) -> EmbedRequest:
        """Tokenise texts to embed (`EmbeddingModel`).

        Raises:
            InvalidArgumentError: no input, an empty one, a token id out of the vocabulary.
            ContextLengthError: an input does not fit and `truncate` is off; the message has both numbers.
        """
        from sagellm_core.text.embedding import prepare_embedding

        return prepare_embedding(request, self.tokenizer, self.context_length)

    def prepare_score(self, request: ScoreRequest) -> EmbedRequest:
        """Pair a query with documents (`EmbeddingModel`).

        Raises:
            InvalidArgumentError: the query or a document is empty, or there is none.
            ContextLengthError: a pair does not fit and `truncate` is off.
            UnsupportedError: the model cannot score.
        """
        from sagellm_core.text.embedding import prepare_score

        def render(messages: tuple[ChatMessage, ...]) -> list[int]:
            asked = GenerationRequest(
                request_id=request.request_id, model=self.model_id, messages=messages, reasoning=False
            )
            return chat_prompt(asked, self._template(False), self.tokenizer, self._check_length)[0]

        return prepare_score(request, self.tokenizer, self.context_length, render)

    def decoder(self, prepared: PreparedRequest, index: int) -> TextDecoder:
        """Return a fresh decoder for choice `index`."""
        sampling = prepared.source.sampling
        plan = prepared.plan if isinstance(prepared, Prepared) else ParserPlan()
        specials = self.tokenizer.specials
        return ChoiceDecoder(
            self.tokenizer.token_bytes,
            index=index,
            stops=sampling.stop,
            hidden=specials.ids - {specials[text] for text in plan.shown if text in specials},
            min_tokens=sampling.min_tokens,
            plan=plan,
        )

    def tokenize(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Text -> ids. Special tokens written in `text` stay text unless `parse_special`."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens, parse_special=parse_special)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Ids -> text."""
        self._check_ids(token_ids, "token_ids")
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def spell_logprobs(self, entries: Sequence[TokenLogprob | None]) -> tuple[TokenLogprob | None, ...]:
        """Return a prompt's logprobs with each token's text and bytes filled in."""
        return spell_logprobs(entries, self.tokenizer.token_bytes)

    def _prompt(self, request: GenerationRequest) -> tuple[tuple[int, ...], str, ParserPlan]:
        """Ids of the prompt, the field that they come from, and how the output is to be read."""
        if (request.messages is None) == (request.prompt is None):
            raise InvalidArgumentError("exactly one of messages and prompt is needed", param="messages")
        if request.messages is not None:
            if request.suffix:
                raise UnsupportedError("suffix goes with a raw prompt, not with messages: leave it out", param="suffix")
            ids, plan = chat_prompt(request, self._template(bool(request.tools)), self.tokenizer, self._check_length)
            return tuple(ids), "messages", plan
        for name, value in (
            ("tools", request.tools), ("reasoning", request.reasoning), ("continue_final", request.continue_final)
        ):  # fmt: skip
            if value:
                raise UnsupportedError(f"{name} goes with messages, not with a raw prompt: leave it out", param=name)
        pieces = [piece for piece in (request.prompt, request.suffix) if isinstance(piece, str)]
        self._check_length(pieces, "prompt")
        if not isinstance(request.prompt, str):
            self._check_ids(request.prompt or (), "prompt")
        if request.suffix:
            from sagellm_core.text.infill import infill_prompt

            ids = infill_prompt(self.tokenizer, self.model_id, request.prompt or (), request.suffix)
        elif isinstance(request.prompt, str):
            # A raw prompt is its author's own template: control tokens in it are meant.
            ids = self.tokenizer.encode(request.prompt, parse_special=True)
        else:
            ids = list(request.prompt or ())
        if not ids:
            raise InvalidArgumentError("the prompt is empty: pass at least one token", param="prompt")
        return tuple(ids), "prompt", ParserPlan()

    def _ends(self, request: GenerationRequest) -> tuple[int, ...]:
        ends = self.tokenizer.info.eos_token_ids
        if not request.suffix:
            return ends
        from sagellm_core.text.infill import infill_ends

        return tuple(sorted({*ends, *infill_ends(self.tokenizer)}))

    def _template(self, tools: bool) -> ChatTemplate:
        info = self.tokenizer.info
        tools = tools and info.tool_template is not None
        if tools not in self._templates:
            source = info.tool_template if tools else info.chat_template
            source = source or builtin_template(self.tokenizer.specials, info.family)
            if source is None:
                raise UnsupportedError(
                    f"{self.model_id} has no chat template: use completions with a prompt of your own", param="messages"
                )
            from sagellm_core.text.template import ChatTemplate

            names = {name: getattr(info, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
            self._templates[tools] = ChatTemplate(source, self.tokenizer.specials, names)
        return self._templates[tools]

    def _resolved(self, sampling: SamplingParams, prompt: int, param: str) -> SamplingParams:
        """Fill in seed and max_tokens, check token ids and the context."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._check_ids(list(getattr(sampling, name) or ()), name)
        room = self.context_length - prompt
        wanted = sampling.max_tokens
        if room < 1 or (wanted is not None and wanted > room):
            output = f" and {wanted} for the output" if wanted is not None and room >= 1 else ""
            cure = "shorten the prompt" if room < 1 else f"lower max_tokens to {room} or shorten the prompt"
            raise ContextLengthError(
                f"the prompt has {prompt} tokens{output}, {self._longest}: {cure}",
                param=param if room < 1 else "max_tokens",
            )
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        return msgspec.structs.replace(sampling, seed=seed, max_tokens=wanted if wanted is not None else room)

    @property
    def _longest(self) -> str:
        """In the words by which clients and agents tell an overflow from other errors."""
        return f"this model's maximum context length is {self.context_length}"

    def _check_length(self, pieces: Sequence[str | int], param: str = "messages") -> None:
        """Refuse a text that cannot fit before much time is spent on tokenising it.

        First by the longest token, then by the tokens of its beginning: cutting a text changes a few tokens at the cut.
        """
        texts = [piece for piece in pieces if isinstance(piece, str)]
        characters = sum(map(len, texts))
        least = characters // self.tokenizer.info.longest_token
        if least < self.context_length and characters > _SUSPECT * self.context_length:
            beginning = max(texts, key=len)[: _SUSPECT * self.context_length]
            least = len(self.tokenizer.encode_pieces([0, beginning])) - _CUT
        if least >= self.context_length:
            raise ContextLengthError(
                f"the prompt has {characters} characters, at least {least} tokens; {self._longest}: shorten the prompt",
                param=param,
            )

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        size = self.tokenizer.vocab_size
        wrong = next((token for token in ids if not 0 <= token < size), None)
        if wrong is not None:
            raise InvalidArgumentError(f"token id {wrong} is outside of the vocabulary of {size}", param=param)

    def _bad_word(self, word: str) -> list[tuple[int, ...]]:
        """Token sequences that spell `word`, at the start of a text and after a space."""
        spellings = dict.fromkeys(
            tuple(self.tokenizer.encode_pieces([0, form])[1:]) for form in (word, f" {word.lstrip()}")
        )
        return [ids for ids in spellings if ids]


def derived_seed(seed: int, choice: int) -> int:
    """Return the seed of a choice: `seed` itself for the first, then well-mixed ones (splitmix64, Steele et al., 2014)."""
    if choice == 0:
        return seed
    mask = (1 << 64) - 1
    z = (seed + choice * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z
