// The prefix tree: runs of blocks that requests begin with, each where its tokens stand; and where a prompt would leave it.

import { html, token } from "./draw.js";
import { count, counted } from "./figures.js";
import { reasonOf } from "./reasons.js";
import { json } from "./server.js";

const AGAIN_MS = 2000;
const MOST_ROWS = 300;
const MOST_LEVEL = 64; // which is drawn; one can go deeper from there
const LETTERS = 140;
const LEAST_SHARED = 16; // letters, from which on a run is named by what follows
const LEAST_OWN = 12; // letters, that a name has at least
const LEAST_WIDTH = 15; // percent, of a bar that has its text within

export function build(section, app) {
  const list = html("ol", { class: "tree", "aria-label": "Runs of the tree" });
  const scale = html("p", { class: "note" });
  const path = html("p", { class: "controls", hidden: true });
  const detail = html("div", { class: "detail", role: "status" });
  const prompt = html("textarea", { rows: 2, "aria-label": "A prompt", placeholder: "Paste a prompt: how far would it match?" });
  const asMessage = html("input", { type: "checkbox", checked: true });
  const outcome = html("div", { role: "status" });
  const form = html("form", { class: "composer screen" }, prompt,
    html("div", { class: "buttons" }, html("button", { class: "main" }, "Look it up"), html("label", {}, asMessage, " as a message in the chat template")), outcome);
  section.append(
    html("h1", { class: "view" }, "Prefix tree"),
    html("p", {}, "What a new request can begin with and need not compute. A run stands where its tokens stand in a prompt, and is as wide as the tokens that it saves."),
    html("div", { class: "figure" }, path, list, scale),
    detail,
    html("h2", { class: "screen" }, "Would a prompt match?"),
    form,
  );
  let rows = [];
  let chosen; // a run's last block
  let focus; // that of the run which the tree that is shown begins with
  let isStale = true;
  let asked_ms = -Infinity;
  let timer;

  let drawnModel;
  app.onModel.push(() => {
    if (focus !== undefined && drawnModel && drawnModel !== app.model()?.id) location.hash = "#prefixes"; // its blocks are others
    askAnew();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!prompt.value) return;
    await app.ready;
    const model = app.model();
    const asked = asMessage.checked && model.is_chat ? { messages: [{ role: "user", content: prompt.value }] } : { prompt: prompt.value };
    try {
      outcome.replaceChildren(...matched(await json("/v1/cache/match", { method: "POST", body: { model: model.id, ...asked } })));
    } catch (error) {
      outcome.replaceChildren(html("p", { class: "problem" }, error.message));
    }
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  showNothing();

  function note({ isWhole, changes }) {
    if (isWhole) isStale = true;
    if (changes.some(({ model, blocks }) => blocks[0].length && model === app.model())) isStale = true;
  }

  function askAnew() {
    isStale = true;
    asked_ms = -Infinity;
    chosen = undefined;
    showNothing();
  }

  function show(place) {
    const wanted = /^\d{1,9}$/.test(place ?? "") ? Number(place) : undefined;
    if (wanted === focus) return;
    focus = wanted;
    askAnew();
  }

  // Asks anew where something has changed, and not too often.
  async function draw() {
    if (!isStale || section.hidden) return;
    const wait_ms = asked_ms + AGAIN_MS - performance.now();
    clearTimeout(timer);
    if (wait_ms > 0) {
      timer = setTimeout(draw, wait_ms);
      return;
    }
    isStale = false;
    asked_ms = performance.now();
    const model = app.model();
    const [of, id] = [focus, encodeURIComponent(model.id)];
    const below = of === undefined ? "" : `&below=${of}`;
    const told = await json(`/v1/cache/tree?max_level=${MOST_LEVEL}&max_rows=${MOST_ROWS}&model=${id}${below}`).catch((error) => {
      if (error.status === 404 && of === focus) return drawGone();
      scale.textContent = error.message;
      isStale = true;
    });
    if (!told || model !== app.model() || of !== focus) return;
    drawnModel = model.id;
    rows = told.data;
    drawPath(told.above);
    drawRows(told);
    const row = rows.find((each) => each.last_block === chosen);
    if (row) choose(row);
    else if (chosen !== undefined) {
      chosen = undefined;
      detail.replaceChildren(html("p", { class: "note" }, "That run is no more: it goes on, branches, or was evicted. Choose another."));
    }
  }

  // The way back from a part of the tree.
  function drawPath(above) {
    path.hidden = focus === undefined;
    if (path.hidden) return path.replaceChildren();
    path.replaceChildren(
      html("a", { href: "#prefixes" }, "The whole tree"),
      above !== null && html("a", { href: `#prefixes/${above}` }, "One run up"),
      html("span", { class: "note" }, `What goes on from block ${count(focus)}.`));
  }

  function drawGone() {
    rows = [];
    drawPath(null);
    list.replaceChildren();
    scale.textContent = "That run is no more: it was evicted, or its last block is not full.";
  }

  function drawRows({ has_more: hasMore, has_deeper: hasDeeper, max_level: deepest }) {
    const focused = list.contains(document.activeElement) ? document.activeElement.dataset.block : undefined;
    const first = Math.min(...rows.map((row) => row.first_token));
    const longest = Math.max(1, ...rows.map((row) => row.first_token + row.num_tokens - first));
    const starts = ownStarts(rows);
    list.replaceChildren(...rows.map((row) => {
      const [from, width] = [(100 * (row.first_token - first)) / longest, (100 * row.num_tokens) / longest];
      const start = starts.get(row) ?? 0;
      const words = row.text === undefined ? counted(row.num_tokens, "token") : `${start ? "… " : ""}${row.text.slice(start).trim().slice(0, LETTERS)}`;
      const label = `${counted(row.num_tokens, "token")} from ${count(row.first_token)}, ${row.num_holders ? `held by ${row.num_holders}` : "reusable"}: ${row.text === undefined ? "not yours to see" : words}`;
      const button = html("button", { type: "button", "aria-label": label, "data-block": row.last_block, "aria-pressed": String(row.last_block === chosen) },
        html("i", { class: row.num_holders ? "held" : "", style: `left:${from}%;width:${width}%` }),
        html("span", { class: row.text === undefined ? "muted" : "", style: placeOf(from, width) }, words));
      button.addEventListener("click", () => choose(row));
      const isCut = row.level === deepest && row.num_children > 0;
      return html("li", {}, button, isCut && html("a", { class: "deeper", href: `#prefixes/${row.last_block}` }, `${counted(row.num_children, "run")} below …`));
    }));
    if (focused) list.querySelector(`[data-block="${focused}"]`)?.focus();
    const left = [
      hasMore && `Only the first ${count(MOST_ROWS)} runs are drawn: choose one, and look at what goes on from it.`,
      hasDeeper && `Runs behind ${MOST_LEVEL} others are left out where a link says so.`,
    ].filter(Boolean);
    scale.textContent = rows.length
      ? [`${counted(longest, "token")} from left to right; dark runs are held by a request, pale ones are kept for later.`, ...left].join(" ")
      : "The tree is empty: no request has filled a block yet.";
  }

  async function choose(row) {
    chosen = row.last_block;
    for (const button of list.querySelectorAll("button")) button.setAttribute("aria-pressed", String(Number(button.dataset.block) === chosen));
    const model = app.model();
    const block = await json(`/v1/cache/blocks/${row.last_block}?model=${encodeURIComponent(model.id)}`).catch(() => undefined);
    if (chosen !== row.last_block) return;
    const holders = [...model.requests.values()].filter((each) => each.blocks?.[0]?.includes(row.last_block));
    const numHits = model.hits.get(row.last_block) ?? 0;
    const before = block?.num_evicted_before;
    const facts = [
      `Tokens ${count(row.first_token)} to ${count(row.first_token + row.num_tokens - 1)} in ${counted(row.num_blocks, "block")}`,
      numHits ? `read back by ${counted(numHits, "request")}` : "not read back yet",
      row.num_holders ? `held by ${row.num_holders}${holders.length ? `: ${holders.map((each) => each.request_id).join(", ")}` : ""}` : "held by nobody",
      before === null || before === undefined ? "" : before ? `its end is evicted after ${counted(before, "other block")}` : "its end is the next to be evicted",
    ];
    const words = row.text === undefined ? "Its text is not yours to see." : row.text.replace(/^\n/, "") + (row.is_cut ? " …" : "");
    const further = row.num_children > 0 && row.last_block !== focus &&
      html("p", { class: "screen" }, html("a", { href: `#prefixes/${row.last_block}` }, `Look only at the ${row.num_children > 1 ? `${count(row.num_children)} runs` : "run"} that go${row.num_children > 1 ? "" : "es"} on from here`));
    detail.replaceChildren(...[html("p", {}, facts.filter(Boolean).join(" · ")), html("p", { class: "run" }, words), further].filter(Boolean));
  }

  function showNothing() {
    detail.replaceChildren(html("p", { class: "note" }, "Choose a run to see who holds it, and its text where that is yours."));
  }

  return { draw, note, show, hide: () => clearTimeout(timer) };
}

// Where the text of runs that go on from one place, and begin alike as a chat's template does, begins to be their own.
function ownStarts(rows) {
  const above = []; // by level
  const beside = new Map();
  for (const row of rows) {
    above[row.level] = row;
    const parent = above[row.level - 1];
    if (row.text !== undefined) beside.set(parent, [...(beside.get(parent) ?? []), row]);
  }
  const starts = new Map();
  for (const found of beside.values()) {
    found.sort((one, other) => (one.text < other.text ? -1 : 1));
    const shared = found.slice(1).map((row, at) => sharedLetters(row.text, found[at].text));
    found.forEach(({ text }, at) => {
      const letters = Math.max(shared[at - 1] ?? 0, shared[at] ?? 0);
      const start = text.slice(0, Math.max(0, Math.min(letters, text.length - LEAST_OWN))).search(/\S*$/); // not within a word
      if (start >= LEAST_SHARED && text.slice(start).trim()) starts.set(found[at], start);
    });
  }
  return starts;
}

function sharedLetters(one, other) {
  let at = 0;
  while (at < one.length && one[at] === other[at]) at++;
  return at;
}

// A run's text is within its bar; where that is too narrow, it stands beside it.
function placeOf(from, width) {
  if (width >= LEAST_WIDTH) return `left:${from}%;width:${width}%`;
  if (from + width < 60) return `left:${from + width}%;right:0`;
  return `left:0;right:${100 - from}%;text-align:right`;
}

// Where a prompt leaves the tree.
function matched(told) {
  const { num_cached_tokens: cached, num_tokens: total, miss_reason: reason, before, found, expected = [] } = told;
  const parts = [html("p", {}, html("b", {}, `${counted(cached, "token")} of ${count(total)} would match`), `, ${count(total - cached)} would be computed. ${reasonOf(reason)}`)];
  if (!found) return parts;
  const line = (name, texts, kind) => html("p", {}, html("span", { class: "note" }, name), texts.map((text) => token({ text }, kind)));
  if (before.length) parts.push(line("… ", before, "kept"));
  parts.push(line("then it has ", found, "new"));
  if (expected.length) parts.push(line("where the cache has ", expected, ""));
  return parts;
}
