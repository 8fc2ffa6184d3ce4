"""A conversation keeps its cache: each turn computes only what is new, and says what a fresh start would say."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.engine.output import Completion, Piece
from kvik.engine.session import Session
from kvik.errors import InvalidInput, PromptTooLong, StepFailed
from models import FloatArray, assert_idle, num_common_tokens, run
from runners import failing, watched_engine

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)


def answer(session: Session, params: SamplingParams = PARAMS) -> Completion:
    *_, last = session.stream(params)
    assert last.completion is not None
    return last.completion


def assert_fresh(session: Session, llm: LLM, prompt: list[int], completion: Completion) -> None:
    """A new engine gives the same, and the bits of the logits on the way are the same too."""
    fresh = run(Engine(llm.model), prompt, PARAMS)
    assert completion.token_ids == fresh.token_ids
    assert completion.text == session.messages[-1]["content"]


@pytest.fixture
def session(llm: LLM) -> Session:
    return Session(llm, system="You are terse.")


def test_messages_are_kept_in_order(llm: LLM, session: Session) -> None:
    session.append("user", "Hello")
    completion = answer(session)
    assert session.messages == [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": completion.text},
    ]
    assert Session(llm).messages == []


def test_each_turn_computes_only_what_is_new(llm: LLM, session: Session) -> None:
    known: list[int] = []  # tokens whose keys and values the turn before left in the cache
    for question in ("Why is the sky blue?", "And the sea?", "Thank you. " * 8):
        session.append("user", question)
        prompt = llm.render_chat(session.messages)
        completion = answer(session)
        stats = completion.stats
        assert stats.num_cached_tokens == min(num_common_tokens(known, prompt), len(prompt) - 1)
        assert stats.num_cached_tokens > 0 or not known
        assert stats.num_computed_tokens == len(prompt) - stats.num_cached_tokens + 9
        assert_fresh(session, llm, prompt, completion)
        known = [*prompt, *completion.token_ids[:-1]]
    session.close()
    assert_idle(llm.engine)


def test_the_logits_of_a_later_turn_are_those_of_a_fresh_run(llm: LLM, session: Session) -> None:
    rows: list[FloatArray] = []
    step = llm.engine.step

    def recorded() -> object:
        result = step()
        assert result is not None
        rows.extend(result.logits)
        return result

    session.append("user", "One")
    answer(session)
    session.append("user", "Two")
    prompt = llm.render_chat(session.messages)
    llm.engine.step = recorded  # type: ignore[method-assign, assignment]
    completion = answer(session)
    assert completion.stats.num_cached_tokens > 0
    fresh = run(Engine(llm.model), prompt, PARAMS)
    np.testing.assert_array_equal(np.stack(rows).view(np.uint32), fresh.logits.view(np.uint32))


def test_without_the_cache_every_turn_computes_everything_and_says_the_same(llm: LLM, session: Session) -> None:
    naive = Session(llm, system="You are terse.", use_cache=False)
    for question in ("Why?", "Why not?"):
        completions = []
        for one in (session, naive):
            one.append("user", question)
            completions.append(answer(one))
        assert completions[0].token_ids == completions[1].token_ids
        length = completions[1].stats.num_prompt_tokens
        assert completions[1].stats.num_cached_tokens == 0
        assert completions[1].stats.num_computed_tokens == 10 * length + 45
    assert session.messages == naive.messages


@pytest.mark.parametrize("num_pieces", [0, 1, 5])
def test_a_turn_that_is_left_keeps_what_it_said_and_what_it_computed(
    llm: LLM, session: Session, num_pieces: int
) -> None:
    session.append("user", "A long story, please")
    stream = session.stream(PARAMS)
    said = "".join(piece.text for piece in islice(stream, num_pieces))
    stream.close()  # type: ignore[attr-defined]
    if num_pieces:  # a stream that was never asked for anything said nothing
        assert session.messages[-1]["role"] == "assistant"
        assert session.messages[-1]["content"].startswith(said)
    session.append("user", "Go on")
    prompt = llm.render_chat(session.messages)
    completion = answer(session)
    assert (completion.stats.num_cached_tokens > 0) == (num_pieces > 0)
    assert_fresh(session, llm, prompt, completion)
    session.close()
    assert_idle(llm.engine)


def test_should_stop_ends_a_turn_between_steps(llm: LLM, session: Session) -> None:
    session.append("user", "Hello")
    pieces: list[Piece] = []
    for piece in session.stream(PARAMS, should_stop=lambda: len(pieces) == 4):
        pieces.append(piece)
    assert len(pieces) == 4
    assert session.completion is not None
    assert session.completion.finish_reason == "abort"
    assert len(session.completion.token_ids) == 4
    session.append("user", "Again")
    assert answer(session).stats.num_cached_tokens > 0


def test_the_newest_completion_can_be_asked_for(session: Session) -> None:
    assert session.completion is None
    session.append("user", "Hello")
    stream = session.stream(PARAMS)
    next(stream)
    assert session.completion is None
    *_, last = stream
    assert session.completion == last.completion
    session.close()
    assert session.completion is None


def test_an_exception_in_a_turn_can_be_survived(llm: LLM) -> None:
    llm.engine, runner = watched_engine(llm.model, llm.config)
    session = Session(llm)
    session.append("user", "Hello")
    runner.before = failing(ZeroDivisionError())
    with pytest.raises(StepFailed, match="ZeroDivisionError"):
        answer(session)
    assert_idle(llm.engine)
    session.append("user", "Hello?")
    prompt = llm.render_chat(session.messages)
    assert_fresh(session, llm, prompt, answer(session))
    session.close()
    assert_idle(llm.engine)


def test_a_conversation_past_the_context_is_refused_and_keeps_its_cache(llm: LLM, session: Session) -> None:
    session.append("user", "Hello")
    answer(session)
    session.append("user", "x" * 5000)
    with pytest.raises(PromptTooLong):
        session.stream(PARAMS)
    del session.messages[-1]
    session.append("user", "Short")
    assert answer(session).stats.num_cached_tokens > 0


def test_a_new_turn_before_the_last_one_ended_is_right(llm: LLM, session: Session) -> None:
    """The stream that was left behind can bring nothing to an end, and holds nothing for ever."""
    session.append("user", "Hello")
    left = session.stream(PARAMS)
    next(left)
    session.append("user", "No, wait")
    prompt = llm.render_chat(session.messages)
    completion = answer(session)
    assert completion.token_ids == run(Engine(llm.model), prompt, PARAMS).token_ids
    left.close()  # type: ignore[attr-defined]
    session.close()
    assert_idle(llm.engine)


def test_two_sessions_share_one_pool(tiny_path: Path) -> None:
    llm = LLM(str(tiny_path), threads=1)
    sessions = [Session(llm, system=system) for system in ("You are a cat.", "You are a dog.")]
    alone = [Session(LLM(str(tiny_path), threads=1), system=session.messages[0]["content"]) for session in sessions]
    for question in ("Who are you?", "Really?"):
        for session in (*sessions, *alone):
            session.append("user", question)
        streams = [session.stream(PARAMS) for session in sessions]
        for _ in range(10):
            for stream in streams:
                next(stream)
        for stream in streams:
            assert next(stream, None) is None
        for session, other in zip(sessions, alone, strict=True):
            assert answer(other).text == session.messages[-1]["content"]
    held = [session.completion for session in sessions]
    assert all(completion is not None and completion.stats.kv_bytes > 0 for completion in held)
    for session in sessions:
        session.close()
        session.close()
    assert_idle(llm.engine)


def test_stop_strings_are_not_in_the_conversation(session: Session) -> None:
    session.append("user", "Hello")
    whole = answer(session).text
    del session.messages[-1]
    stop = whole[4:6]
    completion = answer(session, dataclasses.replace(PARAMS, stop=(stop,)))
    assert completion.text == whole[: whole.index(stop)] == session.messages[-1]["content"]


def test_a_session_that_is_forgotten_gives_its_blocks_back(llm: LLM) -> None:
    for _ in range(20):
        session = Session(llm)
        session.append("user", "Hello")
        answer(session)
        del session
    assert_idle(llm.engine)
    with Session(llm) as session:
        session.append("user", "Hello")
        next(session.stream(PARAMS))
    del session
    assert_idle(llm.engine)


def test_closing_in_the_middle_of_an_answer_ends_it(llm: LLM, session: Session) -> None:
    session.append("user", "Hello")
    stream = session.stream(PARAMS)
    next(stream)
    session.close()
    assert list(stream) == []
    assert_idle(llm.engine)


def test_a_message_that_is_no_text_is_refused(session: Session) -> None:
    with pytest.raises(InvalidInput, match=r"messages\[\d\] has no '(role|content)' of text"):
        session.append("user", 5)  # type: ignore[arg-type]
    assert all(message["role"] == "system" for message in session.messages)


def test_a_stream_that_starts_after_its_session_has_moved_on_keeps_no_blocks(llm: LLM, session: Session) -> None:
    session.append("user", "Hello")
    superseded = session.stream(PARAMS)
    closed = session.stream(PARAMS)
    session.close()
    messages = list(session.messages)
    for stream in (superseded, closed):
        assert list(stream) == [], "a closed session begins no turn"
        assert_idle(llm.engine)
    assert session.messages == messages
    assert_idle(llm.engine)
