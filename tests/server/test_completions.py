"""`/v1/completions`: prompts of every form, echo and legacy logprobs."""

from __future__ import annotations

from typing import Any

import pytest

from kvik.engine.llm import LLM
from kvik.server.fields import NEUTRAL
from server_process import Client

TEXT = "/v1/completions"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 5}


def test_prompts_of_every_form_give_the_same(client: Client, smol: LLM) -> None:
    """Text, token ids, lists of either and of both, each choice at its prompt's place."""
    ids = smol.encode("The sea")
    single = [client.ok(TEXT, GREEDY | {"prompt": prompt})["choices"][0]["text"] for prompt in ("The sea", ids)]
    lists = [
        [choice["text"] for choice in client.ok(TEXT, GREEDY | {"prompt": prompt})["choices"]]
        for prompt in (["The sea", "One two three"], [ids, smol.encode("One two three")], [ids, "One two three"])
    ]
    assert single[0] == single[1] == lists[0][0]
    assert lists[0] == lists[1] == lists[2]
    assert lists[0][0] != lists[0][1]


def test_fields_that_routers_add(client: Client) -> None:
    """At the values that change nothing they do nothing; another value is refused, for it would change something."""
    wanted = client.ok(TEXT, GREEDY | {"prompt": "The sea"})["choices"]
    body = GREEDY | {"prompt": "The sea", "ignore_eos": False}
    assert client.ok(TEXT, body | NEUTRAL)["choices"] == wanted
    for name, neutral in NEUTRAL.items():
        answer = client.post(TEXT, body | NEUTRAL | {name: not neutral})
        assert (answer.status, answer.error["param"]) == (400, name)
        assert f"or {str(neutral).lower()})" in answer.error["message"]


def test_choices_stand_in_the_order_of_prompts_and_completions(client: Client) -> None:
    prompts = ["Same", "Same", "Other"]
    body = client.ok(TEXT, {"prompt": prompts, "n": 2, "max_tokens": 4, "seed": 5, "return_token_ids": True})
    choices = body["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert choices[0]["token_ids"] == choices[2]["token_ids"]
    assert choices[1]["token_ids"] == choices[3]["token_ids"]
    assert choices[0]["token_ids"] != choices[1]["token_ids"]
    assert choices[0]["prompt_token_ids"] != choices[4]["prompt_token_ids"]
    assert body["usage"]["completion_tokens"] == 24


def test_identical_prompts_give_identical_text(client: Client) -> None:
    choices = client.ok(TEXT, GREEDY | {"prompt": ["Once upon a time"] * 5})["choices"]
    assert len({choice["text"] for choice in choices}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(client: Client, stream: bool) -> None:
    body = GREEDY | {"prompt": "Æ is a letter", "echo": True, "logprobs": 2}
    if stream:
        parts = [choice for chunk in client.stream(TEXT, body) for choice in chunk["choices"]]
        text = "".join(part["text"] for part in parts)
        logprobs: dict[str, list[Any]] = {
            name: [value for part in parts if part["logprobs"] for value in part["logprobs"][name]]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
    else:
        (choice,) = client.ok(TEXT, body)["choices"]
        text, logprobs = choice["text"], choice["logprobs"]
    assert text.startswith("Æ is a letter")
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert all(-9999 <= value <= 0 for value in logprobs["token_logprobs"][1:])
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"][1:])
    offsets = logprobs["text_offset"]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(text)
    assert len(offsets) == len(logprobs["tokens"]) == len(logprobs["token_logprobs"])


def test_the_likeliest_token_s_logprob_is_the_chosen_one_s(client: Client) -> None:
    """Equal as floats: lm-eval asks whether a continuation is greedy in this way."""
    logprobs = client.ok(TEXT, GREEDY | {"prompt": "One two", "logprobs": 1})["choices"][0]["logprobs"]
    for chosen, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert chosen == max(top.values())


@pytest.mark.parametrize(("count", "sizes"), [(0, {1}), (1, {1, 2}), (5, {5, 6})])
def test_number_of_logprobs(client: Client, count: int, sizes: set[int]) -> None:
    body = {"prompt": "One two", "logprobs": count, "max_tokens": 6, "seed": 1}
    tops = client.ok(TEXT, body)["choices"][0]["logprobs"]["top_logprobs"]
    assert {len(top) for top in tops} <= sizes


def test_the_end_of_the_text_has_an_entry_too(client: Client, smol: LLM) -> None:
    """lm-eval cuts the last entry off, whatever it is: also where the text ends at once."""
    ids = smol.render_chat([{"role": "user", "content": "Say hi."}])
    answer = client.ok(TEXT, {"prompt": ids, "temperature": 0, "max_tokens": 60, "return_token_ids": True})
    ended = [*ids, *answer["choices"][0]["token_ids"][:-1]]
    assert answer["choices"][0]["finish_reason"] == "stop"
    body = {"prompt": [ended], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1}
    (choice,) = client.ok(TEXT, body)["choices"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["token_logprobs"]) == len(ended) + 1


def test_prompt_logprobs(client: Client, smol: LLM) -> None:
    ids = smol.encode("The sea is blue")
    for count in (0, 1):
        (choice,) = client.ok(TEXT, GREEDY | {"prompt": ids, "prompt_logprobs": count})["choices"]
        first, *others = choice["prompt_logprobs"]
        assert first is None
        assert [str(token_id) in entry for token_id, entry in zip(ids[1:], others, strict=True)] == [True] * len(others)
        assert all(max(1, count) <= len(entry) <= count + 1 for entry in others)
        assert choice["text"] == client.ok(TEXT, GREEDY | {"prompt": ids})["choices"][0]["text"]


def test_a_stop_string_across_tokens(client: Client) -> None:
    """It is in no chunk, not even in part."""
    body = {"prompt": "1 2 3 4 5 6 7 8", "temperature": 0, "max_tokens": 12}
    text = client.ok(TEXT, body)["choices"][0]["text"]
    stop = text[3:8]
    chunks = client.stream(TEXT, body | {"stop": [stop]})
    parts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(parts) == text[: text.index(stop)]
    assert chunks[-1]["choices"][0] == {
        **{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop", "stop_reason": stop}
    }


def test_a_last_chunk_without_text_has_the_finish_reason(client: Client) -> None:
    chunks = client.stream(TEXT, {"prompt": ["One", "Two"], "max_tokens": 3, "n": 2, "seed": 3})
    for index in range(4):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
        assert choices[-1]["text"] == ""
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
