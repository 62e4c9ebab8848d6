"""Templates for files that bring none, chosen by the control tokens of the vocabulary."""

from __future__ import annotations

from sagellm_core.text.specials import SpecialTokens

__all__ = ["CHATML", "builtin_template"]

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"""

_GEMMA = """\
{{- bos_token -}}
{%- set ns = namespace(head='', first=true) -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set ns.head = ns.head + message.content | trim + '\n\n' -%}
{%- else -%}
{%- set role = 'model' if message.role == 'assistant' else 'user' -%}
{{ '<start_of_turn>' + role + '\n' + (ns.head if role == 'user' else '') + message.content | trim + '<end_of_turn>\n' }}
{%- if role == 'user' -%}{%- set ns.head = '' -%}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

_PHI3 = """\
{%- for message in messages -%}
{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"""

_GRANITE = """\
{%- for message in messages -%}
{{ '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif -%}"""

_MISTRAL = """\
{{- bos_token -}}
{%- set ns = namespace(head='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set ns.head = ns.head + message.content + '\n\n' -%}
{%- elif message.role == 'assistant' -%}{{ ' ' + message.content | trim + eos_token }}
{%- else -%}{{ '[INST] ' + ns.head + message.content + ' [/INST]' }}{%- set ns.head = '' -%}
{%- endif -%}
{%- endfor -%}"""

_TULU = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|' + message.role + '|>\n' + message.content + (eos_token if message.role == 'assistant' else '') + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"""

_BY_TOKEN = (
    ("<|im_start|>", CHATML),
    ("<|start_header_id|>", _LLAMA3),
    ("<start_of_turn>", _GEMMA),
    ("<|start_of_role|>", _GRANITE),
    ("[INST]", _MISTRAL),
    ("<|end|>", _PHI3),
)
_BY_FAMILY = {"olmo2": _TULU}


def builtin_template(specials: SpecialTokens, family: str) -> str | None:
    """Return the template that a model with these control tokens was most likely trained on, None if that cannot be told."""
    for token, template in _BY_TOKEN:
        if token in specials:
            return template
    return _BY_FAMILY.get(family)
