"""Grammars compiled by llguidance (the extra `kvik[server]`), within limits on what strangers may ask for.

A compiled grammar is shared as its text alone: llguidance's matchers grow an automaton as they go, with a limit, and
copies of one share it, so that a text of one request would show in what becomes of another's. Each is built anew.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, TypeVar, cast

from kvik.errors import GrammarFailed, InvalidGrammar, InvalidInput
from kvik.text.constraint import Constraint, Matcher, allows, any_allowed, num_mask_bytes
from kvik.text.grammar import Code, Grammar
from kvik.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

T = TypeVar("T")

MAX_CACHED_GRAMMARS = 256
MAX_CACHED_BYTES = 8 << 20
"""Of the texts of all grammars that are remembered, which is all that is kept of them."""

TOKENIZER_TOKEN_BYTES = 1 << 10
MATCHER_BYTES = 8 << 20
"""What llguidance takes for each token of the vocabulary, once, and for a completion at most: both measured."""

# What keeps each compilation below half a second, and each step of a matcher below some milliseconds.
INITIAL_LEXER_FUEL = 100_000
MAX_GRAMMAR_SIZE = 50_000
MAX_LEXER_STATES = 20_000
STEP_MAX_ITEMS = 5_000

_SIGNS_OF_A_LIMIT = ("too big", "too many", "too large", "too complex", "too deep", "limit exceeded", "fuel")
_MAX_MESSAGE_CHARACTERS = 300


class GrammarCompiler:
    """Compiles grammars for one model, from any thread, and remembers those used last."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size  # of the model, which may exceed the tokenizer's
        self._known: OrderedDict[Grammar, Constraint] = OrderedDict()
        self._num_bytes = 0  # of their texts
        self._lock = Lock()
        self._building = Lock()  # the tokenizer, once

    def max_num_bytes(self, num_running: int) -> int:
        """Most memory of grammars, where so many completions follow one at once."""
        return MAX_CACHED_BYTES + self.vocab_size * TOKENIZER_TOKEN_BYTES + num_running * MATCHER_BYTES

    @property
    def num_cached_bytes(self) -> int:
        """Bytes of the texts that are remembered."""
        return self._num_bytes

    @property
    def num_cached(self) -> int:
        """Grammars that need not be compiled again."""
        return len(self._known)

    def compile(self, grammar: Grammar) -> Constraint:
        """A constraint by this grammar. Raises `InvalidGrammar`, and `InvalidInput` where llguidance is missing."""
        if not isinstance(grammar, Grammar):
            raise InvalidInput(
                f"grammar is a {type(grammar).__name__}", hint="give Grammar.json_schema(...) or the like"
            )
        with self._lock:
            if grammar in self._known:
                self._known.move_to_end(grammar)
                return self._known[grammar]
        self._check(grammar)
        constraint = _GrammarConstraint(self, grammar)
        with self._lock:
            if grammar not in self._known:
                self._num_bytes += grammar.num_bytes
            self._known[grammar] = constraint
            while len(self._known) > MAX_CACHED_GRAMMARS or self._num_bytes > MAX_CACHED_BYTES:
                oldest, _ = self._known.popitem(last=False)
                self._num_bytes -= oldest.num_bytes
        return constraint

    def new_library_matcher(self, grammar: Grammar) -> LLMatcher:
        """llguidance's matcher at the beginning of a text; it never raises, and says itself what is wrong with it."""
        from llguidance import LLMatcher

        with self._building:
            tokenizer, limits = self._tokenizer, self._limits
        return LLMatcher(tokenizer, _source(grammar), log_level=0, limits=limits)

    def _check(self, grammar: Grammar) -> None:
        """Raise `InvalidGrammar` for one that has no text; only the first mask shows some of them."""
        try:
            matcher = self.new_library_matcher(grammar)
        except ImportError as error:
            raise InvalidInput(
                f"a grammar needs llguidance, which is not installed: {error}", hint="pip install 'kvik[server]'"
            ) from None
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        code: Code = "invalid_json_schema" if grammar.kind == "json_schema" else "invalid_grammar"
        if matcher.is_error():
            message = _one_line(matcher.get_error())
            if any(sign in message.lower() for sign in _SIGNS_OF_A_LIMIT):
                code = "grammar_too_complex"
            raise InvalidGrammar(f"the grammar is refused: {message}", hint=_HINTS[code], code=code)
        if warnings := matcher.get_grammar_warnings():
            raise InvalidGrammar(
                f"the grammar would not be followed in full: {_one_line(warnings[0])}", hint=_HINTS[code], code=code
            )
        if not any_allowed(cut(mask, self.vocab_size)):
            raise InvalidGrammar("no token of the model begins such a text", hint=_HINTS[code], code=code)

    @cached_property
    def _limits(self) -> LLParserLimits:
        from llguidance import LLParserLimits

        return LLParserLimits(
            initial_lexer_fuel=INITIAL_LEXER_FUEL,
            max_grammar_size=MAX_GRAMMAR_SIZE,
            max_lexer_states=MAX_LEXER_STATES,
            step_max_items=STEP_MAX_ITEMS,
            verbose_errors=False,
        )

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        vocabulary = _Vocabulary(self.tokenizer, num_mask_bytes(self.vocab_size) * 8)
        # It takes any object with the fields of its own wrapper, which would swallow every exception.
        vocabulary.library = LLTokenizer(cast("TokenizerWrapper", vocabulary), eos_token=vocabulary.end_ids)
        return vocabulary.library


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, num_tokens: int) -> None:
        self._tokenizer = tokenizer
        self.library: LLTokenizer | None = None
        special, known = tokenizer.special_token_ids, range(min(tokenizer.vocab_size, num_tokens))
        self.tokens = [tokenizer.token_bytes(token_id, skip_special=token_id not in special) for token_id in known]
        self.tokens += [b""] * (num_tokens - len(self.tokens))  # which never come
        self.end_ids = sorted(tokenizer.eos_token_ids)
        if not self.end_ids:  # the library wants one: it lies beyond every mask
            self.end_ids = [len(self.tokens)]
            self.tokens.append(b"<end of text>")
        self.eos_token_id = self.end_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.special_token_ids.union(self.end_ids))

    def __call__(self, text: str) -> list[int]:
        """The token ids of text that must come, whatever happens: to the library an exception is a panic."""
        try:
            token_ids = self._tokenizer.encode(text, add_special=False, parse_special=False)
            if b"".join(self.tokens[token_id] for token_id in token_ids) == text.encode():
                return token_ids
        except Exception:  # noqa: BLE001
            pass
        # Some vocabularies put a space before each text.
        return [] if self.library is None else self.library.greedy_tokenize(text)


class _GrammarConstraint(Constraint):
    """A grammar that was compiled once, and so can be again."""

    def __init__(self, compiler: GrammarCompiler, grammar: Grammar) -> None:
        self.tokenizer = compiler.tokenizer
        self.vocab_size = compiler.vocab_size
        self.grammar = grammar
        self._compiler = compiler

    def new_matcher(self) -> Matcher:
        """See Constraint."""
        return _GrammarMatcher(self)

    def new_library_matcher(self) -> LLMatcher:
        """llguidance's own, at the beginning of a text."""
        return self._compiler.new_library_matcher(self.grammar)


class _GrammarMatcher(Matcher):
    """`Matcher` over llguidance's, which computes with the interpreter lock released."""

    __slots__ = ("_accepted", "_constraint", "_has_mask", "_has_strayed", "_matcher")

    def __init__(self, constraint: _GrammarConstraint) -> None:
        self._constraint = constraint
        self._accepted: list[int] = []
        self._has_mask = False  # of the next token
        self._has_strayed = False  # drafts were looked at
        self._matcher = constraint.new_library_matcher()

    @property
    def is_finished(self) -> bool:
        """See Matcher."""
        return self._matcher.is_stopped()

    def masks(self, draft_ids: Sequence[int] = ()) -> list[bytes]:
        """See Matcher. Of text that must come a mask allows only the usual tokens, so it may refuse valid drafts."""
        found = [self._or_again(self._mask)]
        self._has_mask = True
        num_ahead = 0
        try:
            for token_id in draft_ids[: self._num_before_end(draft_ids)]:
                if not allows(found[-1], token_id):
                    break
                self._has_strayed = True
                self._consume(token_id)
                num_ahead += 1
                if self.is_finished:
                    break
                found.append(self._mask())
            if num_ahead and not self._matcher.rollback(num_ahead):
                raise self._failed()
        except GrammarFailed:  # behind a draft that may not be chosen
            self._start_again()
        return found

    def accept(self, token_id: int) -> None:
        """See Matcher."""
        self._or_again(lambda: self._consume(token_id))
        self._accepted.append(token_id)
        self._has_mask = False

    def count_valid(self, token_ids: Sequence[int]) -> int:
        """See Matcher."""
        self._has_strayed = True
        return self._matcher.validate_tokens(list(token_ids[: self._num_before_end(token_ids)]))

    def _or_again(self, act: Callable[[], T]) -> T:
        """Act; where that fails, and drafts may be why, once more as if there had been none.

        What was looked at for drafts counts towards the library's limits, and it never recovers from a failure.
        """
        try:
            return act()
        except GrammarFailed:
            if not self._has_strayed:
                raise
            self._start_again()
            return act()

    def _start_again(self) -> None:
        """Come to the same place by the tokens that were chosen, and by each one's mask, alone."""
        self._matcher = self._constraint.new_library_matcher()
        self._has_strayed = False
        for token_id in self._accepted:
            self._mask()
            self._consume(token_id)
        if self._has_mask:
            self._mask()

    def _num_before_end(self, token_ids: Sequence[int]) -> int:
        ends = self._constraint.tokenizer.eos_token_ids
        return next((index for index, token_id in enumerate(token_ids) if token_id in ends), len(token_ids))

    def _consume(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise self._failed()

    def _mask(self) -> bytes:
        mask = cut(self._matcher.compute_bitmask(), self._constraint.vocab_size)
        if self._matcher.is_error() or not any_allowed(mask):
            raise self._failed()
        return mask

    def _failed(self) -> GrammarFailed:
        reason = _one_line(self._matcher.get_error()) or "no token of the model goes on from here"
        return GrammarFailed(
            f"the grammar cannot be followed any further: {reason}", hint=_HINTS["grammar_too_complex"]
        )


def _source(grammar: Grammar) -> str:
    """The grammar in the library's own format, which is what the others become."""
    from llguidance import LLMatcher

    kind, text = grammar.kind, grammar.text
    if grammar.before is not None:
        inner: dict[str, object] = {"lark_grammar": text}
        if kind == "json_schema":
            inner = {"json_schema": json.loads(text)}
        elif kind == "regex":
            (inner,) = json.loads(LLMatcher.grammar_from_regex(text))["grammars"]
        return json.dumps({"grammars": [{"lark_grammar": grammar.before}, inner | {"name": "answer"}]})
    if kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(text)
    return (LLMatcher.grammar_from_regex if kind == "regex" else LLMatcher.grammar_from_lark)(text)


def cut(bits: bytes, vocab_size: int) -> bytes:
    """The library's mask as the sampler takes it."""
    return bits[: num_mask_bytes(vocab_size)]


_HINTS: dict[Code, str] = {
    "invalid_json_schema": "llguidance's documentation lists the keywords of JSON schemas that can be followed",
    "invalid_grammar": "correct it; patterns have no look-around and no back references",
    "grammar_too_complex": "make it simpler: fewer alternatives, shorter repeats, longer lexemes",
}


def _one_line(error: str) -> str:
    """An error of llguidance without its tail of parser state."""
    text = " ".join(error.replace("<non-verbose/>", " ").split())
    if text.startswith("NoExtension"):
        return "no text satisfies it"
    return text if len(text) <= _MAX_MESSAGE_CHARACTERS else text[:_MAX_MESSAGE_CHARACTERS] + "…"
