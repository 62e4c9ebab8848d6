"""The text side of the mock: a vocabulary of 256 bytes and four control tokens, with a ChatML template.

Like qwen's it knows tools (``<tool_call>``), reasoning (``<think>``) and filling in the middle, so that scripted replies can use them.
"""

from __future__ import annotations

from sagellm_core.text.chat_model import TextChatModel
from sagellm_core.text.specials import SpecialToken
from sagellm_core.text.tokenizer import TextTokenizer, TokenizerInfo

__all__ = ["BOS", "EOS", "IM_END", "IM_START", "VOCAB_SIZE", "ByteChatModel"]

BOS, EOS, IM_START, IM_END = range(256, 260)
VOCAB_SIZE = 260
_FIM = range(0xFD, 0x100)  # bytes that no UTF-8 text holds

_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}
{{ '<|im_start|>system\n# Tools\n' }}
{%- for tool in tools -%}{{ tool | tojson + '\n' }}{%- endfor -%}
{{ 'Answer with <tool_call>{"name": ..., "arguments": {...}}</tool_call> to call one.<|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content is defined -%}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{%- endif -%}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
{{ '\n<tool_call>\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

_INFO = TokenizerInfo(
    kind="raw",
    vocab_size=VOCAB_SIZE,
    specials=(
        SpecialToken(BOS, "<|bos|>"),
        SpecialToken(EOS, "<|eos|>"),
        SpecialToken(IM_START, "<|im_start|>"),
        SpecialToken(IM_END, "<|im_end|>"),
        *map(SpecialToken, _FIM, ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")),
    ),
    prefix_ids=(BOS,),
    eos_token_ids=(EOS, IM_END),
    bos_token="<|bos|>",  # noqa: S106 - a token of a vocabulary
    eos_token="<|eos|>",  # noqa: S106
    chat_template=_TEMPLATE,
    family="bytes",
)


class _ByteEncoder:
    """Text -> its UTF-8 bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogatepass"))

    def token(self, token_id: int) -> str | None:
        return chr(token_id) if token_id < 128 else None


class _ByteTokenizer(TextTokenizer):
    """Ids of bytes spell themselves."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if 0 <= token_id < _FIM.start else super().token_bytes(token_id)


class ByteChatModel(TextChatModel):
    """`ChatModel` of the simulated device: real templating, real incremental UTF-8, no file needed."""

    def __init__(self, model_id: str, context_length: int) -> None:
        super().__init__(model_id, _ByteTokenizer(_INFO, _ByteEncoder()), context_length)
