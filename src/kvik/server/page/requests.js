// Requests: queue, prefill and decode of each as bars on one clock.

import { box, html, svg } from "./draw.js";
import { count, counted, time } from "./figures.js";
import { live } from "./live.js";
import { traceOf } from "./perfetto.js";
import { ask, isReadOnly, json } from "./server.js";

const MOST_ROWS = 60;
const LEAST_S = 5;
const MOST_S = 120;
const WIDTH = 1000; // of a bar's picture, which is stretched
const ID_DIGITS = 6;
const TICKS_S = [1, 2, 5, 10, 20, 30];
const MOST_TICKS = 6;
const TOLD_TOKENS = 48; // of a prompt, its last
const NAME_LETTERS = 36;
const ROLES = new Set(["system", "user", "assistant", "model", "tool"]);
const ORDER = { prefill: 0, decode: 0, queued: 1, done: 2 };

export function build(section, app) {
  const save = html("button", { type: "button" }, "Download as a Perfetto trace");
  const clock = html("p", { class: "legend" });
  const body = html("tbody");
  const axis = html("div", { class: "axis" });
  const heads = [["what", "request"], ["bar", axis], ["figure-cell optional", "prompt"], ["figure-cell optional", "cached"], ["figure-cell optional", "written"], ["figure-cell", "first token"], ["figure-cell", "a token"], ["end", "end"]];
  const table = html("table", { class: "requests" }, html("thead", {}, html("tr", {}, heads.map(([kind, name]) => html("th", { scope: "col", class: kind }, name)))), body);
  const shown = html("p", { class: "note", role: "status" });
  const nothing = html("p", { class: "empty-note" }, "No request has come since somebody looks here. Until then the server counts, and keeps neither requests nor their text.");
  section.append(
    html("h1", { class: "view" }, "Requests"),
    html("p", {}, "The requests that came since somebody looks, on one clock: how long each waited, read its prompt, and wrote. Those that run come first, then those that wait, then the newest that ended. Each is named by the end of its prompt; press it to read all of it."),
    html("div", { class: "controls" }, clock, shown, html("span", { class: "screen" }, save)),
    html("div", { class: "figure wide" }, nothing, table),
  );
  const lines = new Map(); // by key: the table's row and what is in it
  let timer;

  save.addEventListener("click", () => {
    const text = JSON.stringify(traceOf(app.model()));
    const link = html("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: "kvik-requests.json" });
    link.click();
    URL.revokeObjectURL(link.href);
  });
  app.onModel.push(() => {
    lines.clear();
    body.replaceChildren();
  });

  function line(row) {
    const cells = { name: html("span"), open: html("button", { type: "button", class: "plain", "aria-expanded": "false" }), text: html("small"), bar: html("td", { class: "bar" }) };
    for (const name of ["prompt", "cached", "written"]) cells[name] = html("td", { class: "optional" });
    for (const name of ["first", "each", "end"]) cells[name] = html("td", { class: name });
    const stop = html("button", { type: "button", "aria-label": `Abort ${row.request_id}` }, "Abort");
    stop.addEventListener("click", async () => {
      stop.disabled = true;
      await ask(`/v1/requests/${encodeURIComponent(row.request_id)}`, { method: "DELETE" }).catch((error) => (stop.title = error.message));
    });
    cells.open.append(cells.name);
    cells.open.addEventListener("click", () => (more ? shut() : read()));
    const element = html("tr", { "data-key": row.key }, html("td", { class: "what" }, cells.open, cells.text), cells.bar, cells.prompt, cells.cached, cells.written, cells.first, cells.each, cells.end);
    let more; // the row below, with the whole prompt

    function shut() {
      more.remove();
      more = undefined;
      cells.open.ariaExpanded = "false";
    }

    async function read() {
      const words = html("p", { class: "run", tabindex: 0 });
      const head = html("p", { class: "note" }, "…");
      more = html("tr", { class: "more" }, html("td", { colspan: heads.length }, head, words));
      cells.open.ariaExpanded = "true";
      element.after(more);
      try {
        const told = await json(`/v1/requests/${encodeURIComponent(row.request_id)}`);
        head.textContent = `The whole prompt, ${counted(told.num_prompt_tokens, "token")}, of ${row.request_id}`;
        words.textContent = told.prompt;
      } catch (error) {
        head.textContent = error.message;
      }
    }

    return { element, cells, stop, rows: () => (more ? [element, more] : [element]) };
  }

  function draw() {
    const model = app.model();
    const all = [...model.requests.values()].filter((row) => row.submitted_s !== null);
    const rows = all.sort((a, b) => ORDER[a.phase] - ORDER[b.phase] || b.key - a.key).slice(0, MOST_ROWS);
    shown.textContent = all.length > rows.length ? `${count(rows.length)} of ${count(all.length)}` : all.length ? counted(all.length, "request") : "";
    nothing.hidden = rows.length > 0;
    table.hidden = !rows.length;
    save.disabled = !rows.length;
    const isBusy = rows.some((row) => row.phase !== "done");
    const end_s = isBusy ? live.now() : Math.max(...rows.map((row) => row.last_token_s ?? row.submitted_s));
    const first_s = Math.max(end_s - MOST_S, Math.min(end_s - LEAST_S, ...rows.map((row) => row.submitted_s)));
    const key = (colour, text) => html("span", {}, html("i", { style: `background:var(${colour})` }), text);
    clock.replaceChildren(key("--line", "queue"), key("--new", "prefill"), key("--written", "decode"));
    const ticks = ticksOf(end_s - first_s);
    axis.replaceChildren(...ticks.map(([part, name]) => html("span", { style: `left:${100 * part}%` }, name)));
    const grid = ticks.map(([part]) => `M${(WIDTH * part).toFixed(1)} 0V18`).join("");
    const wanted = rows.map((row) => {
      const known = lines.get(row.key) ?? line(row);
      lines.set(row.key, known);
      fill(known, row, (at_s) => (WIDTH * (at_s - first_s)) / (end_s - first_s), end_s, grid);
      return known.rows();
    }).flat();
    if (wanted.length !== body.children.length || wanted.some((element, at) => body.children[at] !== element)) {
      const focused = document.activeElement;
      body.replaceChildren(...wanted);
      if (body.contains(focused)) focused.focus({ preventScroll: true });
    }
    for (const each of lines.keys()) if (!model.requests.has(each)) lines.delete(each);
    clearTimeout(timer);
    if (isBusy && !section.hidden) timer = setTimeout(draw, 250); // the clock goes on between messages
  }

  function fill({ element, cells, stop }, row, x, end_s, grid) {
    const branch = row.choice ? ` (choice ${row.choice + 1})` : "";
    const id = `…${row.request_id.slice(-ID_DIGITS)}${branch}`;
    const end = row.prompt?.trim();
    cells.name.textContent = end ? lastWords(row.prompt, row.num_prompt_tokens > TOLD_TOKENS) : id;
    cells.text.textContent = end ? id : "";
    cells.open.disabled = !end;
    const part = row.num_prompt_tokens > TOLD_TOKENS ? `, of whose prompt these are the last ${TOLD_TOKENS} tokens` : "";
    element.firstChild.title = `${row.request_id}${branch}${end ? part : ""}`;
    const last_s = row.phase === "done" ? row.last_token_s ?? row.begun_s ?? row.submitted_s : end_s;
    const parts = [
      ["line", row.submitted_s, row.begun_s ?? last_s],
      ["new", row.begun_s, row.first_token_s ?? last_s],
      ["written", row.first_token_s, last_s],
    ];
    const rects = parts.filter(([, from]) => from !== null).map(([colour, from, to]) => box(x(from), 0, Math.max(1.5, x(to) - x(from)), 18, colour));
    const waited = row.begun_s === null ? "waits" : `waited ${time(row.begun_s - row.submitted_s)}`;
    cells.bar.replaceChildren(svg("svg", { viewBox: `0 0 ${WIDTH} 18`, preserveAspectRatio: "none", role: "img", "aria-label": `${row.phase}, ${waited}` }, svg("path", { d: grid, class: "grid" }), rects));
    cells.prompt.textContent = count(row.num_prompt_tokens);
    cells.cached.textContent = count(row.num_cached_tokens);
    cells.written.textContent = count(row.num_written_tokens);
    cells.first.textContent = row.first_token_s === null ? "–" : time(row.first_token_s - row.submitted_s);
    cells.each.textContent = row.num_written_tokens > 1 ? time((row.last_token_s - row.first_token_s) / (row.num_written_tokens - 1)) : "–";
    const canStop = row.phase !== "done" && row.is_own && !isReadOnly;
    if (canStop) {
      if (cells.end.firstChild !== stop) cells.end.replaceChildren(stop);
    } else cells.end.textContent = row.error ?? row.finish_reason ?? row.phase;
  }

  return { draw, hide: () => clearTimeout(timer) };
}

// The end of a prompt's last line that is neither a control token nor the name of a role.
function lastWords(prompt, isCut) {
  const lines = prompt.split(/<[^<>\s]{1,40}>|\[\/?[A-Z_]{2,20}\]|\n/).map((line) => line.trim()).filter(Boolean);
  const at = lines.findLastIndex((line) => !ROLES.has(line.toLowerCase()));
  const line = lines[at] ?? prompt.trim();
  const sentence = line.length > NAME_LETTERS ? line.split(/(?<=[.!?])\s+/).at(-1) : line;
  const end = sentence.length > NAME_LETTERS ? sentence.slice(-NAME_LETTERS).replace(/^\S*\s+/, "") : sentence;
  return `${isCut || at > 0 || end.length < line.length ? "… " : ""}${end}`;
}

// Where the clock's ticks are, as parts of its span, and what they say.
function ticksOf(span_s) {
  const step_s = TICKS_S.find((each) => span_s / each <= MOST_TICKS) ?? TICKS_S.at(-1);
  const number = Math.floor(span_s / step_s);
  return Array.from({ length: number + 1 }, (_, at) => [1 - (at * step_s) / span_s, at ? `−${at * step_s} s` : "0 s"]);
}
