"""Beam search over branches of one sequence: a client of the engine, like any other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from kvik.config import MAX_BEAM_WIDTH, SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.lease import Lease
from kvik.engine.sequence import Sequence
from kvik.engine.stream import run_all
from kvik.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Beam:
    """One completion that a search found."""

    text: str
    token_ids: list[int]
    logprob: float  # natural, of all tokens together
    score: float  # logprob / number of tokens ** length_penalty
    finish_reason: str  # "stop" or "length"


@dataclass(frozen=True, slots=True)
class _Branch:
    """A beam that goes on: its tokens, and the lease of what was computed: all of them but the last."""

    token_ids: list[int]
    logprob: float
    lease: Lease | None  # others may go on from it too


def search_beams(
    engine: Engine, prompt: SequenceOf[int], *, width: int, max_tokens: int, length_penalty: float
) -> list[Beam]:
    """The `width` best completions, the best first; ends when none of the beams can become better than those found.

    Each step lets every beam's 2 * `width` likeliest next tokens compete (so that ends of text, which leave the search,
    cannot empty it) and keeps the best. Equal scores: the earlier beam, then the likelier token, then the lower id.
    """
    if type(width) is not int or not 1 <= width <= MAX_BEAM_WIDTH:
        raise InvalidInput(f"width is {width!r}", hint=f"give a whole number from 1 to {MAX_BEAM_WIDTH}")
    if type(length_penalty) not in (int, float) or not math.isfinite(length_penalty) or abs(length_penalty) > 10:
        raise InvalidInput(f"length_penalty is {length_penalty!r}", hint="give a number from -10 to 10; 0 is none")
    whole = engine.new_request(prompt, SamplingParams(max_tokens=max_tokens))  # raises what is wrong with it
    engine.check_room(whole)
    step = SamplingParams(max_tokens=1, logprobs=2 * width)
    max_length, ends = whole.max_total_tokens - len(prompt), whole.stop_token_ids
    beams, found = [_Branch([], 0.0, None)], list[Beam]()

    def finished(token_ids: list[int], logprob: float, reason: str) -> Beam:
        text = engine.model.tokenizer.decode(token_ids[:-1] if reason == "stop" else token_ids)
        return Beam(text, token_ids, logprob, logprob / len(token_ids) ** length_penalty, reason)

    try:
        for length in range(1, max_length + 1):
            sequences = _compute(engine, prompt, beams, step)
            leases = [sequence.lease for sequence in sequences]
            _close_all(beam.lease for beam in beams)
            candidates = [
                (beam.logprob + logprob, index, token_id)
                for index, (beam, sequence) in enumerate(zip(beams, sequences, strict=True))
                for token_id, logprob in sequence.logprobs[0].top.items()
            ]
            candidates.sort(key=lambda each: -each[0])
            going_on: list[_Branch] = []
            for logprob, index, token_id in candidates[: 2 * width]:
                token_ids = [*beams[index].token_ids, token_id]
                if token_id in ends:
                    found.append(finished(token_ids, logprob, "stop"))
                elif len(going_on) < width:
                    going_on.append(_Branch(token_ids, logprob, leases[index]))
            _close_all(lease for lease in leases if all(lease is not beam.lease for beam in going_on))
            beams = going_on
            if not beams:
                break
            found = sorted(found, key=lambda beam: -beam.score)[:width]
            # Every further token lowers a logprob, so a beam's best future score is bounded by what it has now.
            longest = max_length if length_penalty > 0 else length
            if len(found) == width and max(beam.logprob for beam in beams) / longest**length_penalty <= found[-1].score:
                break
        else:
            found += [finished(beam.token_ids, beam.logprob, "length") for beam in beams]
    finally:
        _close_all(beam.lease for beam in beams)
    return sorted(found, key=lambda beam: -beam.score)[:width]


def _compute(engine: Engine, prompt: SequenceOf[int], beams: list[_Branch], params: SamplingParams) -> list[Sequence]:
    """One more token for each beam, all in one batch: sequences with leases, and the logprobs of what may follow."""
    requests = [engine.new_request([*prompt, *beam.token_ids], params, hold=True, lease=beam.lease) for beam in beams]
    sequences = run_all(engine, [engine.new_sequence(request) for request in requests])
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error
    return sequences


def _close_all(leases: Iterable[Lease | None]) -> None:
    for lease in leases:
        if lease is not None:
            lease.close()
