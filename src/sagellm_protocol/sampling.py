"""How the next token is chosen, and when to stop."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sagellm_protocol.checks import in_range
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["GrammarSpec", "Sampling", "SamplingParams", "SamplingPreset"]

SamplingPreset = Literal["deterministic", "balanced", "creative", "precise"]

MAX_LOGPROBS = 20


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the output must match.

    Attributes:
        kind: ``json_schema`` (source: the schema as JSON text), ``json_object`` (source ignored and empty),
            ``regex``, ``lark`` (llguidance's Lark dialect; EBNF is converted before), or ``choice``
            (source: a JSON list of strings).
        source: the grammar's text.
    """

    kind: Literal["json_schema", "json_object", "regex", "lark", "choice"]
    source: str = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling of one sequence; the ranges are checked on construction and on decode.

    The order of operations is: logit_bias, bad words / allowed tokens / grammar mask, penalties, temperature,
    top_k, typical_p, top_p, min_p, draw. ``temperature == 0`` is greedy. Logprobs are those of the raw distribution
    (before any of these), as in the OpenAI API.

    Attributes:
        temperature: [0, 2].
        top_p: (0, 1]; 1 is off.
        top_k: 0 is off.
        min_p: [0, 1]; 0 is off. Relative to the most likely token (Nguyen et al., 2024).
        typical_p: (0, 1]; 1 is off (Meister et al., 2022).
        repetition_penalty: > 0; 1 is off. Over prompt and output (Keskar et al., 2019).
        presence_penalty: [-2, 2], over the output.
        frequency_penalty: [-2, 2], over the output.
        seed: any signed 64-bit integer; None draws one. The stream of a request depends on its seed and nothing else.
        max_tokens: > 0; None is up to the context window.
        min_tokens: no end-of-sequence before that many tokens.
        stop: strings that end the output and are not part of it.
        stop_token_ids: ids that end the output and are not part of the text.
        ignore_eos: go on to max_tokens.
        logit_bias: token id -> [-100, 100].
        bad_words: strings that must not appear.
        allowed_token_ids: only these may be drawn.
        logprobs: None is off; 0–20 alternatives besides the chosen token.
        prompt_logprobs: the same for the prompt's tokens.
        grammar: what the output must match.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None

    def __post_init__(self) -> None:
        # One comparison for what nearly every request has; what is out of range, or no number, is named below.
        if not (
            0.0 <= self.temperature <= 2.0
            and 0.0 < self.top_p <= 1.0
            and 0 <= self.top_k < 2**31
            and 0.0 <= self.min_p <= 1.0
            and 0.0 < self.typical_p <= 1.0
            and 0.0 < self.repetition_penalty <= 100.0
            and -2.0 <= self.presence_penalty <= 2.0
            and -2.0 <= self.frequency_penalty <= 2.0
            and 0 <= self.min_tokens < 2**31
        ):
            self._refuse_number()
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            in_range("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            if not 1 <= self.max_tokens < 2**31:
                in_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidArgumentError(
                    f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}: lower it", param="min_tokens"
                )
        if self.stop or self.logit_bias or self.logprobs is not None or self.prompt_logprobs is not None:
            self._check_extras()

    def _check_extras(self) -> None:
        if not all(self.stop):
            raise InvalidArgumentError("stop has an empty string: remove it", param="stop")
        for token, bias in (self.logit_bias or {}).items():
            in_range(f"logit_bias[{token}]", bias, -100.0, 100.0)
        if self.logprobs is not None:
            in_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            in_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)

    def _refuse_number(self) -> None:
        in_range("temperature", self.temperature, 0.0, 2.0)
        in_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        in_range("top_k", self.top_k, 0, 2**31 - 1)
        in_range("min_p", self.min_p, 0.0, 1.0)
        in_range("typical_p", self.typical_p, 0.0, 1.0, low_open=True)
        in_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        in_range("min_tokens", self.min_tokens, 0, 2**31 - 1)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @staticmethod
    def preset(name: SamplingPreset, **changes: Any) -> SamplingParams:
        """Return a named starting point, with `changes` on top.

        Raises:
            InvalidArgumentError: `name` is not a preset.
        """
        base = _PRESETS.get(name)
        if base is None:
            raise InvalidArgumentError(
                f"sampling preset {name!r} is unknown: use one of {', '.join(_PRESETS)}", param="preset"
            )
        return SamplingParams(**{**base, **changes})


_PRESETS: dict[str, dict[str, Any]] = {
    "deterministic": {"temperature": 0.0},
    "precise": {"temperature": 0.3, "top_p": 0.9},
    "balanced": {"temperature": 0.7, "top_p": 0.95},
    "creative": {"temperature": 1.0, "min_p": 0.05},
}

Sampling = SamplingParams
