"""Chat templates that write tool calls in the manner of the model families, each with a tokenizer of its tokens.

The templates are our own and as short as can be; what they put around calls is what the published ones do.
"""

# ruff: noqa: RUF001 (the bars in the names of DeepSeek's tokens are wide ones)

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from kvik.text.chat_template import ChatTemplate
from kvik.text.tokenizer_json import FolderTokenizer
from tokenizer_kinds import special

# Trained without words, so that tokens lie across the borders of names, JSON and markers.
CORPUS = [
    *["assistant\n<tool_call>\n", "</function>\n"] * 9,
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>\n<tool_call>\n{"name": "',
    '{"name": "weather", "parameters": {"city": "Oslo"}}, {"name": "clock", "arguments": {}, "id": "abcdefgh1"}]',
    'function\n```json\n{"city": "Oslo", "days": 3}\n``` to=functions.weather commentary json {"city":"Oslo","days":3}',
]
NUM_TOKENS = 400


@dataclass(frozen=True)
class ToolTemplate:
    source: str
    control: tuple[str, ...]
    ends: tuple[str, ...]  # of the control tokens, those that end a turn
    text_tokens: tuple[str, ...] = ()  # whole tokens that count as text


def _list(before: str, after: str = "", tool: str = "tool | tojson") -> str:
    """What lists the tools."""
    listed = "{%- for tool in tools %}{{ " + tool + " }}{{ '\\n' }}{%- endfor %}"
    return "{%- if tools %}" + before + listed + after + "{%- endif %}"


def _chatml(calls: str, *, before_answer: str = "", tools: bool = True) -> str:
    listed = _list("<|im_start|>system\nTools:\n", "<|im_end|>\n") if tools else ""
    return (
        listed
        + r"""{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"""
        + before_answer
        + r"""{{ message.content or '' }}"""
        + calls
        + r"""{{ '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"""
    )


def _each(body: str) -> str:
    return "{%- for call in message.tool_calls or [] %}{%- set function = call.function %}" + body + "{%- endfor %}"


HERMES = _each(
    r"""{%- if message.content or not loop.first %}{{ '\n' }}{%- endif %}
{{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' }}{{ function.arguments | tojson }}
{{- '}\n</tool_call>' }}"""
)
THOUGHTS = r"""{%- if loop.last %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"""
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN = ("<tool_call>", "</tool_call>", "<think>", "</think>")


def _chatml_family(source: str, text_tokens: tuple[str, ...] = ()) -> ToolTemplate:
    return ToolTemplate(source, CHATML, ("<|im_end|>", "<|endoftext|>"), text_tokens)


def _llama(key: str = "parameters", day: str = "") -> ToolTemplate:
    source = (
        r"""{{- '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"""
        + day
        + r"""<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if message.tool_calls %}
    {%- if message.tool_calls | length != 1 %}{{ raise_exception('One call only') }}{%- endif %}
    {%- set function = message.tool_calls[0].function %}
    {{- '{"name": "' + function.name + '", ' }}{{ '"KEY": ' }}{{ function.arguments | tojson }}{{ '}' }}
{%- else %}
    {%- if loop.first %}{%- for tool in tools or [] %}{{ tool | tojson(indent=4) + '\n\n' }}{%- endfor %}{%- endif %}
    {{- message.content | trim }}
{%- endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
    ).replace("KEY", key)
    names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
    return ToolTemplate(source, names, ("<|eot_id|>",))


GRANITE = ToolTemplate(
    _list("<|start_of_role|>available_tools<|end_of_role|>", "<|end_of_text|>\n")
    + r"""{%- for message in messages %}
{{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + (message.content or '') }}
{%- if message.tool_calls %}"""
    + HERMES
    + r"""{%- endif %}{{ '<|end_of_text|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}""",
    ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    ("<|end_of_text|>",),
    ("<tool_call>", "</tool_call>"),
)


def _mistral(calls: str, *more: str) -> ToolTemplate:
    source = (
        "{{ bos_token }}"
        + _list("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
        + r"""{%- for message in messages %}
{%- if message.role == 'user' %}{{ '[INST]' + message.content + '[/INST]' }}
{%- elif message.tool_calls %}
    {%- for call in message.tool_calls if call.id | length != 9 %}
        {{- raise_exception('Nine characters') }}
    {%- endfor %}"""
        + calls
        + r"""{{ eos_token }}
{%- else %}{{ message.content + eos_token }}{%- endif %}
{%- endfor %}"""
    )
    names = ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", *more)
    return ToolTemplate(source, names, ("</s>",))


NEMO = r"""{{- '[TOOL_CALLS][' }}
{%- for call in message.tool_calls %}
    {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') }}
{%- endfor %}{{ ']' }}"""
SMALL = _each(
    r"""{{- '[TOOL_CALLS]' + function.name + '[CALL_ID]' + call.id + '[ARGS]' }}{{ function.arguments | tojson }}"""
)


def _deepseek(calls: str, answer: str) -> str:
    return (
        "{{ bos_token }}"
        + _list("## Tools\n")
        + r"""{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<｜User｜>' + message.content }}
{%- elif message['content'] is none %}"""
        + calls
        + r"""{%- else %}{{ '<｜Assistant｜>"""
        + answer
        + r"""' + message.content + eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>"""
        + answer
        + r"""' }}{%- endif %}"""
    )


DEEPSEEK_NAMES = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
DEEPSEEK_CALLS = tuple(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"))
DEEPSEEK_V31 = _deepseek(
    r"""{{- '<｜Assistant｜></think><｜tool▁calls▁begin｜>' }}"""
    + _each(
        r"""{{- '<｜tool▁call▁begin｜>' + function.name + '<｜tool▁sep｜>' + function.arguments }}
{{- '<｜tool▁call▁end｜>' }}"""
    )
    + "{{- '<｜tool▁calls▁end｜>' + eos_token }}",
    "</think>",
)
R1_DISTILL = _deepseek(
    _each(
        r"""{{- '<｜Assistant｜><｜tool▁calls▁begin｜>' if loop.first else '\n' }}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + function.name + '\n```json\n' + function.arguments + '\n```' }}
{{- '<｜tool▁call▁end｜>' }}
{%- if not loop.first %}{{ '<｜tool▁calls▁end｜>' + eos_token }}{%- endif %}"""
    ),
    "",
)

HARMONY = ToolTemplate(
    _list("<|start|>developer<|message|>", "<|end|>", "'type ' + tool.function.name + ' = (_: any) => any;'")
    + r"""{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<|start|>user<|message|>' + message.content + '<|end|>' }}
{%- elif message.tool_calls %}
    {%- set function = message.tool_calls[0].function %}
    {{- '<|start|>assistant to=functions.' + function.name + '<|channel|>commentary json<|message|>' }}
    {{- function.arguments | tojson }}{{ '<|call|>' }}
{%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' + message.content }}
    {{- '<|return|>' if loop.last else '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{%- endif %}""",
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"),
    ("<|return|>",),
)

SUPPORTED = {
    "hermes": _chatml_family(_chatml(HERMES)),
    "qwen2.5": _chatml_family(_chatml(HERMES), QWEN[:2]),
    "qwen3": _chatml_family(_chatml(HERMES, before_answer=THOUGHTS), QWEN),
    "granite": GRANITE,
    "llama3.1": _llama(day="Cutting off: 2023"),
    "llama3.2": _llama(),
    "llama3.3": _llama(day="""Today: ' + strftime_now("%d %b %Y") + '"""),
    "mistral nemo": _mistral(NEMO),
    "mistral small 3.2": _mistral(SMALL, "[CALL_ID]", "[ARGS]"),
    "deepseek v3.1": ToolTemplate(DEEPSEEK_V31, DEEPSEEK_NAMES, DEEPSEEK_NAMES[1:2], ("</think>", *DEEPSEEK_CALLS)),
    "deepseek r1 distill": ToolTemplate(R1_DISTILL, (*DEEPSEEK_NAMES, *DEEPSEEK_CALLS), DEEPSEEK_NAMES[1:2]),
    "gpt-oss": HARMONY,
    "function tags": _chatml_family(
        _chatml(
            _each("{{ '<function=' + function.name + '>' }}{{ function.arguments | tojson }}{{ '</function>' }}")
            + "{{ '\\n' }}"
        )
    ),
    "compact json": _chatml_family(
        _chatml(
            _each(
                r"""{{- '<tool_call>' + function.name + '\n' }}
{{- function.arguments | tojson(separators=(',', ':')) }}{{ '</tool_call>' }}"""
            )
        )
    ),
}

# Tags of text that begin with the same token, and what is written for an answer, but not for a call.
TAGS = r"""{%- if not message.tool_calls %}{{ '<think></think>' + message.content + '</reply>' }}
{%- else %}{{ '<TOOLCALL>[' }}
{%- for call in message.tool_calls %}{{ (call.function | tojson) + ('' if loop.last else ', ') }}{%- endfor %}
{{- ']</TOOLCALL>' }}
{%- endif %}"""
# An empty thought that stands before calls alone.
THOUGHT = r"""{%- if not message.tool_calls %}{{ message.content }}
{%- else %}{{ '<|START_THINKING|><|END_THINKING|><|START_ACTION|>[' }}
{%- for call in message.tool_calls %}
    {{- '\n    {"tool_call_id": "0", "tool_name": "' + call.function.name + '", "parameters": ' }}
    {{- call.function.arguments | tojson }}{{ '}' + ('' if loop.last else ',') }}
{%- endfor %}{{ '\n]<|END_ACTION|>' }}
{%- endif %}"""
THOUGHT_NAMES = ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_ACTION|>", "<|END_ACTION|>")
SUPPORTED["tags of text"] = _chatml_family(_chatml(TAGS).replace("{{ message.content or '' }}", ""))
SUPPORTED["thought before calls"] = ToolTemplate(
    _chatml(THOUGHT).replace("{{ message.content or '' }}", ""), (*CHATML, *THOUGHT_NAMES), ("<|im_end|>",)
)

# How many calls there are shows in what follows them.
COUNTED = _chatml_family(
    _chatml(HERMES + "{%- if message.tool_calls %}{{ '(' }}{{ message.tool_calls | length }}{{ ')' }}{%- endif %}")
)

# Arguments as pairs.
XML = _each(
    r"""{%- if message.content or not loop.first %}{{ '\n' }}{%- endif %}
{{- '<tool_call>\n<function=' + function.name + '>\n' }}
{%- for key, value in function.arguments | items %}
    {{- '<parameter=' + key + '>\n' }}
    {{- value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}
    {{- '\n</parameter>\n' }}
{%- endfor %}{{ '</function>\n</tool_call>' }}"""
)
KEYS = _each(
    r"""{{- '\n<tool_call>' + function.name + '\n' }}
{%- for key, value in function.arguments | items %}
    {{- '<arg_key>' + key + '</arg_key>\n<arg_value>' }}
    {{- value if value is string else value | tojson }}{{ '</arg_value>\n' }}
{%- endfor %}{{ '</tool_call>' }}"""
)
INVOKE = (
    "{%- if message.tool_calls %}{{ '<mm:tool_call>\\n' }}"
    + _each(
        r"""{{- '<invoke name="' + function.name + '">\n' }}
{%- for key, value in function.arguments | items %}
    {{- '<parameter name="' + key + '">' }}{{ value if value is string else value | tojson }}{{ '</parameter>\n' }}
{%- endfor %}{{ '</invoke>\n' }}"""
    )
    + "{{ '</mm:tool_call>' }}{%- endif %}"
)
PYTHON = (
    r"""{%- macro python(value) -%}
{%- if value is string %}{{ value | tojson }}
{%- elif value is true %}True{%- elif value is false %}False{%- elif value is none %}None
{%- elif value is mapping %}{{ '{' }}
    {%- for key, each in value | items %}{{ key | tojson + ': ' + python(each) + ('' if loop.last else ', ') }}
    {%- endfor %}{{ '}' }}
{%- elif value is sequence %}{{ '[' }}
    {%- for each in value %}{{ python(each) + ('' if loop.last else ', ') }}{%- endfor %}{{ ']' }}
{%- else %}{{ value }}{%- endif %}
{%- endmacro %}{%- if message.tool_calls %}{{ '[' }}"""
    + _each(
        r"""{{- function.name + '(' }}
{%- for key, value in function.arguments | items %}{{ key + '=' + python(value) + ('' if loop.last else ', ') }}
{%- endfor %}{{ ')' + ('' if loop.last else ', ') }}"""
    )
    + "{{ ']' }}{%- endif %}"
)
LFM2 = PYTHON.replace("{{ '[' }}{%- for call", "{{ '<|tool_call_start|>[' }}{%- for call").replace(
    "{{ ']' }}{%- endif %}", "{{ ']<|tool_call_end|>' }}{%- endif %}"
)
GEMMA = r"""{%- macro own(value) -%}
{%- if value is string %}{{ '<|"|>' + value + '<|"|>' }}
{%- elif value is boolean or value is none %}{{ value | tojson }}
{%- elif value is mapping %}{{ '{' }}
    {%- for key, each in value | items %}{{ key + ':' + own(each) + ('' if loop.last else ',') }}{%- endfor %}
    {{- '}' }}
{%- elif value is sequence %}{{ '[' }}
    {%- for each in value %}{{ own(each) + ('' if loop.last else ',') }}{%- endfor %}{{ ']' }}
{%- else %}{{ value }}{%- endif %}
{%- endmacro %}""" + _each(
    r"""{{- '<|tool_call>call:' + function.name + '{' }}
{%- for key, value in function.arguments | items %}{{ key + ':' + own(value) + ('' if loop.last else ',') }}
{%- endfor %}{{ '}<tool_call|>' }}"""
)
SUPPORTED["qwen3-coder"] = _chatml_family(_chatml(XML), QWEN[:2])
SUPPORTED["glm-4.5"] = _chatml_family(
    _chatml(KEYS), ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
)
SUPPORTED["minimax"] = _chatml_family(_chatml(INVOKE))
SUPPORTED["llama 4, as python"] = _chatml_family(_chatml(PYTHON))
SUPPORTED["lfm2"] = ToolTemplate(_chatml(LFM2), (*CHATML, "<|tool_call_start|>", "<|tool_call_end|>"), ("<|im_end|>",))
SUPPORTED["gemma 4"] = ToolTemplate(_chatml(GEMMA), (*CHATML, "<|tool_call>", "<tool_call|>", '<|"|>'), ("<|im_end|>",))
RUN_TOGETHER = _each(
    r"""{{- '[' + function.name + '(' }}
{%- for key, value in function.arguments | items %}{{ key }}={{ value | tojson }}{%- endfor %}{{ ')]' }}"""
)
REFUSED = {
    "no tools (smollm2)": (_chatml_family(_chatml("", tools=False)), "ignores tools"),
    "ignores tools (phi-3.5)": (
        ToolTemplate(
            "{%- for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{%- endfor %}",
            ("<|user|>", "<|assistant|>", "<|end|>"),
            ("<|end|>",),
        ),
        "ignores tools",
    ),
    "drops calls (lfm2)": (_chatml_family(_chatml("")), "leaves out calls"),
    "xml without ends": (
        _chatml_family(_chatml(XML.replace("\\n</parameter>\\n", "")), QWEN[:2]),
        "writes calls as XML",
    ),
    "python, run together": (_chatml_family(_chatml(RUN_TOGETHER)), "writes calls as Python does"),
    "own notation, or text as it is": (
        _chatml_family(
            _chatml(
                _each(
                    r"""{{- '<call>' + function.name + '{' }}
{%- if function.arguments is string %}{{ function.arguments }}
{%- else %}{%- for key, value in function.arguments | items %}{{ key + ':' }}{{ value }}{%- endfor %}{%- endif %}
{{- '}' }}"""
                )
            )
        ),
        "in a notation of its own",
    ),
    "name last": (
        _chatml_family(
            _chatml(
                _each("""{{ '{"arguments": ' }}{{ function.arguments | tojson }}{{ ', "name": "' + function.name }}""")
            )
        ),
        "without arguments after its name",
    ),
    "escaped arguments": (
        _chatml_family(_chatml(_each("{{ '<call>' + function.name }}{{ function.arguments | tojson | tojson }}"))),
        "not with JSON arguments",
    ),
    "no beginning": (
        _chatml_family(_chatml(_each("{{ function.name + ':' }}{{ function.arguments | tojson }}"))),
        "begins calls with nothing of their own",
    ),
    "no end of the name": (
        _chatml_family(_chatml(_each("{{ '<call>' + function.name + '.json' }}{{ function.arguments | tojson }}"))),
        "sets no end to the name",
    ),
    "fails": (_chatml_family(_chatml(_each("{{ raise_exception('no calls') }}"))), "fails with tools"),
    "too long": (_chatml_family(_chatml(_each("{{ function.name * 1000 }}"))), "characters of one short answer"),
}


def make(folder: Path, made: ToolTemplate) -> tuple[ChatTemplate, FolderTokenizer]:
    """The template, and a tokenizer saved in the folder."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=NUM_TOKENS, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    library.add_special_tokens(special(*made.control))
    library.add_tokens([AddedToken(name, special=False, normalized=False) for name in made.text_tokens])
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": made.ends[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ends = [library.token_to_id(name) for name in made.ends]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    template = ChatTemplate(made.source, bos_token=made.control[0], eos_token=made.ends[0], name="model")
    return template, FolderTokenizer(folder, library.get_vocab_size())
