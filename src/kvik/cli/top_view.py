"""What `kvik top` shows of a model: lines of a frame that is as wide and as high as the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from kvik.cli.terminal import STEERING, rate, seconds
from kvik.client.live import FREE, HELD, REUSABLE, SHARED, LiveModel, LiveState, Request
from kvik.units import amount

WIDE = 100
"""Columns from which on miss reasons stand beside the blocks, in words."""

MAX_MAP_SHARE = 1 / 3
"""Of the lines, for blocks."""

MIN_REQUEST_LINES = 4
MIN_TEXT, MAX_ID, MIN_ID, MAX_WORDS = 16, 28, 10, 40
LETTERS, CELLS = ".rHS", "·███"  # by look: where no colours tell them apart, and where they do
STYLES = {FREE: "bright_black", REUSABLE: "cyan", HELD: "yellow", SHARED: "magenta"}
PHASE_STYLES = {"decode": "green", "prefill": "yellow", "queued": "magenta"}
WHY = {
    "all": "all but the last token was there",
    "short": "less than a block was left",
    "differs": "the tokens differ from what is cached",
    "unseen": "nothing cached goes on from there",
    "evicted": "the next block was evicted",
    "other_salt": "cached under another key or salt",
    "other_format": "cached in another number format",
    "window": "a window reaches back to blocks that were given up",
    "damaged": "the stored block is damaged",
    "off": "the prefix cache is off",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a frame is shown, and what stands in it beside the state."""

    width: int
    height: int
    has_colours: bool
    url: str
    clock: str
    lost: str | None = None  # why the server is not there now
    has_key: bool = False  # so that requests of others may not be told


def frame(state: LiveState, model: LiveModel, place: Place) -> list[Text]:
    """The lines, none wider and not more than there is room for."""
    head = _head(state, model, place)
    requests = model.ordered_requests
    wanted = max(MIN_REQUEST_LINES, min(len(requests) + 3, place.height // 2))
    room = place.height - len(head) - wanted
    middle = _middle(model, place, room)
    lines = [*head, *middle, *_requests(model, requests, place, place.height - len(head) - len(middle))]
    for line in lines:
        line.no_wrap = True
        line.truncate(place.width)
    return lines[: place.height]


def one_line(text: str) -> str:
    """A server's text with nothing in it that would steer a terminal or end a line."""
    return " ".join(text.split()).translate(STEERING)


def map_cells(looks: bytes, size: int) -> bytes:
    """A look for each run of so many blocks.

    It is that of most of its blocks that are not free; of as many, that which more depend on.
    """
    if size == 1:
        return looks
    runs = (looks[start : start + size] for start in range(0, len(looks), size))
    return bytes(max((SHARED, HELD, REUSABLE, FREE), key=lambda look: _weight(run, look)) for run in runs)


def _weight(run: bytes, look: int) -> float:
    return 0.5 * (look in run) if look == FREE else run.count(look)


def _head(state: LiveState, model: LiveModel, place: Place) -> list[Text]:
    names = list(state.models)
    name = one_line(model.description.id)
    if len(names) > 1:
        name += f" ({names.index(model.description.id) + 1} of {len(names)} models)"
    title = Text.assemble(("kvik top", "bold"), " · ", (name, "bold"), f" · {place.url}")
    room = place.width - len(place.clock) - 2
    title.truncate(max(0, room), overflow="ellipsis", pad=True)
    title.append(f"  {place.clock}")
    lines = [title]
    if place.lost is not None:
        lines.append(Text(f"trying again: {one_line(place.lost)}", "reverse"))
    counters, hit_rate = model.counters, model.hit_rate
    named = {"computed": "computed_tokens", "cached": "cached_tokens", "written": "generated_tokens"}
    speed = [f"{what} {_rate(model.rate(counter))} tok/s" for what, counter in named.items()]
    memory = f"{amount(int(counters.get('committed_bytes', 0)))} of {amount(model.description.num_bytes)}"
    lines += _flow([*speed, f"hit rate {'-' if hit_rate is None else _percent(hit_rate)}"], place.width)
    named = {
        "evicted": "evicted_blocks",
        "copied": "copied_blocks",
        "pinned": "pinned_blocks",
        "preempted": "preemptions",
    }
    if counters.get("disk_blocks"):
        named["on disk"] = "disk_blocks"
    counts = [f"{what} {int(counters.get(counter, 0)):,}" for what, counter in named.items()]
    return [*lines, *_flow([f"cache {memory}", *counts], place.width)]


def _middle(model: LiveModel, place: Place, room: int) -> list[Text]:
    """Blocks and miss reasons: beside each other where there is room, and less of both where there is little."""
    if room < 3:
        return []
    misses = model.misses
    if place.width < WIDE or not misses:
        told = [f"{one_line(reason)[:MAX_WORDS]} {count:,}" for reason, count in misses.items()] or ["none yet"]
        below = [Text(), *_flow(told, place.width, label="misses  ")]
        return [*_maps(model, place, place.width, room - len(below)), *below][:room]
    words = [f"{count:>7,} {WHY.get(reason, one_line(reason)[:MAX_WORDS])}" for reason, count in misses.items()]
    width = place.width - max(map(len, words)) - 3
    left = _maps(model, place, width, room)
    right = [Text(), Text("why matches ended", "bold"), *map(Text, words)]
    return _beside(left, right[:room], width)


def _beside(left: list[Text], right: list[Text], width: int) -> list[Text]:
    lines = []
    for at in range(max(len(left), len(right))):
        line = left[at].copy() if at < len(left) else Text()
        line.truncate(width, pad=True)
        if at < len(right):
            line.append("   ").append_text(right[at])
        lines.append(line)
    return lines


def _maps(model: LiveModel, place: Place, width: int, room: int) -> list[Text]:
    """The blocks of each group of layers; only how many are in which state where there is no room for more."""
    groups = model.description.groups
    most = max(len(groups), int(place.height * MAX_MAP_SHARE))
    marks = CELLS if place.has_colours else LETTERS
    lines: list[Text] = []
    for at, group in enumerate(groups):
        left = (min(room, most + 3 * len(groups)) - len(lines)) // (len(groups) - at)
        if left < 2:
            break
        counts, looks = model.block_counts(at), model.looks(at)
        what = f"window of {group.window:,}  " if group.window else "blocks  "
        told = [
            (HELD, f" {counts.held:,} held"), (SHARED, f" {counts.shared:,} of them shared"),
            (REUSABLE, f" {counts.reusable:,} reusable"), (FREE, f" {counts.free:,} free"),
        ]  # fmt: skip
        parts = [Text.assemble((marks[look], _style(look, place)), text) for look, text in told]
        legend, size = _flow(parts, width, label=what), 1
        for _ in range(2):  # how many blocks a character is may take a line from the map
            size = max(1, -(-len(looks) // max(1, width * (left - 1 - len(legend)))))
            told_size = [] if size == 1 else [Text(f"{size:,} a character")]
            legend = _flow([*parts, *told_size], width, label=what)
        cells = map_cells(looks, size)
        rows = [_cells(cells[start : start + width], marks, place) for start in range(0, len(cells), width)]
        lines += [Text(), *legend, *rows[: max(0, left - 1 - len(legend))]]
    return lines


def _cells(looks: bytes, marks: str, place: Place) -> Text:
    line, start = Text(), 0
    while start < len(looks):
        look, end = looks[start], start + 1
        while end < len(looks) and looks[end] == look:
            end += 1
        line.append(marks[look] * (end - start), _style(look, place))
        start = end
    return line


def _style(look: int, place: Place) -> str:
    return STYLES[look] if place.has_colours else ""


def _phase(row: Request) -> str:
    """How it ended, where it did."""
    return "failed" if row.error else one_line(row.finish_reason or row.phase)[:10]


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    show: Callable[[Request], str]
    need: int  # the greater, the sooner it is left out
    is_left: bool = False


_COLUMNS = (
    _Column("phase", _phase, 0, is_left=True),
    _Column("prompt", lambda row: f"{row.num_prompt_tokens:,}", 0),
    _Column("cached", lambda row: f"{row.num_cached_tokens:,}", 0),
    _Column("computed", lambda row: f"{row.num_computed_tokens:,}", 2),
    _Column("written", lambda row: f"{row.num_written_tokens:,}", 0),
    _Column("TTFT", lambda row: _time(row.time_to_first_token_s), 0),
    _Column("a token", lambda row: _time(row.time_per_token_s), 1),
    _Column("blocks", lambda row: f"{row.num_blocks:,}" if row.num_blocks else "-", 3),
    _Column("KV", lambda row: amount(row.kv_bytes), 4),
)


def _requests(model: LiveModel, requests: Sequence[Request], place: Place, room: int) -> list[Text]:
    if room < 3:
        return []
    num_running = sum(not row.is_ended and row.phase != "queued" for row in requests)
    num_queued = sum(row.phase == "queued" for row in requests)
    parts = [
        f"{num_running:,} running",
        f"{num_queued:,} waiting",
        f"{len(requests) - num_running - num_queued:,} ended",
    ]
    if place.has_key:
        others = int(model.counters.get("running", 0) + model.counters.get("waiting", 0)) - num_running - num_queued
        parts += [f"{others:,} of other keys"] if others > 0 else []
    heading = _flow(parts, place.width, label="requests  ")
    num_hidden = len(requests) - (room - 2 - len(heading))
    if num_hidden > 0:
        heading = _flow([*parts, f"{num_hidden:,} not shown"], place.width, label="requests  ")
    shown = requests[: max(0, room - 2 - len(heading))]
    return [Text(), *heading, *(_table(shown, place.width) if shown else [])]


def _table(rows: Sequence[Request], width: int) -> list[Text]:
    """The columns that there is room for, then whose request it is, and the newest text where that is told."""
    cells = {column.name: [column.show(row) for row in rows] for column in _COLUMNS}
    widths = {name: max(cell_len(text) for text in (name, *found)) for name, found in cells.items()}
    columns = list(_COLUMNS)
    while len(columns) > 1 and sum(widths[each.name] + 2 for each in columns) - 2 > width:
        columns.remove(max(reversed(columns), key=lambda each: each.need))
    left = width - sum(widths[each.name] + 2 for each in columns)
    ids = [one_line(row.request_id[:64]) + (f" ({row.choice + 1})" if row.choice else "") for row in rows]
    id_width = min(left, MAX_ID, max(map(cell_len, ids), default=0))
    id_width = id_width if id_width >= min(MIN_ID, max(map(cell_len, ids))) else 0
    text_width = left - id_width - 2 if id_width and left - id_width - 2 >= MIN_TEXT else 0

    def line(texts: Iterable[str], request_id: str, text: str, style: str) -> Text:
        aligned = [
            each.ljust(widths[column.name]) if column.is_left else each.rjust(widths[column.name])
            for column, each in zip(columns, texts, strict=True)
        ]
        parts = [*aligned, *([set_cell_size(request_id, id_width)] if id_width else [])]
        if text_width:
            parts.append(text)
        return Text("  ".join(parts).rstrip(), style)

    heads = line((each.name for each in columns), "request", "", "bold")
    lines = [heads]
    for at, row in enumerate(rows):
        style = "bright_black" if row.is_ended else ""
        told = line((cells[each.name][at] for each in columns), ids[at], _tail(row, text_width), style)
        if not row.is_ended:
            told.stylize(PHASE_STYLES.get(row.phase, ""), 0, widths["phase"])
        lines.append(told)
    return lines


def _tail(row: Request, width: int) -> str:
    """The newest text that fits."""
    text = one_line((row.written or row.prompt or "")[-4 * width - 1 :])
    while cell_len(text) > width:
        text = text[cell_len(text) - width :] if text.isascii() else text[1:]
    return text


def _flow(parts: Iterable[Text | str], width: int, *, label: str = "") -> list[Text]:
    """The parts with dots between, on as many lines as they need; the label begins the first, in bold."""
    lines = [Text.assemble((label, "bold"))]
    is_empty = True
    for part in parts:
        text = Text(part) if isinstance(part, str) else part
        if not is_empty and lines[-1].cell_len + 3 + text.cell_len > width:
            lines.append(Text(" " * len(label)))
            is_empty = True
        if not is_empty:
            lines[-1].append(" · ")
        lines[-1].append_text(text)
        is_empty = False
    return lines


def _rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else rate(tokens_per_s) if tokens_per_s else "0"


def _percent(share: float) -> str:
    """100 % is all of it."""
    return f"{100 if share >= 1 else min(99, round(100 * share))} %"


def _time(value_s: float | None) -> str:
    if value_s is None:
        return "-"
    return f"{value_s * 1e3:.1f} ms" if value_s < 0.0995 else seconds(value_s)
