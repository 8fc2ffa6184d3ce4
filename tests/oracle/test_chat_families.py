"""Chat templates in the manner of the model families, from a checkpoint folder: transformers' bytes."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from kvik.errors import TemplateError
from kvik.text.chat_template import ChatTemplate
from kvik.text.tokenizer_config import chat_template_of
from template_families import CONVERSATIONS, FAMILIES
from tokenizer_kinds import KINDS


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's template in kvik and in transformers."""

    @cache
    def make(family: str, where: str) -> tuple[ChatTemplate, Any]:
        folder: Path = KINDS["llama2"]().save(tmp_path_factory.mktemp("family"))
        if where == "file":
            (folder / "chat_template.jinja").write_text(FAMILIES[family])
        else:
            path = folder / "tokenizer_config.json"
            named = [{"name": "default", "template": FAMILIES[family]}, {"name": "tool_use", "template": "{{ tools }}"}]
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
        template = chat_template_of(folder)
        assert template is not None
        return template, AutoTokenizer.from_pretrained(folder, local_files_only=True)

    return make


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_renders_as_in_transformers(both: Any, family: str, conversation: str) -> None:
    template, reference = both(family, "file")
    assert_same(template, reference, conversation)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_named_templates_are_chosen_as_in_transformers(both: Any, conversation: str) -> None:
    template, reference = both("qwen3", "config")
    assert_same(template, reference, conversation)


def assert_same(template: ChatTemplate, reference: Any, conversation: str) -> None:
    messages, options = CONVERSATIONS[conversation]
    try:
        expected = reference.apply_chat_template(messages, tokenize=False, **{"add_generation_prompt": True} | options)
    except (jinja2.TemplateError, TypeError) as error:
        with pytest.raises(TemplateError, match=re.escape(str(error))):
            template.render(messages, **options)
    else:
        assert template.render(messages, **options) == expected
