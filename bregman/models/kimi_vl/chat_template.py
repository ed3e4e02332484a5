"""Kimi-VL's ChatML as a chat template: control tokens around turns and images, marks around answers.

Owns the Jinja source. What a template is used for lives in `bregman.data.chat`.
"""

from __future__ import annotations

import json

IMAGE_PLACEHOLDER = "<|media_pad|>"
THINK_TAGS = ("◁think▷", "◁/think▷")
HEADER_NAMES = ("system", "user", "assistant", "tool", "image")
"""What headers of turns and images hold between their control tokens."""

_TEMPLATE = """\
{%- macro body(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
                {{- '<|media_start|>image<|media_content|><|media_pad|><|media_end|>' -}}
            {%- else -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro calls(message) -%}
    {%- if message.get('tool_calls') -%}
        {{- '<|tool_calls_section_begin|>' -}}
        {%- for call in message['tool_calls'] -%}
            {%- set arguments = call['function']['arguments'] -%}
            {{- '<|tool_call_begin|>functions.' + call['function']['name'] + ':' + loop.index0 | string -}}
            {{- '<|tool_call_argument_begin|>' + (arguments if arguments is string else arguments | tojson) + '<|tool_call_end|>' -}}
        {%- endfor -%}
        {{- '<|tool_calls_section_end|>' -}}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
    {{- '<|im_system|>tool_declare<|im_middle|>' + tools | tojson + '<|im_end|>' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if loop.first and message['role'] != 'system' and DEFAULT_SYSTEM -%}
        {{- '<|im_system|>system<|im_middle|>' + DEFAULT_SYSTEM + '<|im_end|>' -}}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|im_assistant|>assistant<|im_middle|>' -}}
        {%- generation -%}
            {{- body(message['content']) + calls(message) + '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- elif message['role'] == 'user' -%}
        {{- '<|im_user|>user<|im_middle|>' + body(message['content']) + '<|im_end|>' -}}
    {%- else -%}
        {{- '<|im_system|>' + (message.get('name') or message['role']) + '<|im_middle|>' + body(message['content']) + '<|im_end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_assistant|>assistant<|im_middle|>' -}}
{%- endif -%}
"""


def chat_template(default_system: str = "You are a helpful assistant") -> str:
    """Kimi-VL's ChatML with marks around the assistant's answers; `default_system` is written where no system message comes first.

    Tools and roles other than the user's and the assistant's stand under `<|im_system|>`, and calls are written, as in Kimi K2's
    template; the marks around calls are plain text to Kimi-VL's published vocabulary.
    """
    return _TEMPLATE.replace("DEFAULT_SYSTEM", json.dumps(default_system, ensure_ascii=False))
