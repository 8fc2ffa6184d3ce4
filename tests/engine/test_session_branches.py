"""Sessions that branch, go back, are pinned, or lose their blocks to others: the text is that of a fresh start."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.events import StepEvent
from kvik.engine.llm import LLM
from kvik.engine.session import Session
from kvik.errors import CacheTooSmall, InvalidInput
from models import assert_idle, run

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)


def ask(session: Session, question: str) -> str:
    """One turn; it must say what a fresh engine says of the same messages."""
    session.append("user", question)
    prompt = session.llm.render_chat(session.messages)
    completion = session.generate(PARAMS)
    assert completion.token_ids == run(Engine(session.llm.model), prompt, PARAMS).token_ids
    session.llm.engine.scheduler.check()
    return completion.text


def small_llm(path: Path, num_superblocks: int) -> LLM:
    """A cache of 256 tokens a superblock."""
    probe = LLM(str(path), threads=1)
    return LLM(str(path), threads=1, kv_memory=num_superblocks * 8 * probe.engine.kv_spec.block_bytes)


def test_generate_answers_and_remembers(llm: LLM) -> None:
    session = Session(llm)
    text = ask(session, "Why?")
    assert session.messages[-1] == {"role": "assistant", "content": text}
    assert session.turns[-1].stats.num_completion_tokens == 10


def test_a_fork_shares_blocks_and_goes_its_own_way(llm: LLM) -> None:
    session = Session(llm, system="You are terse. " * 5)
    ask(session, "Why is the sky blue?")
    held = llm.cache.num_held
    fork = session.fork()
    assert llm.cache.num_held == held, "a fork costs nothing until it goes on"
    ask(session, "And the sea?")
    ask(fork, "And the grass?")
    assert fork.turns[-1].saved_tokens > 0
    assert fork.messages[:3] == session.messages[:3]
    assert fork.messages[3] != session.messages[3]
    for one in (session, fork):
        one.close()
    assert_idle(llm.engine)


def test_a_fork_of_a_new_session_and_of_a_closed_one(llm: LLM) -> None:
    session = Session(llm)
    ask(session.fork(), "Hello")
    ask(session, "Hello")
    session.close()
    ask(session.fork(), "Again")


def test_a_session_that_writes_is_not_forked(llm: LLM) -> None:
    session = Session(llm)
    session.append("user", "Hello")
    stream = session.stream(PARAMS)
    next(stream)
    for forbidden in (session.fork, session.rewind):
        with pytest.raises(InvalidInput, match="while it writes"):
            forbidden()


def test_rewinding_forgets_messages_and_keeps_what_was_computed_before(llm: LLM) -> None:
    session = Session(llm)
    first = ask(session, "A long question about the sky and the sea and the grass")
    ask(session, "Another")
    session.rewind(2)
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    ask(session, "A different one")
    assert session.turns[-1].saved_tokens > 30
    session.rewind(3)
    assert ask(session, "Something else") != ""
    session.rewind(3)
    assert session.messages == []
    assert ask(session, "A long question about the sky and the sea and the grass") == first


@pytest.mark.parametrize("count", [-1, 3, 1.0, None, True])
def test_rewinding_too_far_is_refused(llm: LLM, count: object) -> None:
    session = Session(llm)
    ask(session, "Hello")
    with pytest.raises(InvalidInput, match=r"cannot rewind"):
        session.rewind(count)  # type: ignore[arg-type]
    assert len(session.messages) == 2


def test_turns_say_what_was_saved(llm: LLM) -> None:
    session = Session(llm, system="You are terse. " * 8)
    ask(session, "Why is the sky blue?")
    ask(session, "And the sea?")
    first, second = session.turns
    assert first.saved_tokens == 0
    assert first.saved_s == 0
    assert second.saved_tokens == second.stats.num_cached_tokens > 100
    assert llm.engine.prefill_token_s is not None
    assert second.saved_s == pytest.approx(second.saved_tokens * llm.engine.prefill_token_s)


def test_others_take_a_session_s_blocks_when_they_need_them(tiny_path: Path) -> None:
    llm = small_llm(tiny_path, 2)
    session = Session(llm)
    ask(session, "Why is the sky blue? " * 6)
    llm.generate([[7, index] * 120 for index in range(4)], PARAMS)
    assert not llm.engine.cache.holds
    ask(session, "And the sea?")


def test_what_is_pinned_stays(tiny_path: Path) -> None:
    llm = small_llm(tiny_path, 2)
    session = Session(llm)
    ask(session, "Why is the sky blue? " * 6)
    session.pin()
    pinned = llm.engine.cache.num_pinned
    assert pinned >= 3
    llm.generate([[7, index] * 90 for index in range(4)], PARAMS)
    llm.cache.clear()
    session.append("user", "And the sea?")
    cached = session.generate(PARAMS).stats.num_cached_tokens
    assert cached >= 32 * pinned
    with pytest.raises(CacheTooSmall, match=f"besides {pinned} pinned ones"):
        llm.generate([5, 6] * 220, PARAMS)
    session.unpin()
    assert llm.engine.cache.num_pinned == 0
    assert llm.generate([5, 6] * 220, PARAMS)[0].finish_reason == "length"


def test_a_pin_that_would_strand_a_request_is_refused(tiny_path: Path) -> None:
    llm = small_llm(tiny_path, 2)
    session = Session(llm)
    ask(session, "Why is the sky blue? " * 6)
    stream = llm.stream([5, 6] * 100, SamplingParams(max_tokens=300, ignore_eos=True))
    next(stream)
    assert len(llm.engine.cache.holds) == 1
    with pytest.raises(CacheTooSmall, match="no longer fits"):
        session.pin()
    assert llm.engine.cache.num_pinned == 0
    assert len(list(stream)) == 299


def test_nothing_to_pin(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match="nothing of the session"):
        Session(llm).pin()


def test_a_forgotten_session_gives_its_pin_back_too(llm: LLM) -> None:
    session = Session(llm)
    ask(session, "Why is the sky blue? " * 4)
    session.pin()
    del session
    gc.collect()
    assert llm.engine.cache.num_pinned == 0
    assert_idle(llm.engine)


def test_a_session_forgotten_in_the_middle_of_a_step(llm: LLM) -> None:
    """As the garbage collector may do: the step goes on undisturbed, and the blocks come back after it."""
    session = Session(llm)
    ask(session, "Why is the sky blue? " * 4)
    session.pin()
    sessions = [session]
    del session

    def forget(event: StepEvent) -> None:
        sessions.clear()
        gc.collect()
        assert len(llm.engine.cache.holds) == 2

    llm.engine.add_observer(forget)
    llm.generate("Hello", SamplingParams(max_tokens=1))
    llm.engine.remove_observer(forget)
    assert not llm.engine.cache.holds
    assert_idle(llm.engine)


def test_one_answer_a_turn(llm: LLM) -> None:
    session = Session(llm)
    session.append("user", "Hello")
    for params in (SamplingParams(n=2), SamplingParams(echo=True)):
        with pytest.raises(InvalidInput, match="one answer a turn"):
            session.stream(params)


def test_pinned_blocks_are_no_room_for_a_request_that_may_not_reuse_them(tiny_path: Path) -> None:
    """One that wants all logits of its prompt computes it anew: it must be refused at once, not in the middle."""
    llm = small_llm(tiny_path, 2)
    session = Session(llm)
    ask(session, "Why is the sky blue? " * 6)
    session.pin()
    known = llm.render_chat(session.messages)[: 32 * llm.engine.cache.num_pinned]
    prompt = (known + [5, 6] * 300)[:440]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    assert llm.generate(prompt, params)[0].stats.num_cached_tokens >= 32 * 3
    with pytest.raises(CacheTooSmall, match="prompt and answer need 14 blocks"):
        llm.generate(prompt, SamplingParams(max_tokens=8, echo=True, logprobs=1))
