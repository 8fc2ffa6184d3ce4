"""A small tokenizer of every kind that model families publish, trained here, as a checkpoint folder and as GGUF."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kvik.text.tokenizer_gguf import TokenType

CORPUS = (
    "the quick brown fox jumps over the lazy dog; the dog isn't amused, they'll say. It's 2024 or 12345, 3.14159.\n",
    "Æblegrød på øen, Ærø! Größe und Übermut. 你好,世界! Привет, мир. नमस्ते दुनिया HELLO McDonald iPhone\n\n",
    "for (int i = 0; i < 10; i++) {\n    total += i;\n\t\treturn x ** 2;\r\n}\n        aaaa aaaaaaa   \n",
    "don't and It's 1 22 333 4444 55555 $5.00 100% a_b __init__ http://example.org/?q=1&r=2 👩‍🚀🙂\n",
)
SIZE = 700  # tokens to learn

CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4 = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}|{REST}"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{REST}"
)
SEED = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ\u30a0-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}",
)


@dataclass(frozen=True)
class Kind:
    """One kind of tokenizer: what the library makes of it, and what stands beside it in the folder."""

    library: tokenizers.Tokenizer
    config: dict[str, Any]
    gguf: dict[str, Any] | None = None  # what GGUF metadata say beyond the vocabulary; None: there is no such kind
    scores: list[float] | None = None
    model: str = "gpt2"  # in GGUF, where there are no scores
    tokenizer_class: str = "PreTrainedTokenizerFast"
    lossless: bool = True  # decoding gives back what was encoded
    generation: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write the checkpoint folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.library.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": self.tokenizer_class, "clean_up_tokenization_spaces": False} | self.config
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if self.generation:
            (folder / "generation_config.json").write_text(json.dumps(self.generation))
        return folder

    @property
    def num_tokens(self) -> int:
        return 1 + max(self.library.get_vocab().values())

    @property
    def added_names(self) -> list[str]:
        return [token.content for token in self.library.get_added_tokens_decoder().values()]

    def metadata(self) -> dict[str, Any]:
        """The vocabulary as the usual converter writes it."""
        assert self.gguf is not None
        added = self.library.get_added_tokens_decoder()
        has_bytes = self.scores is not None or self.model == "gemma4"  # tokens for those of missing characters
        tokens = [self.library.id_to_token(token_id) or "" for token_id in range(self.num_tokens)]
        types = []
        for token_id, token in enumerate(tokens):
            kind = TokenType.NORMAL
            if token_id in added:
                kind = TokenType.CONTROL if added[token_id].special else TokenType.USER_DEFINED
            if token == "<unk>" and has_bytes:
                kind = TokenType.UNKNOWN
            if token.startswith("<0x") and has_bytes:
                kind = TokenType.BYTE
            types.append(int(kind))
        values: dict[str, Any] = {"model": self.model, "tokens": tokens, "token_type": types}
        if self.scores is None:
            pairs = json.loads(self.library.to_str())["model"]["merges"]
            values["merges"] = [" ".join(pair) for pair in pairs]
        else:
            values |= {"model": "llama", "scores": [*self.scores, *[-1000.0] * (len(tokens) - len(self.scores))]}
        for role in ("bos", "eos"):
            if name := self.config.get(f"{role}_token"):
                values[f"{role}_token_id"] = self.library.token_to_id(name)
        metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
        return metadata | self.gguf


def special(*names: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False, **flags) for name in names]


def bos_first(name: str, token_id: int | None) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, token_id)]
    )


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    first: Sequence[str] = (),
    last: Sequence[AddedToken] = (),
    normalizer: normalizers.Normalizer | None = None,
    whole_words: bool = False,
) -> tokenizers.Tokenizer:
    """Byte-level BPE; the tokens `first` are part of the vocabulary, the tokens `last` follow it."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizer
    library.decoder = decoders.ByteLevel()
    if normalizer is not None:
        library.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=alphabet, special_tokens=list(first), show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    if whole_words:
        values = json.loads(library.to_str())
        model = values["model"]
        # Words that no merges make, and a control token among them.
        for word in ("\u0120unmerged", "xyzzy", "[INST]", "INST"):
            model["vocab"].setdefault(word, len(model["vocab"]))
        model["ignore_merges"] = True
        library = tokenizers.Tokenizer.from_str(json.dumps(values))
    library.add_special_tokens(special(*first))
    library.add_tokens(list(last))
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    return library


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)


def pieces(texts: Sequence[str]) -> list[str]:
    """The pieces of a SentencePiece vocabulary, best first."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=SIZE, show_progress=False))
    vocabulary = library.get_vocab()
    merged = [text for text in sorted(vocabulary, key=vocabulary.__getitem__) if len(text) > 1]
    spaces = ["\u2581" * length for length in (2, 4, 8, 3)]
    return list(dict.fromkeys([*spaces, *merged, *(text for text in vocabulary if len(text) == 1)]))


def sentencepiece(
    *, prefix: str, first: Sequence[str] = ("<unk>", "<s>", "</s>"), last: Sequence[AddedToken] = (), bos: str = "<s>"
) -> tuple[tokenizers.Tokenizer, list[float]]:
    """SentencePiece's BPE as transformers converts it, and the scores of its pieces.

    `prefix` says what puts a space before a text: `each` stretch of it by the normalizer, the `first` by the
    pre-tokenizer, or `none`.
    """
    learnt = pieces(CORPUS)
    tokens = {text: token_id for token_id, text in enumerate([*first, *BYTES, *learnt])}
    scores = [0.0] * (len(tokens) - len(learnt)) + [-float(rank) for rank in range(len(learnt))]
    found = []
    for rank, text in enumerate(learnt):
        parts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        found += [(rank, -len(left), left, right) for left, right in parts if left in tokens and right in tokens]
    merges = [(left, right) for _, _, left, right in sorted(found)]
    library = tokenizers.Tokenizer(models.BPE(tokens, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    marks = normalizers.Replace(" ", "\u2581")
    steps: list[decoders.Decoder] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "each":
        library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), marks])
    elif prefix == "first":
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        library.normalizer = marks
    library.decoder = decoders.Sequence(steps if prefix == "none" else [*steps, decoders.Strip(" ", 1, 0)])
    library.add_special_tokens(special(*first))
    library.add_tokens(list(last))
    library.post_processor = bos_first(bos, tokens[bos])
    return library, scores


def gpt2() -> Kind:
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return Kind(byte_level(PLAIN, ["<|endoftext|>"]), names, {"tokenizer.ggml.pre": "gpt-2"})


def smollm() -> Kind:
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), PLAIN])
    library = byte_level(digits, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return Kind(library, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, {"tokenizer.ggml.pre": "smollm"})


def granite() -> Kind:
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), PLAIN])
    library = byte_level(digits, ["<|end_of_text|>", "<fim_prefix>"], special("<|start_of_role|>"))
    names = {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"}
    return Kind(library, names, {"tokenizer.ggml.pre": "refact", "tokenizer.ggml.add_bos_token": False})


def llama3(with_bos: bool = True) -> Kind:
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "[INST]")
    library = byte_level(split(GPT4), last=special(*names), whole_words=True)
    if with_bos:
        bos = bos_first(names[0], library.token_to_id(names[0]))
        library.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    config = {"bos_token": names[0], "eos_token": names[2]}
    ends = [library.token_to_id(name) for name in names[1:3]]
    pre = "llama-bpe" if with_bos else "smaug-bpe"
    return Kind(library, config, {"tokenizer.ggml.pre": pre}, generation={"eos_token_id": ends})


def smollm3() -> Kind:
    return llama3(with_bos=False)


def qwen2() -> Kind:
    tools = [AddedToken(name, special=False, normalized=False) for name in ("<tool_call>", "<think>")]
    library = byte_level(
        split(GPT4.replace("{1,3}", "")),
        last=[*special("<|endoftext|>", "<|im_start|>", "<|im_end|>"), *tools],
        normalizer=normalizers.NFC(),
    )
    config = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    return Kind(library, config, {"tokenizer.ggml.pre": "qwen2"}, lossless=False)


def falcon() -> Kind:
    threes = pre_tokenizers.Split(tokenizers.Regex("[0-9][0-9][0-9]"), behavior="isolated")
    steps = [pre_tokenizers.Punctuation("contiguous"), PLAIN, pre_tokenizers.Digits(individual_digits=False), threes]
    library = byte_level(pre_tokenizers.Sequence(steps), [">>TITLE<<", ">>ANSWER<<", "<|endoftext|>"])
    return Kind(library, {"eos_token": "<|endoftext|>"}, {"tokenizer.ggml.pre": "falcon"})


def gpt_neox() -> Kind:
    spaces = [AddedToken(" " * length, special=False, normalized=True) for length in (24, 12, 5, 3, 2)]
    library = byte_level(PLAIN, ["<|endoftext|>", "<|padding|>"], spaces, normalizers.NFC())
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return Kind(library, names, {"tokenizer.ggml.pre": "mpt"}, lossless=False)


def opt() -> Kind:
    library = byte_level(PLAIN, ["<s>", "<pad>", "</s>", "<unk>"])
    library.post_processor = bos_first("</s>", library.token_to_id("</s>"))
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return Kind(library, names, {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": True})


def olmo2() -> Kind:
    library = byte_level(split(GPT4), last=special("<|endoftext|>", "<|pad|>"))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    return Kind(library, names, {"tokenizer.ggml.pre": "dbrx"})


def tekken() -> Kind:
    library = byte_level(split(TEKKEN), ["<unk>", "<s>", "</s>"], special("[INST]", "[/INST]"), whole_words=True)
    library.post_processor = bos_first("<s>", library.token_to_id("<s>"))
    return Kind(library, {"bos_token": "<s>", "eos_token": "</s>"}, {"tokenizer.ggml.pre": "tekken"})


def phi4_mini() -> Kind:
    library = byte_level(split(GPT4O), last=special("<|endoftext|>", "<|end|>", "<|user|>"))
    return Kind(library, {"bos_token": "<|endoftext|>", "eos_token": "<|end|>"}, {"tokenizer.ggml.pre": "gpt-4o"})


def glm4() -> Kind:
    names = ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>")
    library = byte_level(split(GPT4), last=special(*names), whole_words=True)
    return Kind(library, {"eos_token": "<|endoftext|>"}, {"tokenizer.ggml.pre": "glm4"})


def seed_oss() -> Kind:
    library = byte_level(split(SEED), ["<seed:bos>", "<seed:pad>", "<seed:eos>"], special("<seed:think>"))
    names = {"bos_token": "<seed:bos>", "eos_token": "<seed:eos>", "pad_token": "<seed:pad>"}
    return Kind(library, names, {"tokenizer.ggml.pre": "seed-coder"})


def hunyuan_dense() -> Kind:
    """Its cuts are DeepSeek V3's."""
    cuts = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in DEEPSEEK3]
    steps = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library = byte_level(steps, last=special("<|startoftext|>", "<|eos|>"))
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|eos|>"}
    return Kind(library, names, {"tokenizer.ggml.pre": "hunyuan-dense"})


def command_r() -> Kind:
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), PLAIN])
    first = ["<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>"]
    library = byte_level(digits, first, special("<|END_OF_TURN_TOKEN|>"), normalizers.NFC())
    library.post_processor = bos_first("<BOS_TOKEN>", library.token_to_id("<BOS_TOKEN>"))
    names = {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>"}
    keys = {"tokenizer.ggml.pre": "command-r", "tokenizer.ggml.add_bos_token": True}
    return Kind(library, names, keys, lossless=False)


LLAMA2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def llama2() -> Kind:
    library, scores = sentencepiece(prefix="each")
    return Kind(library, LLAMA2, {}, scores)


def llama2_not_legacy() -> Kind:
    library, scores = sentencepiece(prefix="first", last=special("[INST]"))
    # A text that starts with a space gets no other one, and decoding takes it off.
    return Kind(library, LLAMA2 | {"legacy": False}, None, scores, lossless=False)


def mistral() -> Kind:
    library, scores = sentencepiece(prefix="each", first=("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"))
    return Kind(library, LLAMA2, {"tokenizer.ggml.add_bos_token": True}, scores)


def without_prefix() -> Kind:
    library, scores = sentencepiece(prefix="none")
    return Kind(library, LLAMA2 | {"add_prefix_space": False}, {"tokenizer.ggml.add_space_prefix": False}, scores)


def gemma() -> Kind:
    tags = [AddedToken(name, special=False, normalized=False) for name in ("<table>", "</table>", "\n\n\n")]
    first = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    library, scores = sentencepiece(prefix="none", first=first, last=tags, bos="<bos>")
    library.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    ends = {"eos_token_id": [library.token_to_id(name) for name in ("<eos>", "<end_of_turn>")]}
    return Kind(library, config, {"tokenizer.ggml.add_space_prefix": False}, scores, generation=ends)


def gemma4() -> Kind:
    marks = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", '<|"|>')
    tags = [AddedToken(name, special=False, normalized=False) for name in (*marks, "\n\n\n")]
    first = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>")
    library, _ = sentencepiece(prefix="none", first=first, last=tags, bos="<bos>")
    library.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    ends = {"eos_token_id": [library.token_to_id(name) for name in ("<eos>", "<turn|>", "<|tool_response>")]}
    gguf = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}  # which no one believes
    return Kind(library, config, gguf, model="gemma4", generation=ends)


def phi3() -> Kind:
    end = [AddedToken("</s>", special=False, normalized=False, rstrip=True), *special("<|endoftext|>")]
    roles = special("<|assistant|>", "<|end|>", "<|user|>", rstrip=True)
    library, scores = sentencepiece(prefix="each", first=("<unk>", "<s>"), last=[*end, *roles])
    config = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    return Kind(library, config, {"general.architecture": "phi3"}, scores, lossless=False)


def unigram() -> Kind:
    library = tokenizers.Tokenizer(models.Unigram())
    library.normalizer = normalizers.NFKC()
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    library.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return Kind(library, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}, lossless=False)


KINDS: dict[str, Callable[[], Kind]] = {
    kind.__name__: cache(kind)
    for kind in chain(
        (gpt2, smollm, granite, llama3, smollm3, qwen2, falcon, gpt_neox, opt, olmo2, tekken, phi4_mini),
        (glm4, seed_oss, hunyuan_dense, command_r),
        (llama2, llama2_not_legacy, mistral, without_prefix, gemma, gemma4, phi3, unigram),
    )
}
