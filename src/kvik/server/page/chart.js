// Lines over time.

import { html, picture, svg, text, widthOf } from "./draw.js";

const HEIGHT = 130;
const EDGE = { left: 8, right: 8, top: 18, bottom: 20 };

// A figure with a title; `draw` takes {at_s, series: [{name, colour, values}], end_s, span_s, write}.
export function chart(title, note) {
  const place = html("div");
  const legend = html("p", { class: "legend" });
  const element = html("div", { class: "figure" }, html("h2", {}, title), note && html("p", { class: "note" }, note), place, legend);

  function draw({ at_s, series, end_s, span_s, write, most }) {
    const width = widthOf(element);
    const top = most ?? (Math.max(0, ...series.flatMap(({ values }) => values)) || 1);
    const x = (moment_s) => EDGE.left + ((width - EDGE.left - EDGE.right) * (moment_s - end_s + span_s)) / span_s;
    const y = (value) => HEIGHT - EDGE.bottom - ((HEIGHT - EDGE.top - EDGE.bottom) * value) / top;
    const lines = series.map(({ colour, values, dashes }) => {
      const points = values.map((value, at) => `${x(at_s[at]).toFixed(1)} ${y(value).toFixed(1)}`);
      return svg("path", { d: points.length ? `M${points.join("L")}` : "", style: `fill:none;stroke:var(${colour});stroke-width:2;stroke-linejoin:round`, "stroke-dasharray": dashes });
    });
    const line = (at) => svg("path", { d: `M${EDGE.left} ${y(at)}H${width - EDGE.right}`, style: "stroke:var(--line)" });
    const latest = series.map(({ name, values }) => `${name} ${values.length ? write(values.at(-1)) : "–"}`);
    place.replaceChildren(
      picture(width, HEIGHT, `${title}: now ${latest.join(", ")}`, line(0), line(top), lines,
        text(EDGE.left, EDGE.top - 6, write(top), { class: "muted small" }),
        text(EDGE.left, HEIGHT - 6, `${Math.round(span_s / 60)} min ago`, { class: "muted small" }),
        text(width - EDGE.right, HEIGHT - 6, "now", { class: "muted small", "text-anchor": "end" })),
    );
    legend.replaceChildren(...series.map(({ colour }, at) => html("span", {}, html("i", { style: `background:var(${colour})` }), latest[at])));
  }

  return { element, draw };
}
