"""The README's first picture: the live page of a `kvik serve` of its own, in the middle of a conversation.

Run it as `python docs/make_live_picture.py PICTURE.png`.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

WIDTH, HEIGHT, TOKENS = 1280, 930, 48
SYSTEM = "You are a kind teacher. Answer in two short sentences."
QUESTIONS = ("Why is the sky blue?", "And why is it red in the evening?")
START_S = 60


def say(page: Page, text: str) -> None:
    """Send a message, and wait for the whole answer."""
    page.locator("#say").fill(text)
    page.locator("#say").press("Enter")
    expect(page.locator(".turn.user").last.locator(".words")).to_have_text(text)
    expect(page.locator(".receipt")).to_have_count(page.locator(".turn.user").count(), timeout=60_000)


def draw(url: str, picture_path: Path) -> None:
    """Ask all questions, and take the picture of the last answer and its receipt."""
    program = shutil.which("chromium") or sys.exit("no chromium here: install Debian's package of that name")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(f"{url}/#chat")
        page.locator("[name=system]").fill(SYSTEM)
        page.locator("[name=max_tokens]").fill(f"{TOKENS}")
        page.locator("[name=temperature]").fill("0")
        for question in QUESTIONS:
            say(page, question)
        page.locator("#say").blur()
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=picture_path)
        browser.close()


def wait_until_ready(url: str) -> None:
    """Raise the last error where it takes too long."""
    deadline_s = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=START_S).close()
        except OSError:  # not there yet, or a 503
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)
        else:
            return


def main(picture_path: Path) -> None:
    """Serve meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, command = f"http://127.0.0.1:{port}", [sys.executable, "-m", "kvik", "serve", "smollm2", "--port", f"{port}"]
    with subprocess.Popen(command) as server:
        try:
            wait_until_ready(url)
            draw(url, picture_path)
        finally:
            server.terminate()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
