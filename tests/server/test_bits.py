"""What comes over HTTP is what the library computes, to the last bit: alone, in a crowd, streamed, from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from kvik.engine.output import Completion
from server_process import Client, Server, with_engine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Name three colours."}]
TOKENS = 12
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 7, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    "penalties": {
        **{"temperature": 0.7, "seed": 8, "presence_penalty": 0.5, "frequency_penalty": -0.5},
        **{"repetition_penalty": 1.2, "logit_bias": {"198": -100, "260": 3.5}},
    },
}


def expected(smol: LLM, prompt: Any, case: str, **others: Any) -> list[Completion]:
    """What the library makes of it; OpenAI's temperature is 1 where none is given."""
    given: dict[str, Any] = {"temperature": 1.0, "logprobs": 3, "max_tokens": TOKENS, **CASES[case], **others}
    if "logit_bias" in given:
        given["logit_bias"] = {int(token_id): bias for token_id, bias in given["logit_bias"].items()}
    return smol.generate(prompt, SamplingParams(**given))


def chat_body(case: str, **others: Any) -> dict[str, Any]:
    return {
        **{"messages": MESSAGES, "max_tokens": TOKENS, "logprobs": True, "top_logprobs": 3, "return_token_ids": True},
        **CASES[case],
        **others,
    }


def of_whole(body: Any) -> list[tuple[list[int], list[float], list[list[float]]]]:
    """Token ids, logprobs and those of the likeliest tokens, of each choice."""
    return [
        (
            choice["token_ids"],
            [entry["logprob"] for entry in choice["logprobs"]["content"]],
            [[top["logprob"] for top in entry["top_logprobs"]] for entry in choice["logprobs"]["content"]],
        )
        for choice in body["choices"]
    ]


def of_stream(chunks: Sequence[Any], n: int = 1) -> list[tuple[list[int], list[float], list[list[float]]]]:
    """The same of a stream."""
    found: list[tuple[list[int], list[float], list[list[float]]]] = [([], [], []) for _ in range(n)]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        token_ids, logprobs, tops = found[choice["index"]]
        token_ids += choice["token_ids"]
        for entry in (choice["logprobs"] or {"content": []})["content"]:
            logprobs.append(entry["logprob"])
            tops.append([top["logprob"] for top in entry["top_logprobs"]])
    return found


def of_library(completions: Sequence[Completion]) -> list[tuple[list[int], list[float], list[list[float]]]]:
    """And of the library's completions; the end of the text is no text."""
    found = []
    for completion in completions:
        entries = completion.logprobs or []
        entries = entries[:-1] if completion.finish_reason == "stop" else entries
        found.append(
            (
                completion.token_ids,
                [entry.logprob for entry in entries],
                [list(entry.top.values()) for entry in entries],
            )
        )
    return found


@pytest.mark.parametrize("case", CASES)
def test_chat_alone_streamed_and_from_the_cache_is_the_library(client: Client, smol: LLM, case: str) -> None:
    prompt = smol.render_chat(MESSAGES, plain_content=True)
    completions = expected(smol, prompt, case)
    wanted = of_library(completions)
    first = client.ok(CHAT, chat_body(case))
    again = client.ok(CHAT, chat_body(case))
    without = client.ok(CHAT, chat_body(case, cache_prompt=False))
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert without["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    for body in (first, again, without):
        assert of_whole(body) == wanted
        assert body["prompt_token_ids"] == prompt
        assert body["choices"][0]["message"]["content"] == completions[0].text
    chunks = client.stream(CHAT, chat_body(case))
    assert of_stream(chunks) == wanted
    assert chunks[0]["prompt_token_ids"] == prompt
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])


def test_every_request_in_a_crowd_is_the_library(client: Client, smol: LLM) -> None:
    prompts = [[{"role": "user", "content": f"Tell me about the number {number}."}] for number in range(6)]

    def ask(at: int) -> Any:
        body = chat_body(list(CASES)[at % 3], messages=prompts[at // 2], max_tokens=TOKENS)
        return of_stream(client.stream(CHAT, body)) if at % 2 else of_whole(client.ok(CHAT, body))

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(12)))
    for at, answer in enumerate(found):
        prompt = smol.render_chat(prompts[at // 2], plain_content=True)
        assert answer == of_library(expected(smol, prompt, list(CASES)[at % 3]))


def test_several_choices_draw_as_the_library_does(client: Client, smol: LLM) -> None:
    wanted = of_library(expected(smol, smol.render_chat(MESSAGES, plain_content=True), "sampled", n=3))
    assert of_whole(client.ok(CHAT, chat_body("sampled", n=3))) == wanted
    assert of_stream(client.stream(CHAT, chat_body("sampled", n=3)), 3) == wanted


@pytest.mark.parametrize("case", CASES)
def test_completions_with_echo_are_the_library(client: Client, smol: LLM, case: str) -> None:
    prompts: list[Any] = ["The sea is", smol.encode("Once upon a time")]
    body: dict[str, Any] = {
        **{"prompt": prompts, "max_tokens": TOKENS, "logprobs": 3, "echo": True, "return_token_ids": True},
        **CASES[case],
    }
    choices = client.ok(TEXT, body)["choices"]
    streamed: list[dict[str, Any]] = [{"text": "", "token_ids": [], "logprobs": []} for _ in prompts]
    for choice in (choice for chunk in client.stream(TEXT, body) for choice in chunk["choices"]):
        found = streamed[choice["index"]]
        found["text"] += choice["text"]
        found["token_ids"] += choice["token_ids"]
        found["logprobs"] += (choice["logprobs"] or {"token_logprobs": []})["token_logprobs"]
        if "prompt_token_ids" in choice:
            assert "prompt_token_ids" not in found
            found["prompt_token_ids"] = choice["prompt_token_ids"]
    for prompt, choice, other in zip(prompts, choices, streamed, strict=True):
        (wanted,) = expected(smol, prompt, case, echo=True)
        assert wanted.logprobs is not None
        assert wanted.prompt_logprobs is not None
        assert choice["text"] == other["text"] == wanted.text
        assert choice["token_ids"] == other["token_ids"] == wanted.token_ids
        assert choice["prompt_token_ids"] == other["prompt_token_ids"] == smol.encode(prompt)
        logprobs = [entry and entry.logprob for entry in (*wanted.prompt_logprobs, *wanted.logprobs)]
        assert choice["logprobs"]["token_logprobs"] == other["logprobs"] == logprobs


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_the_library(client: Client, smol: LLM, pooling: Any) -> None:
    texts = ["The sea is blue.", "A train leaves."]
    body = client.ok("/v1/embeddings", {"input": texts, "pooling": pooling})
    wanted = smol.embed(texts, pooling)
    assert [item["embedding"] for item in body["data"]] == [
        [float(value) for value in embedding.vector] for embedding in wanted
    ]


def test_prefill_in_a_full_pool_gives_the_same_tokens(tiny_llm: LLM) -> None:
    """Row 32: sequences that are preempted go on with the same tokens."""
    llm = with_engine(tiny_llm, kv_memory="128KiB", max_running=8)
    prompts = [[(17 * at + number) % 300 + 3 for number in range(40)] for at in range(8)]
    with Server({"tiny": llm}) as server:
        body = {"max_tokens": 200, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        choices = server.client.ok(TEXT, {"prompt": prompts, **body})["choices"]
        stream = server.wait_for_stream()
        assert sum(branch.costs.num_preemptions for branch in stream.branches) > 0
        server.assert_idle()
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    assert [choice["token_ids"] for choice in choices] == [
        each.token_ids for each in tiny_llm.generate(prompts, params)
    ]
