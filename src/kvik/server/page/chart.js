// Figures over time: lines, and columns that stand on each other.

import { html, picture, svg, text, widthOf } from "./draw.js";

const HEIGHT = 130;
const EDGE = { left: 62, right: 8, top: 10, bottom: 20 };
const FLOOR = HEIGHT - EDGE.bottom;
const MOST_TICKS = 3; // above zero
const COLUMN_GAP = 1;

// A figure with a title; `draw` takes {at_s, series: [{name, colour, values}], end_s, span_s, gap_s, write, most, least}:
// no line joins samples that are `gap_s` apart, or a value that is null; ticks are at least `least` apart.
export function chart(title) {
  const place = html("div");
  const legend = html("p", { class: "legend" });
  const element = html("div", { class: "figure" }, html("h2", {}, title), place, legend);

  function draw({ at_s, series, end_s, span_s, gap_s, write, most, least }) {
    const highest = most ?? Math.max(0, ...series.flatMap(({ values }) => values));
    const { width, x, y, axes } = frame(element, { end_s, span_s, write, highest, least });
    const lines = series.map(({ colour, values, dashes }) => {
      const isJoined = (at) => at > 0 && values[at - 1] !== null && at_s[at] - at_s[at - 1] < gap_s;
      const parts = values.map((value, at) => (value === null ? "" : `${isJoined(at) ? "L" : "M"}${x(at_s[at]).toFixed(1)} ${y(value).toFixed(1)}${isJoined(at) ? "" : "h0.1"}`));
      return svg("path", { d: parts.join(""), style: `fill:none;stroke:var(${colour});stroke-width:2;stroke-linejoin:round;stroke-linecap:round`, "stroke-dasharray": dashes });
    });
    const latest = series.map(({ name, values }) => `${name} ${(values.at(-1) ?? null) === null ? "–" : write(values.at(-1))}`);
    place.replaceChildren(picture(width, HEIGHT, `${title}: now ${latest.join(", ")}`, axes, lines));
    legend.replaceChildren(...series.map(({ colour }, at) => html("span", {}, html("i", { style: `background:var(${colour})` }), latest[at])));
  }

  return { element, draw };
}

// Columns, each of whole numbers on each other: `draw` takes {series: [{name, colour, values}], first_s, step_s, end_s,
// span_s, label}; a value is what came in the `step_s` seconds from its column's beginning on.
export function columns(element, { series, first_s, step_s, end_s, span_s, label }) {
  const heights = series[0]?.values.map((_, at) => series.reduce((sum, { values }) => sum + values[at], 0)) ?? [];
  const { width, x, y, axes } = frame(element, { end_s, span_s, write: String, highest: Math.max(0, ...heights), least: 1 });
  const bases = heights.map(() => 0);
  const parts = series.map(({ name, colour, values }) => {
    const d = values.map((value, at) => {
      const [from, to] = [Math.max(x(end_s - span_s), x(first_s + at * step_s)), Math.min(x(end_s), x(first_s + (at + 1) * step_s) - COLUMN_GAP)];
      if (!value || to <= from) return "";
      const base = y(bases[at]);
      return `M${from.toFixed(1)} ${base.toFixed(1)}V${y((bases[at] += value)).toFixed(1)}H${to.toFixed(1)}V${base.toFixed(1)}z`;
    });
    return svg("path", { d: d.join(""), style: `fill:${colour}`, "data-name": name });
  });
  return picture(width, HEIGHT, label, axes, parts);
}

// The axes of a figure, and where a moment and a value stand in it.
function frame(element, { end_s, span_s, write, highest, least }) {
  const width = widthOf(element);
  const step = Math.max(least, rounded((highest || 1) / MOST_TICKS));
  const ticks = Array.from({ length: Math.ceil((highest || 1) / step - 1e-9) + 1 }, (_, at) => at * step);
  const x = (moment_s) => EDGE.left + ((width - EDGE.left - EDGE.right) * (moment_s - end_s + span_s)) / span_s;
  const y = (value) => FLOOR - ((FLOOR - EDGE.top) * value) / ticks.at(-1);
  const axes = ticks.flatMap((value) => [
    svg("path", { d: `M${EDGE.left} ${y(value)}H${width - EDGE.right}`, style: "stroke:var(--line)" }),
    text(EDGE.left - 6, y(value) + 4, write(value), { class: "muted small", "text-anchor": "end" }),
  ]);
  const ends = [text(EDGE.left, HEIGHT - 6, `${Math.round(span_s / 60)} min ago`, { class: "muted small" }), text(width - EDGE.right, HEIGHT - 6, "now", { class: "muted small", "text-anchor": "end" })];
  return { width, x, y, axes: [...axes, ...ends] };
}

// The next of 1, 2 and 5, and what is so many times ten of them.
function rounded(rough) {
  const unit = 10 ** Math.floor(Math.log10(rough));
  return unit * [1, 2, 5, 10].find((each) => each * unit >= rough * (1 - 1e-9));
}
