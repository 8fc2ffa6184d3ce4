"""The default model's tokenizer against the one that transformers builds from the same file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from kvik.errors import InvalidInput
from kvik.files.gguf import read_gguf
from kvik.text.chat_template import ChatTemplate
from kvik.text.detokenizer import Detokenizer
from kvik.text.tokenizer import Tokenizer
from kvik.text.tokenizer_gguf import GGUFTokenizer
from oracle.conftest import Report
from random_texts import random_texts

SEED = random.SystemRandom().randrange(2**32)
NUM_TEXTS = 3000

TEMPLATE = """{{- bos_token -}}
{%- set ns = namespace(count=0) %}
{% for tool in tools or [] %}
    {{ tool | tojson }} {{- tool.function | tojson(indent=4) }}
{% endfor %}
{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
{% generation %}{{ message.role.upper() ~ ': ' ~ message['content'] | trim }}{% endgeneration %}
{% if loop.index0 == 3 %}{% break %}{% endif %}

{% endfor %}
{{ ns.count }} {{ messages[::-1][0].content[:5] }} {{ documents }} {{ none_such }} {{ '%s' % none }} {{ dict(a=[1.0]) }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }} {{ thinking }}
{% if add_generation_prompt %}{{ strftime_now('%Y') }}<go>{% endif %}
"""


@pytest.fixture(scope="module")
def tokenizer(default_model_path: Path) -> Tokenizer:
    return GGUFTokenizer(read_gguf(default_model_path).metadata, default_model_path.name)


@pytest.fixture(scope="module")
def hf_tokenizer(default_model_path: Path) -> Any:
    loaded = AutoTokenizer.from_pretrained(
        default_model_path.parent, gguf_file=default_model_path.name, local_files_only=True
    )
    # The published tokenizer.json cuts out each digit first; transformers' GGUF reader knows no rules by name.
    loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return loaded


@pytest.mark.parametrize("parse_special", [True, False])
def test_random_text_has_the_same_tokens(
    tokenizer: Tokenizer, hf_tokenizer: Any, report: Report, parse_special: bool
) -> None:
    generator = random.Random(SEED)
    names = [tokenizer.token_text(token_id) for token_id in sorted(tokenizer.special_token_ids)]
    hf_tokenizer.backend_tokenizer.encode_special_tokens = not parse_special
    num_refused = 0
    for text in random_texts(generator, names, NUM_TEXTS):
        expected = hf_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        whole = hf_tokenizer.decode(expected, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        try:
            token_ids = tokenizer.encode(text, parse_special=parse_special)
        except InvalidInput:
            # transformers drops or replaces the bytes that the vocabulary lacks; kvik says so.
            assert whole != text, (SEED, text)
            num_refused += 1
            continue
        assert token_ids == expected, (SEED, text)
        assert tokenizer.decode(token_ids, skip_special=False) == text, (SEED, text)
    assert num_refused < NUM_TEXTS // 4
    report(f"seed {SEED}: {NUM_TEXTS - num_refused} texts with the same tokens, {num_refused} refused")


@pytest.mark.parametrize("skip_special", [True, False])
def test_random_tokens_have_the_same_text(
    tokenizer: Tokenizer, hf_tokenizer: Any, report: Report, skip_special: bool
) -> None:
    generator = random.Random(SEED)
    for _ in range(NUM_TEXTS):
        token_ids = [generator.randrange(tokenizer.vocab_size) for _ in range(generator.randint(0, 30))]
        expected = hf_tokenizer.decode(token_ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
        streamed = "".join(map(detokenizer.add, token_ids)) + detokenizer.finish()
        assert tokenizer.decode(token_ids, skip_special=skip_special) == streamed == expected, (SEED, token_ids)
    report(f"seed {SEED}: {NUM_TEXTS} sequences with the same text")


def test_special_tokens_are_the_same(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    assert tokenizer.bos_token_id == hf_tokenizer.bos_token_id
    assert hf_tokenizer.eos_token_id in tokenizer.eos_token_ids
    assert tokenizer.vocab_size == len(hf_tokenizer)


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False, "thinking": True}], ids=["plain", "options"])
@pytest.mark.parametrize("num_tools", [0, 2])
def test_a_template_of_every_kind_renders_the_same(hf_tokenizer: Any, options: dict[str, Any], num_tools: int) -> None:
    function = {
        "name": "f",
        "description": "<b>&'\"é\u2028",
        "parameters": {"type": "object", "x": [1, 2.5, None, True]},
    }
    tools = [{"type": "function", "function": function}] * num_tools or None
    messages = [
        {"role": role, "content": f" {role} <{number}> & '\"\n é\u0301 \U0001f642\t\r\n"}
        for number, role in enumerate(("system", "user", "tool", "assistant", "user", "user"))
    ]
    ours = ChatTemplate(TEMPLATE, bos_token=hf_tokenizer.bos_token, eos_token=hf_tokenizer.eos_token, name="test")
    expected = hf_tokenizer.apply_chat_template(
        messages, tools, chat_template=TEMPLATE, tokenize=False, **{"add_generation_prompt": True} | options
    )
    assert ours.render(messages, tools=tools, **options) == expected
