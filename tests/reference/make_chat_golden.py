"""Writes tests/fixtures/chat.json: how transformers renders and encodes conversations.

    pip install transformers    # without torch
    python make_chat_golden.py

Templates are written here, in the manner of the families' own; the tokenizer is a test model's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

FIXTURES = Path(__file__).parent.parent / "fixtures"
MODEL = "models/llama3"
TEMPLATES = {
    "headers": (
        "{% set ns = namespace(first=true) %}\n"
        "{% for message in messages %}\n"
        "    {%- set text = '<|user|>' + message['role'] + '\n\n' + message['content'] | trim %}\n"
        "    {%- if ns.first %}{% set text = bos_token + text %}"
        "{% set ns.first = false %}{% endif %}\n"
        "{{ text }}<|end|>\n"
        "{%- endfor %}\n"
        "{% if add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    ),
    "turns": (
        "{{ bos_token }}\n"
        "{%- if messages[0].role == 'system' -%}\n"
        "    {%- set prefix = messages[0].content + '\n\n' -%}\n"
        "    {%- set rest = messages[1:] -%}\n"
        "{%- else -%}\n"
        "    {%- set prefix = '' -%}{%- set rest = messages -%}\n"
        "{%- endif -%}\n"
        "{%- for m in rest -%}\n"
        "    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}\n"
        "        {{ raise_exception('roles must alternate') }}\n"
        "    {%- endif -%}\n"
        "    {{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}\n"
        "    {{- (prefix if loop.first else '') + m.content | trim + eos_token + '\n' }}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}\n"
    ),
    "tools": (
        "  {% if tools %}\n"
        "Tools:\n"
        "{% for tool in tools %}\n"
        "{{ tool | tojson(indent=2) }} {{ tool.function | tojson }}\n"
        "{% endfor %}\n"
        "  {% endif %}\n"
        "{% for m in messages %}\n"
        "{% if loop.index0 > 3 %}{% break %}{% endif %}\n"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}\n"
        "<|assistant|>{{ c.function.name }}({{ c.function.arguments | tojson }})\n"
        "{% endfor %}{% continue %}{% endif %}\n"
        "{% generation %}[{{ m.role | upper }}] {{ m.content }}{% endgeneration %}\n"
        "{%- endfor %}\n"
    ),
}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello!"}],
    [
        {"role": "system", "content": "Be brief.  "},
        {"role": "user", "content": "  What is 2+2?\n"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": 'And <b>"3"</b> < 5 | x > 2 & y?'},
    ],
    [{"role": "assistant", "content": "out of turn"}],
    [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "get", "arguments": {"city": "Zürich <x>", "n": 3}},
                }
            ],
        },
        {"role": "tool", "content": '{"t": 20}'},
    ],
    [{"role": "user", "content": "emoji 😀 中文\n```python\nfor i in x:\n    pass\n```"}],
]
TOOLS = [{"type": "function", "function": {"name": "get", "description": "Ünits <&>"}}]


def main() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FIXTURES / MODEL)
    cases = []
    for name, template in TEMPLATES.items():
        for i in range(len(CONVERSATIONS)):
            for tools in (None, TOOLS):
                for generate in (True, False):
                    case = {"template": name, "conversation": i, "tools": bool(tools)}
                    case["add_generation_prompt"] = generate
                    case["text"], case["ids"] = render(
                        tokenizer, template, CONVERSATIONS[i], tools, generate
                    )
                    cases.append(case)
    golden = {
        "model": MODEL,
        "templates": TEMPLATES,
        "conversations": CONVERSATIONS,
        "tools": TOOLS,
        "cases": cases,
    }
    text = json.dumps(golden, separators=(",", ":")).replace('{"template"', '\n{"template"')
    (FIXTURES / "chat.json").write_text(text + "\n", "utf-8")


def render(
    tokenizer: Any, template: str, messages: Any, tools: Any, generate: bool
) -> tuple[str | None, list[int] | None]:
    """Text and tokens; None for both if the template raises."""
    arguments = {"chat_template": template, "tools": tools, "add_generation_prompt": generate}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        ids = tokenizer.apply_chat_template(messages, tokenize=True, **arguments)
    except Exception:
        return None, None
    return text, ids if isinstance(ids, list) else ids["input_ids"]


if __name__ == "__main__":
    main()
