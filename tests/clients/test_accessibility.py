"""The live page by axe-core's rules (WCAG A and AA, and its own best practices): nothing serious, in light and dark."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

AXE = Path(sys.prefix) / "node_modules" / "axe-core" / "axe.min.js"
VIEWS = ("chat", "race", "blocks", "prefixes", "requests", "numbers", "planner", "explain")

MARKDOWN = """# What a model may write

A **bold** word, `code`, [a link](https://example.org/page).

| a | b |
|---|---|
| 1 | 2 |

```python
print("a long line " * 100)
```

> quoted

1. one
   - two
"""

program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(program is None, reason="no Chromium here: install Debian's package chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def violations(page: Page) -> list[str]:
    """What axe finds that is serious or critical: its rule, and where."""
    found: list[dict[str, Any]] = page.evaluate("async () => (await axe.run()).violations")
    return [
        f"{each['id']} ({each['impact']}): {each['help']}: {node['target']} {node['failureSummary']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_view_has_a_serious_violation(url: str, browser: Browser, scheme: Any) -> None:
    # axe comes from a file, which the page's own policy forbids.
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme, bypass_csp=True)
    page.goto(f"{url.removesuffix('/v1')}/#chat")
    page.add_script_tag(path=AXE)
    page.locator("[name=max_tokens]").fill("8")
    page.locator("#say").fill("Why is the sky blue?")
    page.keyboard.press("Enter")
    page.locator(".receipt").wait_for()
    page.get_by_text("Why not more?").click()
    page.evaluate(
        """async (text) => {
            const { Markdown } = await import("/page/markdown.js");
            const made = new Markdown();
            made.append(text);
            document.querySelector(".turn.assistant .words").append(made.element);
        }""",
        MARKDOWN,
    )
    found = {}
    for view in VIEWS:
        page.evaluate("view => { location.hash = view; }", view)
        page.locator(f"#{view}").wait_for()
        page.wait_for_timeout(500)  # a view is drawn with the next message
        if view == "requests":
            page.locator("#requests .what button").first.click()
            page.locator("#requests .more .run").wait_for()
        found[view] = violations(page)
    page.close()
    assert found == {view: [] for view in VIEWS}
