// Numbers: what the engine did in the last 15 minutes, and since it began.

import { chart, columns } from "./chart.js";
import { html } from "./draw.js";
import { bytes, count, counted, percent } from "./figures.js";
import { live } from "./live.js";
import { colourOf, inShort } from "./reasons.js";

const MINUTES = 15;
const GAP_S = 6; // between two samples, from which on the server stood still
const AGAIN_MS = 900; // after which charts are drawn anew: there is a sample a second
const STEPS_S = [60, 180, 300, 60 * MINUTES];
const COLUMNS = 30; // of a chart
const MISS = "miss_"; // begins the names of counters by reason

export function build(section, app) {
  const tiles = html("div", { class: "tiles" });
  const charts = {
    speed: chart("Tokens a second"),
    hits: chart("Prompt tokens found in the cache"),
    memory: chart("Memory of blocks"),
    load: chart("Requests"),
  };
  const heads = ["of prompts", "in 15 minutes", "in all"].map((name) => html("th", { scope: "col" }, name));
  const misses = { nothing: html("p", { class: "note" }, "No prompt has come yet."), note: html("p", { class: "note" }), place: html("div"), sums: html("tbody") };
  misses.chart = html("div", {}, misses.note, misses.place);
  misses.table = html("table", {}, html("thead", {}, html("tr", {}, heads)), misses.sums);
  const why = html("div", { class: "figure all" }, html("h2", {}, "Why matches ended"), misses.nothing, html("div", { class: "reasons" }, misses.chart, misses.table));
  section.append(
    html("h1", { class: "view" }, "Numbers"),
    html("p", {}, "The last 15 minutes, sampled every second since the server began, whoever looked. They are the counters of /metrics."),
    tiles,
    html("div", { class: "charts" }, Object.values(charts).map(({ element }) => element), why),
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
    drawSums(now, model.history);
    if (performance.now() - drawn_ms > AGAIN_MS) {
      drawn_ms = performance.now();
      drawCharts(now, model.history, model.groups[0].block_bytes);
    }
  }

  // Where the server stood still, or no prompt came, there is nothing to draw.
  function drawCharts(now, history, blockBytes) {
    const { names, rows } = history;
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
    drawColumns(now, history, end_s, span_s);
  }

  // Why matches ended: in the last 15 minutes, and since the server began.
  function drawSums(now, { names, rows }) {
    const first = rows.find((row) => row[0] > live.now() - 60 * MINUTES);
    const before = (name) => (first ? first[names.indexOf(name)] : now[name]);
    const found = reasonsOf(now);
    misses.nothing.hidden = found.length > 0;
    misses.chart.hidden = misses.table.hidden = !found.length;
    misses.sums.replaceChildren(...found.map((name) => {
      const reason = name.slice(MISS.length);
      const key = html("i", { style: `background:${colourOf(reason)}` });
      return html("tr", {}, html("td", {}, key, inShort(reason)), html("td", {}, count(now[name] - before(name))), html("td", {}, count(now[name])));
    }));
  }

  // The same by the moments when they ended.
  function drawColumns(now, { names, rows }, end_s, span_s) {
    const step_s = span_s / COLUMNS;
    const first = Math.floor((end_s - span_s) / step_s); // columns stand still while time goes on
    const series = reasonsOf(now).map((name) => {
      const [column, reason, values] = [names.indexOf(name), name.slice(MISS.length), new Array(COLUMNS + 1).fill(0)];
      for (let at = 1; at < rows.length; at++) {
        const place = Math.min(COLUMNS, Math.floor(rows[at][0] / step_s) - first);
        if (place >= 0) values[place] += rows[at][column] - rows[at - 1][column];
      }
      return { name: reason, colour: colourOf(reason), values };
    });
    const sums = series.map(({ name, values }) => `${inShort(name)} ${count(values.reduce((sum, value) => sum + value, 0))}`);
    const label = `Why matches ended, in ${counted(span_s / 60, "minute")}: ${sums.join(", ")}`;
    misses.note.textContent = `Prompts in each ${step_s} s.`;
    misses.place.replaceChildren(columns(misses.place, { series, first_s: first * step_s, step_s, end_s, span_s, label }));
  }

  return { draw, note };
}

// The counters of those reasons that matches have ended for, the commonest first.
const reasonsOf = (counters) => Object.keys(counters).filter((name) => name.startsWith(MISS) && counters[name]).sort((a, b) => counters[b] - counters[a]);
