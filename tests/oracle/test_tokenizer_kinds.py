"""Every kind of checkpoint folder: the ids and the text that transformers gives, and the same from GGUF."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kvik.text.tokenizer_gguf import GGUFTokenizer
from kvik.text.tokenizer_json import FolderTokenizer
from oracle.conftest import Report
from random_texts import random_texts
from tokenizer_kinds import KINDS

SEED = random.SystemRandom().randrange(2**32)
NUM_TEXTS = 2000


@pytest.mark.parametrize("name", KINDS)
def test_random_text_has_the_same_tokens_and_they_the_same_text(tmp_path: Path, report: Report, name: str) -> None:
    kind = KINDS[name]()
    folder = kind.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer = FolderTokenizer(folder, kind.num_tokens)
    gguf = GGUFTokenizer(kind.metadata(), name) if kind.gguf is not None else None
    texts = list(random_texts(random.Random(SEED), kind.added_names, NUM_TEXTS))
    expected = reference(texts)["input_ids"]
    assert [tokenizer.encode(text) for text in texts] == expected, SEED
    if gguf is not None:
        assert [gguf.encode(text) for text in texts] == expected, SEED
    for skip_special in (True, False):
        decoded = reference.batch_decode(expected, skip_special_tokens=skip_special)
        assert [tokenizer.decode(ids, skip_special=skip_special) for ids in expected] == decoded, SEED
    without = reference(texts, add_special_tokens=False)["input_ids"]
    assert [tokenizer.encode(text, add_special=False) for text in texts] == without, SEED
    report(f"seed {SEED}: {NUM_TEXTS} texts{' from the folder and GGUF' if gguf else ''}")


@pytest.mark.parametrize("name", KINDS)
def test_text_is_text_where_control_tokens_are_not_parsed(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]()
    folder = kind.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    reference.encode_special_tokens = True
    tokenizer = FolderTokenizer(folder, kind.num_tokens)
    for text in random_texts(random.Random(SEED), kind.added_names, NUM_TEXTS // 4):
        token_ids = tokenizer.encode(text, parse_special=False)
        expected = reference.encode(text).ids
        # transformers lets a word be a control token where the vocabulary has it as a word.
        made = tokenizer.special_token_ids.intersection(reference.encode(text, add_special_tokens=False).ids)
        assert token_ids == expected or made, (SEED, text)


@pytest.mark.parametrize("name", KINDS)
def test_special_tokens_are_the_same(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]()
    folder = kind.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer = FolderTokenizer(folder, kind.num_tokens)
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.bos_token_id == reference.bos_token_id
    assert reference.eos_token_id in tokenizer.eos_token_ids
    assert tokenizer.special_token_ids >= set(reference.all_special_ids)
