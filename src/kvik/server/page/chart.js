// Lines over time.

import { html, picture, svg, text, widthOf } from "./draw.js";

const HEIGHT = 130;
const EDGE = { left: 62, right: 8, top: 10, bottom: 20 };
const MOST_TICKS = 3; // above zero

// A figure with a title; `draw` takes {at_s, series: [{name, colour, values}], end_s, span_s, gap_s, write, most, least}:
// no line joins samples that are `gap_s` apart, or a value that is null; ticks are at least `least` apart.
export function chart(title, note) {
  const place = html("div");
  const legend = html("p", { class: "legend" });
  const element = html("div", { class: "figure" }, html("h2", {}, title), note && html("p", { class: "note" }, note), place, legend);

  function draw({ at_s, series, end_s, span_s, gap_s, write, most, least }) {
    const width = widthOf(element);
    const highest = most ?? (Math.max(0, ...series.flatMap(({ values }) => values)) || 1);
    const step = Math.max(least, rounded(highest / MOST_TICKS));
    const ticks = Array.from({ length: Math.ceil(highest / step - 1e-9) + 1 }, (_, at) => at * step);
    const top = ticks.at(-1);
    const x = (moment_s) => EDGE.left + ((width - EDGE.left - EDGE.right) * (moment_s - end_s + span_s)) / span_s;
    const y = (value) => HEIGHT - EDGE.bottom - ((HEIGHT - EDGE.top - EDGE.bottom) * value) / top;
    const lines = series.map(({ colour, values, dashes }) => {
      const isJoined = (at) => at > 0 && values[at - 1] !== null && at_s[at] - at_s[at - 1] < gap_s;
      const parts = values.map((value, at) => (value === null ? "" : `${isJoined(at) ? "L" : "M"}${x(at_s[at]).toFixed(1)} ${y(value).toFixed(1)}${isJoined(at) ? "" : "h0.1"}`));
      return svg("path", { d: parts.join(""), style: `fill:none;stroke:var(${colour});stroke-width:2;stroke-linejoin:round;stroke-linecap:round`, "stroke-dasharray": dashes });
    });
    const tick = (value) => [
      svg("path", { d: `M${EDGE.left} ${y(value)}H${width - EDGE.right}`, style: "stroke:var(--line)" }),
      text(EDGE.left - 6, y(value) + 4, write(value), { class: "muted small", "text-anchor": "end" }),
    ];
    const latest = series.map(({ name, values }) => `${name} ${(values.at(-1) ?? null) === null ? "–" : write(values.at(-1))}`);
    place.replaceChildren(
      picture(width, HEIGHT, `${title}: now ${latest.join(", ")}`, ticks.flatMap(tick), lines,
        text(EDGE.left, HEIGHT - 6, `${Math.round(span_s / 60)} min ago`, { class: "muted small" }),
        text(width - EDGE.right, HEIGHT - 6, "now", { class: "muted small", "text-anchor": "end" })),
    );
    legend.replaceChildren(...series.map(({ colour }, at) => html("span", {}, html("i", { style: `background:var(${colour})` }), latest[at])));
  }

  return { element, draw };
}

// The next of 1, 2 and 5, and what is so many times ten of them.
function rounded(rough) {
  const unit = 10 ** Math.floor(Math.log10(rough));
  return unit * [1, 2, 5, 10].find((each) => each * unit >= rough * (1 - 1e-9));
}
