// Numbers: what the engine did in the last 15 minutes, and since it began.

import { chart } from "./chart.js";
import { html } from "./draw.js";
import { bytes, count, percent } from "./figures.js";
import { live } from "./live.js";

const MINUTES = 15;
const GAP_S = 6; // between two samples, from which on the server stood still
const AGAIN_MS = 900; // after which charts are drawn anew: there is a sample a second
const STEPS_S = [60, 180, 300, 60 * MINUTES];

export function build(section, app) {
  const tiles = html("div", { class: "tiles" });
  const charts = {
    speed: chart("Tokens a second"),
    hits: chart("Prompt tokens found in the cache"),
    memory: chart("Memory of blocks"),
    load: chart("Requests"),
  };
  const misses = html("div", { class: "figure all" });
  section.append(
    html("h1", { class: "view" }, "Numbers"),
    html("p", {}, "The last 15 minutes, sampled every second since the server began, whoever looked. They are the counters of /metrics."),
    tiles,
    html("div", { class: "charts" }, Object.values(charts).map(({ element }) => element), misses),
  );

  let drawn_ms = -Infinity; // when the charts were

  const note = ({ isWhole }) => {
    if (isWhole) drawn_ms = -Infinity;
  };

  function draw() {
    const model = app.model();
    const now = model.counters;
    const hitRate = now.queried_tokens ? now.found_tokens / now.queried_tokens : 0;
    const told = [
      ["generated_tokens", count(now.generated_tokens), "tokens written"],
      ["computed_tokens", count(now.computed_tokens), "prompt tokens computed"],
      ["cached_tokens", count(now.cached_tokens), "prompt tokens read back"],
      ["hit_rate", percent(hitRate), "of prompt tokens found in the cache"],
      ["committed_bytes", bytes(now.committed_bytes), `of memory in use, ${bytes(model.num_bytes)} reserved`],
      ["evicted_blocks", count(now.evicted_blocks), `blocks evicted, ${count(now.copied_blocks)} copied`],
    ];
    if (now.disk_blocks || now.stored_tokens || now.store_written_bytes) {
      told.push(["stored_tokens", count(now.stored_tokens), `prompt tokens read from disk, ${bytes(now.store_read_bytes)}`]);
      told.push(["disk_blocks", count(now.disk_blocks), `blocks on disk, ${bytes(now.disk_bytes)}; ${bytes(now.store_written_bytes)} written`]);
    }
    tiles.replaceChildren(...told.map(([name, figure, what]) => html("div", { class: "tile", "data-name": name, "data-value": now[name] }, html("b", {}, figure), html("span", {}, what))));
    if (performance.now() - drawn_ms > AGAIN_MS) {
      drawn_ms = performance.now();
      drawCharts(model.history, model.groups[0].block_bytes);
    }
    drawMisses(now, model.history);
  }

  // Where the server stood still, or no prompt came, there is nothing to draw.
  function drawCharts({ names, rows }, blockBytes) {
    const end_s = live.now();
    const age_s = rows.length ? end_s - rows[0][0] : 0;
    const span_s = STEPS_S.find((each) => each >= age_s) ?? STEPS_S.at(-1);
    const kept = rows.filter((row) => row[0] > end_s - span_s);
    const column = (name) => kept.map((row) => row[names.indexOf(name)]);
    const at_s = column("at_s");
    const began = []; // for each sample, the first of those without a gap before it
    at_s.forEach((each, at) => began.push(at && each - at_s[at - 1] < GAP_S ? began[at - 1] : at));
    const rate = (name) => column(name).map((value, at, all) => (began[at] < at ? (value - all[at - 1]) / (at_s[at] - at_s[at - 1]) : null));
    const [found, asked] = [column("found_tokens"), column("queried_tokens")];
    const shares = found.map((value, at) => {
      const before = Math.max(began[at], at - 30); // of half a minute
      return asked[at] > asked[before] ? (value - found[before]) / (asked[at] - asked[before]) : null;
    });
    const whole = (number) => count(Math.round(number));
    const held = (name) => column(name).map((value) => value * blockBytes);
    const common = { at_s, end_s, span_s, gap_s: GAP_S, least: 1 };
    charts.speed.draw({ ...common, write: whole, series: [
      { name: "written", colour: "--written", values: rate("generated_tokens") },
      { name: "prompt, computed", colour: "--new", values: rate("computed_tokens"), dashes: "5 3" }] });
    charts.hits.draw({ ...common, most: 1, least: 0.5, write: percent, series: [{ name: "found, of the last half minute", colour: "--kept", values: shares }] });
    charts.memory.draw({ ...common, write: bytes, series: [
      { name: "held", colour: "--kept", values: held("held_blocks") },
      { name: "reusable", colour: "--reusable", values: held("reusable_blocks"), dashes: "5 3" }] });
    charts.load.draw({ ...common, write: whole, series: [
      { name: "running", colour: "--written", values: column("running") },
      { name: "waiting", colour: "--muted", values: column("waiting"), dashes: "5 3" }] });
  }

  // In the last 15 minutes, and since the server began.
  function drawMisses(now, { names, rows }) {
    const first = rows.find((row) => row[0] > live.now() - 60 * MINUTES);
    const before = (name) => (first ? first[names.indexOf(name)] : now[name]);
    const found = Object.entries(now).filter(([name, value]) => name.startsWith("miss_") && value).sort((a, b) => b[1] - a[1]);
    const cells = found.map(([name, value]) => html("tr", {}, html("td", {}, WHY[name.slice(5)] ?? name), html("td", {}, count(value - before(name))), html("td", {}, count(value))));
    const heads = ["of prompts", "in 15 minutes", "in all"].map((name) => html("th", { scope: "col" }, name));
    misses.replaceChildren(html("h2", {}, "Why matches ended"), found.length
      ? html("table", {}, html("thead", {}, html("tr", {}, heads)), html("tbody", {}, cells))
      : html("p", { class: "note" }, "No prompt has come yet."));
  }

  return { draw, note };
}

const WHY = {
  all: "all but the last token was there",
  short: "less than a block was left",
  differs: "the tokens differ from what is cached",
  unseen: "nothing cached goes on from there",
  evicted: "the next block was evicted",
  other_salt: "cached under another key or salt",
  other_format: "cached in another number format",
  window: "a window reaches back to blocks that were given up",
  off: "the prefix cache is off",
};
