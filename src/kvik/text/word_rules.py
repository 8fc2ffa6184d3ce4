"""How families of byte-level vocabularies cut text into words: the rules that `tokenizer.ggml.pre` names.

Source: published tokenizer.json files, and for names llama.cpp's converter and vocabulary loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tokenizers
from tokenizers import pre_tokenizers


@dataclass(frozen=True, slots=True)
class WordRule:
    """How one family of byte-level vocabularies cuts text into the words that BPE then works on."""

    patterns: tuple[
        str, ...
    ] = ()  # each cuts what the one before left whole; (): GPT-2's, which `tokenizers` has built in
    digits_alone: bool = False  # every digit is a word of its own
    digits_in_threes: bool = False  # Falcon: punctuation and numbers apart, three digits at a time from the left
    whole_words: bool = False  # a word that is a token stays whole, whatever the merges say
    nfc: bool = False
    add_bos: bool = False  # where the file does not say

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The cutting, and the characters that stand for bytes."""
        if self.patterns:
            cuts: list[pre_tokenizers.PreTokenizer] = [
                pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in self.patterns
            ]
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            return pre_tokenizers.Sequence([*cuts, byte_level])
        before: list[pre_tokenizers.PreTokenizer] = []
        after: list[pre_tokenizers.PreTokenizer] = []
        if self.digits_alone:
            before = [pre_tokenizers.Digits(individual_digits=True)]
        if self.digits_in_threes:
            before = [pre_tokenizers.Punctuation(behavior="contiguous")]
            threes = pre_tokenizers.Split(tokenizers.Regex("[0-9][0-9][0-9]"), behavior="isolated")
            after = [pre_tokenizers.Digits(individual_digits=False), threes]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre_tokenizers.Sequence([*before, byte_level, *after])


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _gpt4_pattern(digits: str) -> str:
    """The pattern that GPT-4's cl100k introduced, with a family's own idea of a run of digits."""
    alternatives = (
        _CONTRACTIONS,
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
    return "|".join(alternatives)


def _gpt4o_pattern(digits: str, suffix: str) -> str:
    """The pattern that GPT-4o's o200k introduced: a word may begin in capitals and go on without."""
    upper = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
    lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    alternatives = (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{suffix}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{suffix}",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
    return "|".join(alternatives)


_GPT2 = WordRule()
_GPT_NEOX = WordRule(nfc=True)
_DIGITS_ALONE = WordRule(digits_alone=True)
_GPT4 = _gpt4_pattern(r"\p{N}{1,3}")
_GPT4O = WordRule((_gpt4o_pattern(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),))
_LLAMA3 = WordRule((_GPT4,), whole_words=True, add_bos=True)
_QWEN2 = _gpt4_pattern(r"\p{N}")
_DEEPSEEK3 = WordRule(
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",  # Chinese and Japanese
        "|".join(
            (
                r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
                r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
                r" ?[\p{P}\p{S}]+[\r\n]*",
                r"\s*[\r\n]+",
                r"\s+(?!\S)",
                r"\s+",
            )
        ),
    )
)
_SEED = "|".join(
    (
        _CONTRACTIONS,
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1}",
        r" ?[^\s\p{L}\p{N}\r\n]+",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Converters tell vocabularies apart by the ids that they give a sample text, and write the name of the first model
# that had these: a name stands for all the families beside it.
WORD_RULES: Mapping[str, WordRule] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "mpt": _GPT_NEOX,  # GPT-NeoX and Pythia, too
    "olmo": _GPT_NEOX,
    "falcon": WordRule(digits_in_threes=True),
    "smollm": _DIGITS_ALONE,
    "starcoder": _DIGITS_ALONE,
    "refact": _DIGITS_ALONE,  # Granite 3, too
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": WordRule((_GPT4,), whole_words=True),  # Llama 3's vocabulary without BOS: SmolLM3
    "dbrx": WordRule((_GPT4,)),  # OLMo 2, Phi-4 and Granite 4, too
    "qwen2": WordRule((_QWEN2,), nfc=True),
    "tekken": WordRule((_gpt4o_pattern(r"\p{N}", ""),), whole_words=True, add_bos=True),
    "gpt-4o": _GPT4O,  # Phi-4-mini, too
    "falcon3": _LLAMA3,
    "deepseek-r1-qwen": WordRule((_QWEN2,)),
    "deepseek-v3": _DEEPSEEK3,
    "hunyuan-dense": _DEEPSEEK3,
    "hunyuan": WordRule((_QWEN2,)),
    "exaone4": _GPT2,
    "chatglm-bpe": WordRule((_GPT4,)),
    "glm4": WordRule((_GPT4,), whole_words=True),
    "seed-coder": WordRule((_SEED,)),  # Seed-OSS, too
    "command-r": WordRule(digits_alone=True, nfc=True),
}
"""By `tokenizer.ggml.pre`."""
