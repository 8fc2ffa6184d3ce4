"""The README's picture: a part of a page that `kvik explain` wrote, as Chromium draws it.

Run it as `python docs/make_picture.py PAGE.html PICTURE.png`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH, STEP = 1100, 12


def main(page_path: Path, picture_path: Path) -> None:
    """Draw section 2 at one step."""
    program = shutil.which("chromium") or sys.exit("no chromium here: install Debian's package of that name")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto(page_path.absolute().as_uri())
        page.locator("#step").fill(str(STEP))
        page.locator("#steps").evaluate("bar => bar.remove()")
        page.locator("#head").evaluate("section => section.style.margin = '0'")
        page.locator("#head .proof").evaluate("proof => proof.remove()")
        page.locator("#head").screenshot(path=picture_path)
        browser.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
