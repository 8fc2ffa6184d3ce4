"""The front door: text in and out, streams that may be left at any time, and refusals before any work."""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

import kvik.engine.llm as llm_module
from gguf_files import tiny_llama
from kvik.cache import sizing
from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.engine.output import Completion, Piece, TextStream
from kvik.engine.stream import stream_sequence
from kvik.errors import InvalidInput, ModelError, ModelNotFound, NotEnoughMemory, PromptTooLong, StepFailed
from kvik.hub.progress import Progress
from kvik.models.loader import LoadedModel
from kvik.models.spec import RopeSpec
from models import altered, assert_idle, random_prompt, run
from runners import failing, watched_engine
from sequences import new_sequence
from subprocesses import python

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
TEXT = "The quick brown fox jumps over the lazy dog. " * 3


def content(completion: Completion | None) -> tuple[str, list[int], str]:
    """What must be the same however the request was run."""
    assert completion is not None
    return completion.text, completion.token_ids, completion.finish_reason


def collect(pieces: list[Piece]) -> Completion:
    """The completion, after proving that the pieces are what it is made of."""
    completion = pieces[-1].completion
    assert completion is not None
    assert all(piece.completion is None for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == completion.text
    assert [piece.token_id for piece in pieces] == completion.token_ids
    return completion


def test_generate_completes_each_prompt(llm: LLM) -> None:
    prompts: list[str | list[int]] = ["Once upon", TEXT, llm.encode("Once upon"), [5]]
    completions = llm.generate(prompts, PARAMS)
    assert len(completions) == 4
    assert content(completions[0]) == content(completions[2])
    for prompt, completion in zip(prompts, completions, strict=True):
        assert content(completion) == content(llm.generate(prompt, PARAMS)[0])
        assert completion.stats.num_prompt_tokens == len(llm.encode(prompt))
        assert completion.text == llm.model.tokenizer.decode(completion.token_ids)
        assert completion.logprobs is None
    assert llm.generate([]) == []
    assert_idle(llm.engine)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_stream_is_the_completion_in_pieces(llm: LLM, use_cache: bool) -> None:
    pieces = list(llm.stream(TEXT, PARAMS, use_cache=use_cache))
    assert len(pieces) == 12
    assert content(collect(pieces)) == content(llm.generate(TEXT, PARAMS)[0])
    assert_idle(llm.engine)


@pytest.mark.parametrize("seed", range(10))
def test_a_stream_never_shows_what_a_stop_string_swallows(llm: LLM, seed: int) -> None:
    """Random text at a high temperature; stop strings from the middle of what it would say."""
    params = SamplingParams(max_tokens=40, temperature=1.5, seed=seed, ignore_eos=True)
    whole = llm.generate(TEXT, params)[0].text
    at = 3 + seed
    stop = whole[at : at + 3]
    pieces = list(llm.stream(TEXT, dataclasses.replace(params, stop=(stop,))))
    completion = collect(pieces)
    assert completion.finish_reason == "stop"
    assert completion.text == whole[: whole.index(stop)]


def test_characters_of_several_tokens_are_whole(llm: LLM) -> None:
    """The tiny vocabulary is bytes: at a high temperature most are no UTF-8, and those become U+FFFD in the end."""
    params = SamplingParams(max_tokens=60, temperature=5.0, seed=3, ignore_eos=True)
    completion = collect(list(llm.stream(TEXT, params)))
    assert completion.text == llm.model.tokenizer.decode(completion.token_ids)


@pytest.mark.parametrize("num_pieces", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_closing_a_stream_early_gives_everything_back(llm: LLM, num_pieces: int, use_cache: bool) -> None:
    wanted = content(llm.generate(TEXT, PARAMS)[0])
    stream = llm.stream(TEXT, PARAMS, use_cache=use_cache)
    for _ in range(num_pieces):
        next(stream)
    assert llm.engine.scheduler.has_work
    assert (llm.engine.cache.pool.num_held > 0) == use_cache, "without the cache, nothing is kept from step to step"
    stream.close()  # type: ignore[attr-defined]
    assert_idle(llm.engine)
    assert content(llm.generate(TEXT, PARAMS)[0]) == wanted


def test_a_stream_that_is_forgotten_gives_everything_back(llm: LLM) -> None:
    for piece in llm.stream(TEXT, PARAMS):
        assert piece.completion is None
        break
    gc.collect()
    assert_idle(llm.engine)


def test_a_stream_that_never_starts_takes_nothing(llm: LLM) -> None:
    stream = llm.stream(TEXT, PARAMS)
    assert_idle(llm.engine)
    del stream
    gc.collect()
    assert_idle(llm.engine)


def test_a_prompt_is_checked_before_its_stream_is_asked(llm: LLM) -> None:
    with pytest.raises(PromptTooLong, match=r"600 tokens.*512"):
        llm.stream([5] * 600, PARAMS)
    with pytest.raises(PromptTooLong):
        llm.generate([5] * 512, PARAMS)
    assert_idle(llm.engine)


@pytest.mark.parametrize(
    "prompt", [[], [-1], [320], [2**40], [True], [1.0], ["1"], [None], [[1]], "", [1, "a"], "\ud800", b"abc"]
)
def test_other_prompts_are_refused(llm: LLM, prompt: Any) -> None:
    for call in (llm.stream, lambda prompt: llm.generate([prompt])):
        with pytest.raises(InvalidInput) as caught:
            call(prompt)
        assert caught.value.hint
    assert_idle(llm.engine)


def test_the_context_ends_a_completion(tiny_path: Path) -> None:
    llm = LLM(str(tiny_path), threads=1, context=64)
    completion = llm.generate([5] * 60, dataclasses.replace(PARAMS, max_tokens=100))[0]
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 4)
    with pytest.raises(PromptTooLong, match="64 tokens, the context holds 64"):
        llm.generate([5] * 64, PARAMS)


# Streams beside each other.


def alternate(streams: list[Iterator[Piece]], order: list[int]) -> list[list[Piece]]:
    """Draw pieces in the given order, then each to its end."""
    pieces: list[list[Piece]] = [[] for _ in streams]
    for which in order:
        pieces[which].extend(islice(streams[which], 1))
    for which, stream in enumerate(streams):
        pieces[which].extend(stream)
    return pieces


@pytest.mark.parametrize("order", [[0, 1] * 12, [1, 0] * 12, [0, 0, 0, 1, 1, 0, 1], [1] * 5 + [0] * 2, [0, 1]])
@pytest.mark.parametrize("use_cache", [True, False])
def test_two_streams_at_once_are_both_complete_and_right(llm: LLM, order: list[int], use_cache: bool) -> None:
    prompts = TEXT, "Another story"
    params = PARAMS, dataclasses.replace(PARAMS, temperature=1.0, seed=4, max_tokens=9)
    wanted = [content(llm.generate(*pair)[0]) for pair in zip(prompts, params, strict=True)]
    streams = [llm.stream(*pair, use_cache=use_cache) for pair in zip(prompts, params, strict=True)]
    for pieces, result in zip(alternate(streams, order), wanted, strict=True):
        assert content(collect(pieces)) == result
    assert_idle(llm.engine)


def test_a_stream_closed_beside_another(llm: LLM) -> None:
    wanted = content(llm.generate(TEXT, PARAMS)[0])
    first, second = llm.stream("Leave me", PARAMS), llm.stream(TEXT, PARAMS)
    next(first)
    pieces = [next(second)]
    first.close()  # type: ignore[attr-defined]
    pieces += second
    assert content(collect(pieces)) == wanted
    assert_idle(llm.engine)


def test_streams_that_only_fit_one_after_the_other_are_both_complete_and_right(tiny_path: Path) -> None:
    """The second waits until the first is done, whichever of them is asked for its piece."""
    spec = LLM(str(tiny_path), threads=1).engine.kv_spec
    llm = LLM(str(tiny_path), threads=1, kv_memory=8 * spec.block_bytes)
    prompts = [random_prompt(llm.model, 200, seed) for seed in (1, 2)]
    wanted = [content(llm.generate(prompt, PARAMS)[0]) for prompt in prompts]
    for order in ([0, 1], [1, 0], [1] * 30):
        streams = [llm.stream(prompt, PARAMS) for prompt in prompts]
        assert [content(collect(pieces)) for pieces in alternate(streams, order)] == wanted
    assert_idle(llm.engine)


def test_a_failure_is_told_to_the_stream_that_it_belongs_to(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the second that happens to be asked for its piece when the first one's text goes wrong."""
    wanted = content(llm.generate("Another story", PARAMS)[0])
    first, second = llm.stream(TEXT, PARAMS), llm.stream("Another story", PARAMS)
    pieces = [next(second)]
    next(first)
    with monkeypatch.context() as patch:
        add = TextStream.add
        assert len(llm.engine.scheduler.running) == 2
        broken = next(each for each in llm.engine.scheduler.running if each.num_prompt_tokens > 60).text

        def fail(text: TextStream, token_id: int, *, may_stop: bool = True) -> None:
            if text is broken:
                raise ZeroDivisionError
            add(text, token_id, may_stop=may_stop)

        patch.setattr(TextStream, "add", fail)
        pieces += second
    assert content(collect(pieces)) == wanted
    with pytest.raises(ZeroDivisionError):
        list(first)
    assert_idle(llm.engine)


def test_an_exception_in_a_step_reaches_the_caller_and_leaves_nothing(llm: LLM) -> None:
    wanted = content(llm.generate(TEXT, PARAMS)[0])
    llm.engine, runner = watched_engine(llm.model, llm.config)
    stream = llm.stream(TEXT, PARAMS)
    next(stream)
    runner.before = failing(ZeroDivisionError(), times=2)
    with pytest.raises(StepFailed, match="ZeroDivisionError"):
        next(stream)
    with pytest.raises(StepFailed, match="ZeroDivisionError"):
        llm.generate(TEXT, PARAMS)
    assert_idle(llm.engine)
    assert content(llm.generate(TEXT, PARAMS)[0]) == wanted


# Opening a model.


def test_both_backends_can_be_chosen(tiny_path: Path) -> None:
    texts = [
        LLM(str(tiny_path), backend=backend, activations="int16", kv_dtype="f32").generate("Once", PARAMS)[0].text
        for backend in ("native", "reference")
    ]
    assert texts[0] == texts[1]


def test_options_reach_the_engine(tiny_path: Path) -> None:
    llm = LLM(str(tiny_path), activations="int16", kv_dtype="f32", context=100, threads=3, token_budget=9)
    assert (llm.engine.kv_spec.dtype, llm.model.context, llm.engine.scheduler.token_budget) == ("f32", 100, 9)
    assert (llm.model.decoder.ops.activations, llm.model.decoder.ops.num_threads) == ("int16", 3)  # type: ignore[attr-defined]
    assert llm.engine.cache.pool.num_blocks == 16 * 8, "sixteen contexts, each in whole superblocks"
    assert (llm.engine.scheduler.max_running, llm.engine.scheduler.max_waiting) == (9, 1024)
    other = llm.new_engine()
    assert other.cache.pool is not llm.engine.cache.pool
    options = {"kv_memory": 1 << 20, "prefix_cache": False, "max_running": 3, "max_waiting": 5}
    llm = LLM(str(tiny_path), threads=1, **options)  # type: ignore[arg-type]
    for engine in (llm.engine, llm.new_engine()):
        assert engine.cache.pool.num_blocks == (1 << 20) // (8 * engine.kv_spec.block_bytes) * 8
        assert (engine.cache.prefix_cache, engine.scheduler.max_running, engine.scheduler.max_waiting) == (False, 3, 5)
    other = llm.new_engine()
    assert other.kv_spec == llm.engine.kv_spec


@pytest.mark.parametrize(("option", "value"), [("threads", 0), ("context", 1), ("kv_dtype", "q8"), ("backend", "cuda")])
def test_bad_options_are_refused_before_the_file_is_read(option: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=option):
        LLM("/no/such/file.gguf", **{option: value})
    with pytest.raises(ModelNotFound):
        LLM("/no/such/file.gguf")


@pytest.mark.parametrize("context", [513, 2**31 - 1])
def test_a_context_past_the_model_s_is_refused_before_anything_is_made_for_it(
    tiny_path: Path, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def table(_: RopeSpec, num_positions: int) -> Any:
        raise AssertionError(f"a table of {num_positions:,} positions")

    monkeypatch.setattr(RopeSpec, "table", table)
    with pytest.raises(InvalidInput, match=f"{context:,}.*512"):
        LLM(str(tiny_path), context=context)


def test_a_cache_larger_than_the_memory_is_refused_with_what_fits(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room = LLM(str(tiny_path)).engine.kv_spec
    context_bytes = 16 * with_room.block_bytes
    for module in (sizing, llm_module):
        monkeypatch.setattr(module, "available_memory_bytes", lambda: context_bytes - 1)
    with pytest.raises(NotEnoughMemory, match="a cache of 16 blocks") as caught:
        LLM(str(tiny_path))
    found = re.search(r"context to (\d+) or less", caught.value.hint)
    assert found is not None
    assert "kv_memory" not in caught.value.hint  # a whole MiB would be too much
    assert LLM(str(tiny_path), context=int(found[1])).model.context == int(found[1])
    for module in (sizing, llm_module):
        monkeypatch.setattr(module, "available_memory_bytes", lambda: 100 << 20)
    with pytest.raises(NotEnoughMemory) as caught:
        LLM(str(tiny_path), kv_memory=200 << 20)
    found = re.search(r"kv_memory to (\d+) MiB or less", caught.value.hint)
    assert found is not None
    LLM(str(tiny_path), kv_memory=int(found[1]) << 20)


def test_chat(llm: LLM, tiny_path: Path, tmp_path: Path) -> None:
    assert llm.is_chat_model
    messages = [{"role": "user", "content": "Hello"}]
    token_ids = llm.render_chat(messages)
    assert llm.model.tokenizer.decode(token_ids, skip_special=False) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = llm.chat(messages, PARAMS)
    assert content(answer) == content(llm.generate(token_ids, PARAMS)[0])
    assert content(collect(list(llm.stream_chat(messages, PARAMS)))) == content(answer)
    plain = LLM(str(altered(tiny_path, tmp_path / "plain.gguf", without=["tokenizer.chat_template"])), threads=1)
    assert not plain.is_chat_model
    calls: list[Callable[[Any], object]] = [plain.chat, plain.stream_chat, plain.render_chat]
    for call in calls:
        with pytest.raises(ModelError, match="no chat template"):
            call(messages)


def test_the_default_model_answers(trained: LoadedModel) -> None:
    """A trained model end to end, by the parts that LLM puts together."""
    engine = Engine(trained)
    token_ids = trained.tokenizer.encode("The capital of France is")
    sequence = new_sequence(engine, token_ids, SamplingParams(max_tokens=4))
    completion = collect(list(stream_sequence(engine, sequence)))
    assert "Paris" in completion.text
    assert completion.stats.num_computed_tokens == len(token_ids) + 3


def test_threads_share_one_llm(llm: LLM) -> None:
    prompts = [f"{number} is a number" for number in range(6)]
    wanted = [content(completion) for completion in llm.generate(prompts, PARAMS)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            found = [
                content(completion) for completion in pool.map(lambda prompt: llm.generate(prompt, PARAMS)[0], prompts)
            ]
            assert found == wanted
    assert_idle(llm.engine)


def test_other_kinds_of_arguments_are_refused(llm: LLM) -> None:
    for prompts in (None, 5, b"abc", [b"abc"], {"a": 1}.items()):
        with pytest.raises(InvalidInput):
            llm.generate(prompts, PARAMS)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="params is None"):
        llm.generate("a", None)  # type: ignore[arg-type]


def test_all_prompts_are_checked_before_any_runs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.engine, "step", lambda: pytest.fail("nothing may run"))
    with pytest.raises(InvalidInput, match="empty"):
        llm.generate([TEXT, ""], PARAMS)


def test_arrays_of_token_ids_are_prompts(llm: LLM) -> None:
    wanted = content(llm.generate([5, 6, 7], PARAMS)[0])
    assert content(llm.generate(np.asarray([5, 6, 7]), PARAMS)[0]) == wanted  # type: ignore[arg-type]
    assert llm.config == LLM(llm.model.path, threads=1, token_budget=40).config


def test_weights_that_give_no_numbers_are_told(tiny_path: Path, tmp_path: Path) -> None:
    norm = (np.full(64, np.nan, np.float32), GGMLQuantizationType.F32)
    llm = LLM(altered(tiny_path, tmp_path / "nan.gguf", tensors={"output_norm.weight": norm}), threads=1)
    with pytest.raises(ModelError, match="are not finite"):
        llm.generate(TEXT, PARAMS)
    assert_idle(llm.engine)


def test_a_wrong_instruction_set_is_told(tiny_path: Path) -> None:
    result = python("-m", "kvik", "run", "--raw", "a", "-m", str(tiny_path), KVIK_ISA="sse")
    assert result.returncode == 2
    assert result.stderr.startswith("InvalidInput: KVIK_ISA=sse is not one of")


@pytest.mark.parametrize("change", [{"context": 100}, {"activations": "int16"}, {"backend": "reference"}])
def test_another_engine_keeps_what_the_model_was_loaded_with(tmp_path: Path, change: dict[str, Any]) -> None:
    llm = LLM(tiny_llama(tmp_path / "tiny.gguf"))
    (name,) = change
    with pytest.raises(InvalidInput, match=f"{name} is .*, the model was loaded with"):
        llm.new_engine(**change)
    with pytest.raises(InvalidInput, match="kv_dtype is 'f15'"):
        llm.new_engine(kv_dtype="f15")


def test_engines_of_other_threads_over_the_same_weights_give_the_same_bits(tmp_path: Path) -> None:
    llm = LLM(tiny_llama(tmp_path / "tiny.gguf"), threads=1)
    prompt = random_prompt(llm.model, 70, seed=3)
    expected = run(llm.new_engine(), prompt)
    for threads in (2, 3):
        found = run(llm.new_engine(threads=threads, prefix_cache=False, token_budget=16), prompt)
        assert found.token_ids == expected.token_ids
        assert found.logits.tobytes() == expected.logits.tobytes(), f"{threads} threads, seed 3"


def test_a_library_says_nothing_of_a_download_where_there_is_no_terminal(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(name: str, *, progress: Progress, **_: object) -> Path:
        progress(f"{name}: downloading", 0, 100)
        progress(f"{name}: downloading", 100, 100)
        return tiny_path

    monkeypatch.setattr("kvik.engine.llm.resolve", download)
    LLM("org/name").generate(["one", "two"], SamplingParams(max_tokens=2))
    assert capsys.readouterr() == ("", "")
