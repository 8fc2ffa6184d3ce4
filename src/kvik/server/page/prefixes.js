// The prefix tree: runs of blocks that requests begin with, each where its tokens stand; and where a prompt would leave it.

import { html, token } from "./draw.js";
import { count, counted } from "./figures.js";
import { reasonOf } from "./reasons.js";
import { json } from "./server.js";

const AGAIN_MS = 2000;
const MOST_ROWS = 300;
const LETTERS = 140;
const LEAST_WIDTH = 15; // percent, of a bar that has its text within

export function build(section, app) {
  const list = html("ol", { class: "tree", "aria-label": "Runs of the tree" });
  const scale = html("p", { class: "note" });
  const detail = html("div", { class: "detail", role: "status" });
  const prompt = html("textarea", { rows: 2, "aria-label": "A prompt", placeholder: "Paste a prompt: how far would it match?" });
  const asMessage = html("input", { type: "checkbox", checked: true });
  const outcome = html("div", { role: "status" });
  const form = html("form", { class: "composer screen" }, prompt,
    html("div", { class: "buttons" }, html("button", { class: "main" }, "Look it up"), html("label", {}, asMessage, " as a message in the chat template")), outcome);
  section.append(
    html("h1", { class: "view" }, "Prefix tree"),
    html("p", {}, "What a new request can begin with and need not compute. A run stands where its tokens stand in a prompt, and is as wide as the tokens that it saves."),
    html("div", { class: "figure" }, list, scale),
    detail,
    html("h2", { class: "screen" }, "Would a prompt match?"),
    form,
  );
  let rows = [];
  let chosen; // a run's last block
  let isStale = true;
  let asked_ms = -Infinity;
  let timer;

  app.onModel.push(() => {
    isStale = true;
    asked_ms = -Infinity;
    chosen = undefined;
    showNothing();
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
    const told = await json(`/v1/cache/tree?max_level=64&max_rows=${MOST_ROWS}&model=${encodeURIComponent(model.id)}`).catch((error) => {
      scale.textContent = error.message;
      isStale = true;
    });
    if (!told || model !== app.model()) return;
    rows = told.data;
    drawRows(told.has_more);
    const row = rows.find((each) => each.last_block === chosen);
    if (row) choose(row);
    else if (chosen !== undefined) {
      chosen = undefined;
      detail.replaceChildren(html("p", { class: "note" }, "That run is no more: it goes on, branches, or was evicted. Choose another."));
    }
  }

  function drawRows(hasMore) {
    const focused = list.contains(document.activeElement) ? document.activeElement.dataset.block : undefined;
    const longest = Math.max(1, ...rows.map((row) => row.first_token + row.num_tokens));
    list.replaceChildren(...rows.map((row) => {
      const [from, width] = [(100 * row.first_token) / longest, (100 * row.num_tokens) / longest];
      const words = row.text === undefined ? "not yours to see" : row.text.trim().slice(0, LETTERS);
      const label = `${counted(row.num_tokens, "token")} from ${count(row.first_token)}, ${row.num_holders ? `held by ${row.num_holders}` : "reusable"}: ${words}`;
      const button = html("button", { type: "button", "aria-label": label, "data-block": row.last_block, "aria-pressed": String(row.last_block === chosen) },
        html("i", { class: row.num_holders ? "held" : "", style: `left:${from}%;width:${width}%` }),
        html("span", { class: row.text === undefined ? "muted" : "", style: placeOf(from, width) }, words));
      button.addEventListener("click", () => choose(row));
      return html("li", {}, button);
    }));
    if (focused) list.querySelector(`[data-block="${focused}"]`)?.focus();
    scale.textContent = rows.length
      ? `${counted(longest, "token")} from left to right; dark runs are held by a request, pale ones are kept for later.${hasMore ? ` Only the first ${count(MOST_ROWS)} runs are drawn.` : ""}`
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
      `read back by ${counted(numHits, "request")} since somebody looks`,
      row.num_holders ? `held by ${row.num_holders}${holders.length ? `: ${holders.map((each) => each.request_id).join(", ")}` : ""}` : "held by nobody",
      before === null || before === undefined ? "" : before ? `its end is evicted after ${counted(before, "other block")}` : "its end is the next to be evicted",
    ];
    const words = row.text === undefined ? "Its text is not yours to see." : row.text.replace(/^\n/, "") + (row.is_cut ? " …" : "");
    detail.replaceChildren(html("p", {}, facts.filter(Boolean).join(" · ")), html("p", { class: "run" }, words));
  }

  function showNothing() {
    detail.replaceChildren(html("p", { class: "note" }, "Choose a run to see who holds it, and its text where that is yours."));
  }

  return { draw, note, hide: () => clearTimeout(timer) };
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
