"""A conversation with a real server: what its receipts say, and what becomes of it."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Route, expect

from opened_page import QUESTION, Open, bottom, top
from played_page import PROGRAM
from server_process import Server, wait_until

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: install Debian's package chromium")


def test_a_conversation_branches_and_the_receipt_says_what_was_reused(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.limit(40)
    first = opened.say(QUESTION)
    told = opened.receipt()
    assert told["prompt"] == f"{first.num_prompt_tokens} tokens"
    assert told["computed"] == str(first.num_prompt_tokens - first.costs.num_cached_tokens)
    second = opened.say("And the sea?")
    assert second.costs.num_cached_tokens >= first.num_prompt_tokens // 32 * 32 > 0
    turn = opened.page.locator(".turn.user").nth(1)
    turn.get_by_role("button", name="Edit").click()
    turn.locator("textarea").fill("And the rain?")
    opened.page.keyboard.press("Enter")
    branch = opened.answered()
    assert "rain" in server.engine.model.tokenizer.decode(list(branch.request.prompt_ids))
    told = opened.receipt()
    num_cached = branch.costs.num_cached_tokens
    assert (told["cached"], told["written"]) == (str(num_cached), str(branch.num_completion_tokens))
    assert told["computed"] == str(branch.num_prompt_tokens - num_cached)
    common = [a == b for a, b in zip(branch.request.prompt_ids, second.request.prompt_ids, strict=False)].index(False)
    assert num_cached >= common // 32 * 32 > 0, "the shared beginning is not computed again"
    strip = opened.page.locator(".turn.assistant").last.locator("svg")
    assert f"{num_cached} tokens from the cache" in (strip.get_attribute("aria-label") or "")
    opened.page.get_by_text("Why not more?").last.click()
    why = opened.page.locator(".why").last
    expect(why).to_contain_text(f"agree in {common} tokens")
    assert "rain" in "".join(why.locator(".token.new").all_inner_texts())
    assert "sea" in "".join(why.locator(".token.kept").all_inner_texts())
    expect(opened.page.locator(".branches").first).to_contain_text("2 of 2")
    opened.page.get_by_role("button", name="Previous branch").click()
    expect(opened.page.locator(".turn.user").nth(1).locator(".words")).to_have_text("And the sea?")


def test_an_answer_is_stopped_and_gives_its_blocks_back(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.limit(100_000)
    opened.page.locator("[name=temperature]").fill("1")
    opened.unfold("JSON schema")
    opened.page.locator("[name=schema]").fill('{"type": "string", "minLength": 3000}')
    opened.page.locator("#say").fill("Tell me everything.")
    opened.page.keyboard.press("Enter")
    stream = server.wait_for_stream()
    wait_until(lambda: stream.branches[0].num_completion_tokens > 3)
    opened.page.locator("#say").press("Escape")
    wait_until(lambda: stream.branches[0].finish_reason == "abort")
    expect(opened.page.get_by_text("Stopped.")).to_be_visible()
    assert stream.branches[0].num_completion_tokens < 3000
    expect(opened.page.locator(".receipt")).to_contain_text(f"written{stream.branches[0].num_completion_tokens:,}")
    server.assert_idle()


def test_what_is_refused_is_said_and_the_words_are_kept(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.unfold("JSON schema")
    opened.page.locator("[name=schema]").fill("{not json")
    opened.page.locator("#say").fill("Hello")
    opened.page.get_by_role("button", name="Send").click()
    expect(opened.page.get_by_role("alert").last).to_contain_text("The JSON schema is not JSON")
    expect(opened.page.locator("#say")).to_have_value("Hello")
    assert opened.page.locator(".turn").count() == 0


def test_what_fails_again_leaves_the_conversation_as_it_was(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.limit(6)
    opened.say("Hello")
    opened.unfold("JSON schema")
    schema = opened.page.locator("[name=schema]")
    schema.fill("{not json")
    opened.page.get_by_role("button", name="Answer again").click()
    problem = opened.page.locator(".talk > .composer [role=alert]")
    expect(problem).to_contain_text("The JSON schema is not JSON")
    expect(opened.page.locator(".turn")).to_have_count(2)
    edited = opened.page.locator(".turn.user")
    edited.get_by_role("button", name="Edit").click()
    edited.locator("textarea").fill("Good morning")
    edited.get_by_role("button", name="Branch from here").click()
    expect(edited.get_by_role("alert")).to_contain_text("The JSON schema is not JSON")
    expect(edited.locator("textarea")).to_have_value("Good morning")
    expect(opened.page.locator("#say")).to_have_value("")
    schema.fill("")
    edited.get_by_role("button", name="Branch from here").click()
    opened.answered()
    expect(edited.locator(".words")).to_have_text("Good morning")
    expect(edited.locator(".branches")).to_contain_text("2 of 2")
    expect(opened.page.locator(".turn")).to_have_count(2)


def test_the_focus_and_what_is_open_stay(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.limit(6)
    opened.say(QUESTION)
    assert opened.page.locator("h1:visible").all_inner_texts() == ["Chat"]
    why = opened.page.locator(".why").first
    why.locator("summary").click()
    assert opened.page.locator(".receipt > div > :not(dt, dd)").count() == 0, "a list of terms has nothing else in it"
    opened.say("And the sea?")
    expect(why).to_have_attribute("open", "")
    edit = opened.page.get_by_role("button", name="Edit").last
    edit.focus()
    for key in ("Escape", "Cancel"):
        opened.page.keyboard.press("Enter")
        box = opened.page.get_by_label("The turn, to be changed")
        expect(box).to_be_focused()
        box.press("Escape") if key == "Escape" else opened.page.get_by_role("button", name="Cancel").press("Enter")
        expect(edit).to_be_focused()
    opened.page.get_by_role("button", name="Answer again").last.press("Enter")
    opened.answered()
    for name in ("Previous branch", "Next branch"):
        opened.page.get_by_role("button", name=name).press("Enter")
        expect(opened.page.get_by_role("button", name=name)).to_be_focused()


def test_a_first_answer_says_where_it_leaves_the_cache(open_page: Open, server: Server) -> None:
    server.engine.clear_cache()
    opened = open_page(server)
    opened.limit(4)
    reasons = []
    why = opened.page.locator(".why")
    for system in ("You are a sailor. " + QUESTION, "You are a pilot. " + QUESTION):
        opened.page.locator("[name=system]").fill(system)
        found = opened.say("Hello")
        why.locator("summary").click()
        reasons.append(why.inner_text())
        opened.page.get_by_role("button", name="New chat").click() if len(reasons) == 1 else None
    assert "Nothing that is cached goes on from there" in reasons[0]
    assert f"{found.costs.num_cached_tokens} tokens of {found.num_prompt_tokens} came from the cache." in reasons[1]
    assert "differ from what is cached" in reasons[1]
    tokens = [server.engine.model.tokenizer.token_text(each) for each in found.request.prompt_ids]
    expect(why.locator(".token.new").first).to_have_text(tokens[found.costs.num_cached_tokens])
    assert "sailor" in "".join(why.locator(".token.kept").all_inner_texts())
    assert "pilot" in "".join(why.locator(".token.new").all_inner_texts())


def test_a_long_answer_is_followed_and_nothing_covers_its_end(open_page: Open, server: Server) -> None:
    opened = open_page(server, 400)
    opened.unfold("Settings")
    opened.limit(300)
    opened.say(QUESTION)
    turn, composer = opened.page.locator(".turn.assistant"), opened.page.locator(".talk > .composer")
    assert bottom(turn) - top(turn) > 900, "it did not fit"
    assert bottom(turn) <= top(composer)
    assert bottom(composer) - top(composer) < 80, "one row"
    opened.page.locator(".why summary").click()
    expect(opened.page.locator(".why")).to_have_attribute("open", "")
    why = opened.page.locator(".why div")
    wait_until(lambda: bottom(why) <= top(composer))


def test_tool_calls_are_shown(open_page: Open, server: Server) -> None:
    opened = open_page(server)
    opened.limit(400)
    tool = '[{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at":'
    tool += ' {"enum": ["sky", "sea"]}}, "required": ["at"], "additionalProperties": false}}}]'
    opened.unfold("Tools")
    opened.page.locator("[name=tools]").fill(tool)
    opened.page.route("**/v1/chat/completions", must_call)
    opened.page.locator("#say").fill("Look!")
    opened.page.keyboard.press("Enter")
    # Who waits here and not for the engine lets the request be changed.
    call = re.compile(r'look\(\{"at": ?"(sky|sea)"\}\)')
    expect(opened.page.locator(".call")).to_have_text(call, timeout=20_000)
    first = opened.answered()
    opened.page.get_by_text("Why not more?").click()
    why = opened.page.locator(".why")
    expect(why).to_contain_text(f"{first.costs.num_cached_tokens} token")
    assert why.locator(".token.new").count() > 0, "the tokens where the first answer's prompt leaves the cache"


def must_call(route: Route) -> None:
    """The same request, whose answer has to be a call."""
    body = json.loads(route.request.post_data or "")
    route.continue_(post_data=json.dumps({**body, "tool_choice": "required", "parallel_tool_calls": False}))
