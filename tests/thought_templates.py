"""Chat templates that write thoughts in the manner of the model families; the templates are our own."""

from __future__ import annotations

from dataclasses import dataclass

from tool_templates import CHATML, HERMES, QWEN, ToolTemplate


@dataclass(frozen=True)
class Thinking:
    template: ToolTemplate
    begin: str
    end: str
    has_begun: bool = False  # the generation prompt begins the thought


def _chatml(thought: str, *, begins: str = "", calls: str = "") -> str:
    return (
        r"""{%- if tools %}{{ '<|im_start|>system\n' }}{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}
{{- '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"""
        + thought
        + "{{ message.content or '' }}"
        + calls
        + r"""{{ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n"""
        + begins
        + "' }}{%- endif %}"
    )


def _written(begin: str, end: str) -> str:
    return (
        "{%- if message.reasoning_content %}{{ '"
        + begin
        + "' + message.reasoning_content + '"
        + end
        + "' }}{%- endif %}"
    )


ENDS = ("<|im_end|>",)
HARMONY = ToolTemplate(
    r"""{%- if tools %}{{ '<|start|>developer<|message|>' }}
{%- for tool in tools %}{{ 'type ' + tool.function.name + ' = any;' }}{%- endfor %}{{ '<|end|>' }}{%- endif %}
{%- for message in messages %}
{%- if message.role != 'assistant' %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
{%- elif message.tool_calls %}
    {%- set function = message.tool_calls[0].function %}
    {{- '<|start|>assistant to=functions.' + function.name + '<|channel|>commentary json<|message|>' }}
    {{- function.arguments | tojson }}{{ '<|call|>' }}
{%- else %}
    {%- if message.thinking %}
        {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
    {%- endif %}
    {{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
    {{- '<|return|>' if loop.last else '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{%- endif %}""",
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>", "<|constrain|>"),
    ("<|return|>", "<|call|>"),
)
THINKING = {
    "qwen3": Thinking(
        ToolTemplate(_chatml(_written(r"<think>\n", r"\n</think>\n\n"), calls=HERMES), CHATML, ENDS, QWEN),
        "<think>",
        "</think>",
    ),
    "tags of text": Thinking(
        ToolTemplate(_chatml(_written(r"<think>\n", r"\n</think>\n\n"), calls=HERMES), CHATML, ENDS),
        "<think>",
        "</think>",
    ),
    "deepseek r1": Thinking(
        ToolTemplate(
            _chatml("", begins=r"<think>\n", calls=HERMES + "{# #}").replace(
                "{{ message.content or '' }}", "{{ (message.content or '').split('</think>') | last }}"
            ),
            CHATML,
            ENDS,
            QWEN[2:],
        ),
        "<think>",
        "</think>",
        has_begun=True,
    ),
    "magistral": Thinking(
        ToolTemplate(
            _chatml(_written("[THINK]", "[/THINK]").replace("reasoning_content", "reasoning"), calls=HERMES),
            (*CHATML, "[THINK]", "[/THINK]"),
            ENDS,
        ),
        "[THINK]",
        "[/THINK]",
    ),
    "command a": Thinking(
        ToolTemplate(
            _chatml(_written("<|START_THINKING|>", "<|END_THINKING|>"), calls=HERMES),
            (*CHATML, "<|START_THINKING|>", "<|END_THINKING|>"),
            ENDS,
        ),
        "<|START_THINKING|>",
        "<|END_THINKING|>",
    ),
    "gemma 4": Thinking(
        ToolTemplate(
            _chatml(_written(r"<|channel>thought\n", "<channel|>"), calls=HERMES),
            (*CHATML, "<|channel>", "<channel|>"),
            ENDS,
        ),
        "<|channel>thought",
        "<channel|>",
    ),
}
NOT_THINKING = {
    "no thoughts": ToolTemplate(_chatml("", calls=HERMES), CHATML, ENDS),
    "thoughts without tags": ToolTemplate(_chatml(_written("", r"\n")), CHATML, ENDS),
}
