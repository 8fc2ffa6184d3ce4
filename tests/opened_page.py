"""The live page of a real server in a browser, and whatever it says or asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from playwright.sync_api import Locator, Page

from kvik.engine.sequence import Sequence
from server_process import Server, wait_until

QUESTION = "Why is the sky blue, and why is it red in the evening? Answer so that a child understands it. "


@dataclass
class Opened:
    """The page, and whatever it said or asked for."""

    page: Page
    server: Server
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def go(self, view: str) -> Locator:
        """To a view, by its URL."""
        self.page.goto(f"http://127.0.0.1:{self.server.port}/#{view}")
        section = self.page.locator(f"#{view}")
        section.wait_for()
        return section

    def say(self, text: str) -> Sequence:
        """Send a message and wait for the answer: what the engine made of it."""
        self.page.locator("#say").fill(text)
        self.page.keyboard.press("Enter")
        return self.answered()

    def answered(self) -> Sequence:
        stream = self.server.wait_for_stream()
        wait_until(lambda: stream.branches[0].finish_reason is not None)
        self.page.locator(".talk > .composer .main", has_text="Send").wait_for()
        return stream.branches[0]

    def limit(self, num_tokens: int) -> None:
        self.page.locator("[name=max_tokens]").fill(str(num_tokens))

    def unfold(self, name: str) -> None:
        """Of the settings."""
        self.page.locator(".settings summary", has_text=name).click()

    def receipt(self) -> dict[str, str]:
        """Of the last answer."""
        parts = self.page.locator(".receipt").last.locator("div").all_inner_texts()
        return dict(part.split("\n", maxsplit=1) for part in parts)


Open = Callable[..., Opened]


def top(of: Locator) -> float:
    """Where it begins, in pixels of the window."""
    place = of.bounding_box()
    assert place is not None
    return place["y"]


def bottom(of: Locator) -> float:
    """Where it ends."""
    place = of.bounding_box()
    assert place is not None
    return place["y"] + place["height"]
