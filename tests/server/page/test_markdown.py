"""Answers as Markdown: what is shown of it, and that nothing in it is read as HTML."""

from __future__ import annotations

import random

import pytest

from played_page import PROGRAM, Play

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: install Debian's package chromium")

PIECES = (
    *("\n", "\n\n", " ", "a", "word ", "**", "*", "_", "__", "~~", "`", "``", "```", "~~~", "\\", "|", "a|b\n|-|-|\n"),
    *(
        "# ",
        "- ",
        "1. ",
        "2) ",
        "> ",
        "    ",
        "---",
        "***\n",
        "<",
        "<b>x</b>",
        "<script>alert(1)</script>",
        "&lt;",
        "&",
    ),
    *("<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "[x](data:text/html,x)", "![x](http://x/y.png)"),
    *(
        "[x](https://example.org/a?b=c)",
        "[x]( http://x)",
        '[x](http://x" onclick="y)',
        "http://example.org.",
        "[",
        "](",
        ")",
    ),
    *("https://user:pass@x/", "é", "\u202e", "\x00", "🙂", "\t"),
)


def test_markdown_is_never_read_as_html(play: Play) -> None:
    """Whatever a model writes becomes these elements and attributes alone, in whatever pieces it comes."""
    rng = random.Random(7)
    texts = ["".join(rng.choices(PIECES, k=rng.randrange(1, 40))) for _ in range(1500)]
    size = 20_000
    texts += [piece * (size // len(piece)) for piece in PIECES if piece.strip()]
    texts += [
        "> " * 5000 + "x",
        "- " * 5000 + "x",
        "[" * size,
        "**a " * 5000,
        "`a``b" * 4000,
        "|" * size + "\n" + "|-" * size,
    ]
    page = play("chat")
    wrong = page.evaluate(
        """async ([texts, cuts]) => {
            const { Markdown } = await import("/page/markdown.js");
            const LISTS = "HR LI OL UL TABLE TBODY TD TH THEAD TR";
            const NAMES = `A BLOCKQUOTE CODE DEL DIV EM H3 H4 H5 H6 P PRE SMALL STRONG ${LISTS}`.split(" ");
            const ATTRIBUTES = "aria-label class href rel role scope start tabindex target".split(" ");
            const isKnown = ({ name }) => ATTRIBUTES.includes(name);
            const wrong = [];
            for (const [at, text] of texts.entries()) {
                const whole = new Markdown();
                whole.append(text);
                for (const element of whole.element.querySelectorAll("*")) {
                    const isGood = NAMES.includes(element.tagName) && [...element.attributes].every(isKnown);
                    const { href, rel } = element;
                    const isSafe = href === undefined || (/^https?:/.test(href) && rel.includes("noopener"));
                    if (!isGood || !isSafe) wrong.push([at, element.outerHTML]);
                }
                if (at >= cuts.length) continue;
                const parts = new Markdown();
                let from = 0;
                for (const cut of [...cuts[at], text.length]) {
                    parts.append(text.slice(from, cut));
                    from = Math.max(from, cut);
                }
                const found = [parts, whole].map(({ element }) => element.innerHTML);
                if (found[0] !== found[1]) wrong.push([at, text, ...found]);
            }
            return wrong.slice(0, 3);
        }""",
        [texts, [sorted(rng.randrange(len(text) + 1) for _ in range(12)) for text in texts[:1500]]],
    )
    assert wrong == []


def test_markdown_is_shown(play: Play) -> None:
    text = """# Title

A *word*, **two**, ~~gone~~ and `a * b`, snake_case_name, 2 * 3 * 4,
[here](https://example.org/x), https://kvik.dev.

- one
  1. inner
- two

```python
print("**as it is**")
```

| a | b |
|---|--:|
| 1 | x |
| 2 \\| 3 | 4 |

> quoted
"""
    page = play("chat")
    found = page.evaluate(
        """async (text) => {
            const { Markdown } = await import("/page/markdown.js");
            const made = new Markdown();
            made.append(text);
            const of = (selector) => [...made.element.querySelectorAll(selector)].map((each) => each.textContent);
            const names = ["h3", "em", "strong", "del", "p code", "a", "ul > li", "ol > li", "pre", "th", "td"];
            return Object.fromEntries([...names, "blockquote"].map((each) => [each, of(each)]));
        }""",
        text,
    )
    assert found == {
        "h3": ["Title"],
        "em": ["word"],
        "strong": ["two"],
        "del": ["gone"],
        "p code": ["a * b"],
        "a": ["here (example.org)", "https://kvik.dev"],
        "ul > li": ["oneinner", "two"],
        "ol > li": ["inner"],
        "pre": ['print("**as it is**")'],
        "th": ["a", "b"],
        "td": ["1", "x", "2 | 3", "4"],
        "blockquote": ["quoted"],
    }


def test_only_the_last_blocks_are_made_again(play: Play) -> None:
    page = play("chat")
    kept = page.evaluate(
        """async () => {
            const { Markdown } = await import("/page/markdown.js");
            const made = new Markdown();
            for (let at = 0; at < 50; at++) made.append(`Paragraph ${at}.\n\n`);
            const before = [...made.element.children];
            made.append("and ");
            made.append("more");
            const after = [...made.element.children];
            return before.filter((element, at) => after[at] === element).length;
        }"""
    )
    assert kept >= 48
