"""Chat templates in the manner of the model families, and conversations to render with them.

The wording is our own; the constructs are those that the published ones use.
"""

from __future__ import annotations

from typing import Any

FAMILIES = {
    "llama3": r"""{{- bos_token }}
{%- set tools = custom_tools if custom_tools is defined else tools %}
{%- if tools_first is not defined %}{%- set tools_first = true %}{%- endif %}
{%- set day = date_string if date_string is defined else (strftime_now("%d %b %Y") if strftime_now is defined) %}
{%- set system, turns = "", messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set turns = messages[1:] %}
{%- endif %}
{{- "<|head|>system<|/head|>\n\n" }}
{%- if tools is not none %}{{- "Mode: tools\n" }}{%- endif %}
{{- "Day: " + day + "\n\n" }}
{%- if tools is not none and not tools_first %}
    {{- "These can be called.\n\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- endif %}
{{- system }}{{- "<|turn_end|>" }}
{%- if tools_first and tools is not none %}
    {%- if turns | length == 0 %}{{- raise_exception("Tools need a question to go with!") }}{%- endif %}
    {%- set question = turns[0]['content'] | trim %}
    {%- set turns = turns[1:] %}
    {{- '<|head|>user<|/head|>\n\nCall one of these where it helps.\n\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
    {{- question + "<|turn_end|>" }}
{%- endif %}
{%- for message in turns %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|/head|>\n\n' + message['content'] | trim + '<|turn_end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("One call at a time!") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|/head|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}<|turn_end|>" }}
    {%- else %}
        {{- "<|head|>ipython<|/head|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|turn_end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\n\n' }}{%- endif %}
""",
    "qwen2.5": r"""{%- if tools %}
    {{- '<|open|>system\n' }}
    {{- messages[0]['content'] if messages[0]['role'] == 'system' else 'You answer questions.' }}
    {{- "\n\n# What can be called\n\nOne signature a line:\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools>\n\nA call looks so:\n<call>\n{\"name\": <name>, \"arguments\": <object>}\n</call><|close|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|open|>system\n' + messages[0]['content'] + '<|close|>\n' }}
    {%- else %}
        {{- '<|open|>system\nYou answer questions.<|close|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or
           (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|open|>' + message.role + '\n' + message.content + '<|close|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|open|>' + message.role }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\n<call>\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {{- call.arguments | tojson }}{{- '}\n</call>' }}
        {%- endfor %}
        {{- '<|close|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|open|>user' }}{%- endif %}
        {{- '\n<result>\n' }}{{- message.content }}{{- '\n</result>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|close|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|open|>assistant\n' }}{%- endif %}
""",
    "qwen3": r"""{%- if tools %}
    {{- '<|open|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# What can be called\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|close|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|open|>system\n' + messages[0].content + '<|close|>\n' }}
{%- endif %}
{%- set seen = namespace(searching=true, last_question=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if seen.searching and message.role == "user" and message.content is string
           and not (message.content.startswith('<result>') and message.content.endswith('</result>')) %}
        {%- set seen.searching = false %}
        {%- set seen.last_question = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|open|>' + message.role + '\n' + content + '<|close|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > seen.last_question and (loop.last or (not loop.last and thought)) %}
            {{- '<|open|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|open|>assistant\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}{%- endif %}
                {%- if call.function %}{%- set call = call.function %}{%- endif %}
                {{- '<call>\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
                {%- if call.arguments is string %}{{- call.arguments }}
                {%- else %}{{- call.arguments | tojson }}{%- endif %}
                {{- '}\n</call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|close|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|open|>user' }}{%- endif %}
        {{- '\n<result>\n' + content + '\n</result>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|close|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|open|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
""",
    "gemma": r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set before = messages[0]['content'] + '\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set before = "" -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("A conversation goes to and fro between user and assistant") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<turn>' + role + '\n' + (before if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- else -%}
        {{ raise_exception("No such content") }}
    {%- endif -%}
    {{ '</turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<turn>model\n' }}{%- endif -%}
""",
    "mistral": r"""{%- set system_message, loop_messages = "", messages %}
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set questions = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("User and assistant take turns, but for the optional system message") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == questions[-1]) %}
            {{- "[TOOLS][" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val | tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message %}
            {{- "[ASK] " + system_message + "\n\n" + message["content"] + "[/ASK]" }}
        {%- else %}
            {{- "[ASK] " + message["content"] + "[/ASK]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[CALLS][" }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function | tojson %}{{- out[:-1] }}
            {%- if not call.id is defined or call.id | length != 9 %}
                {{- raise_exception("A call's id has nine characters") }}
            {%- endif %}
            {{- ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[RESULT]{"content": ' + content | string + ", " + '"id": "' + message.tool_call_id + '"}[/RESULT]' }}
    {%- else %}
        {{- raise_exception("Only user, assistant, tool and one system message have a place") }}
    {%- endif %}
{%- endfor %}
""",
    "phi3": r"""{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}""",
    "phi4": r"""{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and
message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] +
'<|/tool|>' + '<|end|>' }}{% elif (message['role'] in ['system', 'user']) %}{{ '<|im_start|>' + message['role'] +
'<|im_sep|>' + message['content'] + '<|im_end|>' }}{% elif (message['role'] == 'assistant') %}{% generation %}{{
'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endgeneration %}{% endif %}{% endfor %}{%
if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}""",
    "smollm2": r"""{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{
'<|open|>system\nYou are small and quick<|close|>\n' }}{% endif %}{{ '<|open|>' + message['role'] + '\n' +
message['content'] + '<|close|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|open|>assistant\n' }}{%
endif %}""",
    "smollm3": r"""{#- switches -#}
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = "/think" if enable_thinking else "/no_think" -%}
{%- if messages[0].role == "system" -%}
    {%- set system = messages[0].content -%}
    {%- if "/no_think" in system -%}
        {%- set mode = "/no_think" -%}
    {%- elif "/think" in system -%}
        {%- set mode = "/think" -%}
    {%- endif -%}
    {%- set wishes = system.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{%- macro heading(title, level=2) -%}{{ '#' * level }} {{ title }}

{% endmacro -%}
{{- "<|open|>system\n" -}}
{%- if wishes is defined and "/whole" in wishes -%}
    {{- wishes.replace("/whole", "").rstrip() ~ "<|close|>\n" -}}
{%- else -%}
    {{- heading("About") -}}
    {{- "Day: " ~ strftime_now("%d %B %Y") ~ "\nMode: " ~ mode ~ "\n\n" -}}
    {{- heading("Wishes") -}}
    {%- if wishes -%}{{- wishes ~ "\n\n" -}}
    {%- elif mode == "/think" -%}{{- "Think first. " ~ "Then answer.\n\n" -}}
    {%- else -%}{{- "Answer.\n\n" -}}{%- endif -%}
    {%- if xml_tools or python_tools or tools -%}
        {{- heading("Tools", 3) -}}
        {%- if xml_tools or tools -%}
            {%- set ns = namespace(lines="One signature a line:\n") -%}
            {%- for tool in (xml_tools or tools)[:] -%}
                {%- set ns.lines = ns.lines ~ (tool | string) ~ "\n" -%}
            {%- endfor -%}
            {{- ns.lines ~ "\n" -}}
        {%- endif -%}
        {%- if python_tools -%}{{- python_tools | join("\n") -}}{%- endif -%}
    {%- endif -%}
    {{- "<|close|>\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}
        {{ "<|open|>" + message.role + "\n" + content + "<|close|>\n" }}
    {%- elif message.role == "assistant" -%}
        {% generation %}
        {%- if mode == "/think" -%}
            {{ "<|open|>assistant\n" + content.lstrip("\n") + "<|close|>\n" }}
        {%- else -%}
            {{ "<|open|>assistant\n" + "<think>\n\n</think>\n" + content.lstrip("\n") + "<|close|>\n" }}
        {%- endif -%}
        {% endgeneration %}
    {%- elif message.role == "tool" -%}
        {{ "<|open|>" + "user\n" + content + "<|close|>\n" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<|open|>assistant\n" if mode == "/think" else "<|open|>assistant\n<think>\n\n</think>\n" }}
{%- endif -%}
""",
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather: "now" & <here>, i København \u2028',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Århus", "京都"]}, "days": {"type": "number"}},
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {"default": [1.0, None]}}}
TOOLS = [WEATHER, CLOCK]

SYSTEM = {"role": "system", "content": " Be brief.\n/no_think "}
USER = {"role": "user", "content": "Hvad er klokken? 你好 👋🏽 <b>&'\"\u2028 {{ x }}\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is <late>.\n"}
CALLS = [
    {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": {"city": "京都", "days": 2}}},
    {"id": "abcdefgh2", "type": "function", "function": {"name": "clock", "arguments": {}}},
]
RESULTS = [{"role": "tool", "tool_call_id": f"abcdefgh{i}", "content": f'{{"result": "{i} °C"}}'} for i in (1, 2)]

Conversation = tuple[list[dict[str, Any]], dict[str, Any]]

CONVERSATIONS: dict[str, Conversation] = {
    "question": ([USER], {}),
    "no generation prompt": ([USER, ANSWER], {"add_generation_prompt": False}),
    "system": ([SYSTEM, USER], {}),
    "turns": ([SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": ""}, USER], {}),
    "tools": ([USER], {"tools": TOOLS}),
    "system and tools": ([SYSTEM, USER], {"tools": TOOLS, "enable_thinking": False, "tools_first": False}),
    "a call": ([USER, {"role": "assistant", "content": "", "tool_calls": CALLS[:1]}, RESULTS[0]], {"tools": TOOLS}),
    "calls without content": (
        [USER, {"role": "assistant", "content": None, "tool_calls": CALLS}, *RESULTS, ANSWER, USER],
        {"tools": TOOLS, "date_string": "1 Jan 2026"},
    ),
    "thoughts apart": ([USER, ANSWER | {"reasoning_content": "\nso so\n"}, USER], {"enable_thinking": True}),
    "two questions": ([USER, USER], {}),
    "only a system message": ([SYSTEM], {"tools": TOOLS[:1]}),
}
