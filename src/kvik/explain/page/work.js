// Section 3: the triangle of work without the cache beside the line with it, and what both cost so far.

import { box, html, picture, stripes, svg, text, widthOf } from "kvik/draw.js";
import { bytes, count, short, time, times, totals } from "kvik/trace.js";

export function build(figure, trace) {
  const { steps, same, model } = trace;
  const without = html("div", {});
  const withCache = html("div", {});
  const table = html("div", {});
  const curve = html("div", {});
  const sentence = html("p", {});
  const proof = html("div", { class: "proof" });
  figure.append(
    html("div", { class: "columns" }, html("div", {}, html("h3", {}, "Without the cache"), without), html("div", {}, html("h3", {}, "With the cache"), withCache)),
    html("p", { class: "note" }, "A line for each step, a column for each token. Steps to come are pale."),
    sentence,
    table,
    html("h3", {}, "Time of each step, as the engine ran it"),
    curve,
    html("h3", {}, "And the result is the same"),
    proof,
  );
  proof.append(...equality(same, model));

  function show(step) {
    const width = widthOf(without);
    without.replaceChildren(triangle(trace, step, width, "without"));
    withCache.replaceChildren(triangle(trace, step, width, "with_cache"));
    const [plain, kept] = [totals(steps, "without", step), totals(steps, "with_cache", step)];
    const last = steps[step];
    sentence.textContent =
      step === 0
        ? "In the first step both compute the whole prompt: there is nothing to reuse yet."
        : `In this step ${count(last.without.num_tokens)} tokens are computed without the cache, of which` +
          ` ${count(last.without.num_repeated_tokens)} were computed before; with it ${count(last.with_cache.num_tokens)} is.` +
          ` So far ${count(plain.num_repeated_tokens)} of ${count(plain.num_tokens)} computed tokens were computed before.`;
    table.replaceChildren(html("div", { class: "wide" }, costs(plain, kept, step)));
    curve.replaceChildren(times_of_steps(steps, step, widthOf(figure)));
  }

  return { show };
}

function triangle(trace, current, width, lane) {
  const { steps, tokens } = trace;
  const cell = Math.min(14, width / (tokens.length - 1));
  const gap = cell > 5 ? 1 : 0;
  const paths = { new: "", again: "", kept: "", later: "" };
  steps.forEach((step, at) => {
    const { first_position: first, num_tokens: count_, num_repeated_tokens: repeated } = step[lane];
    const run = (kind, from, to) => {
      for (let position = from; position < to; position++) {
        paths[at > current ? "later" : kind] += `M${(position * cell).toFixed(2)} ${(at * cell).toFixed(2)}h${(cell - gap).toFixed(2)}v${(cell - gap).toFixed(2)}h${(gap - cell).toFixed(2)}z`;
      }
    };
    run("kept", 0, first);
    run("again", first, first + repeated);
    run("new", first + repeated, first + count_);
  });
  const id = `again-${lane}`;
  const fills = { later: "var(--line)", kept: "var(--kept)", new: "var(--new)", again: `url(#${id})` };
  const opacity = { later: 0.45, kept: 0.3, new: 1, again: 1 };
  const sums = totals(steps, lane, current);
  return picture(
    width,
    cell * steps.length,
    `${count(sums.num_tokens)} tokens computed in ${current + 1} steps, ${count(sums.num_repeated_tokens)} of them again`,
    stripes(id),
    Object.entries(paths).map(([kind, d]) => svg("path", { d, style: `fill:${fills[kind]}`, opacity: opacity[kind] })),
  );
}

function costs(plain, kept, step) {
  const rows = [
    ["tokens computed", "num_tokens", count],
    ["keys and values computed (one vector of a head each)", "num_kv_vectors", short],
    ["multiply-adds", "multiply_adds", short],
    ["weights read", "weight_bytes", bytes],
    ["keys and values read by attention", "kv_bytes", bytes],
    ["time", "seconds", time],
  ];
  return html(
    "table",
    {},
    html("caption", {}, `Total of the first ${count(step + 1)} step${step ? "s" : ""}`),
    html("thead", {}, html("tr", {}, ["", "without", "with", "ratio"].map((name) => html("th", { scope: "col" }, name)))),
    html(
      "tbody",
      {},
      rows.map(([label, name, write]) =>
        html(
          "tr",
          {},
          html("td", {}, label),
          html("td", { "data-total": `without.${name}`, "data-value": plain[name] }, write(plain[name])),
          html("td", { "data-total": `with_cache.${name}`, "data-value": kept[name] }, write(kept[name])),
          html("td", {}, times(plain[name], kept[name])),
        ),
      ),
    ),
  );
}

function times_of_steps(steps, current, width) {
  const [height, left, right, bottom] = [170, 56, 12, 24];
  const most = Math.max(...steps.flatMap((step) => [step.without.seconds, step.with_cache.seconds]));
  const x = (at) => left + ((width - left - right) * at) / Math.max(1, steps.length - 1);
  const y = (seconds) => 10 + (height - bottom - 10) * (1 - seconds / most);
  const line = (lane, colour, dashes) =>
    svg("polyline", {
      points: steps.map((step, at) => `${x(at).toFixed(1)},${y(step[lane].seconds).toFixed(1)}`).join(" "),
      fill: "none", "stroke-width": 2.5, "stroke-dasharray": dashes, style: `stroke:var(--${colour})`,
    });
  const dot = (lane, colour) => svg("circle", { cx: x(current), cy: y(steps[current][lane].seconds), r: 5, style: `fill:var(--${colour})` });
  return picture(
    width,
    height,
    `Without the cache the last step takes ${time(steps.at(-1).without.seconds)}, with it ${time(steps.at(-1).with_cache.seconds)}`,
    [0, 0.5, 1].map((part) =>
      svg("g", {},
        box(left, y(most * part), width - left - right, 1, "line"),
        text(left - 6, y(most * part) + 4, part ? time(most * part) : "0", { "text-anchor": "end", class: "small muted" }),
      ),
    ),
    line("without", "again", "6 3"),
    line("with_cache", "kept"),
    dot("without", "again"),
    dot("with_cache", "kept"),
    text(left + 4, height - 4, "first step", { class: "small muted" }),
    text(width - right, height - 4, `step ${count(steps.length)}`, { class: "small muted", "text-anchor": "end" }),
    text((left + width) / 2, height - 4, "dashed: without · solid: with", { class: "small muted", "text-anchor": "middle" }),
  );
}

function equality(same, model) {
  const all = (part, whole) => (part === whole ? `all ${count(whole)}` : `only ${count(part)} of ${count(whole)}`);
  return [
    html("p", {}, same.is_same ? "Both ways gave the same, to the last bit. What was compared in this run:" : "They differ! What was compared in this run:"),
    html(
      "ul",
      {},
      html("li", {}, `${count(same.num_tokens)} tokens, and the ${count(same.num_logits)} logits from which they were chosen;`),
      html("li", {}, `keys and values that were computed again without the cache: ${all(same.num_same_repeated_kv_rows, same.num_repeated_kv_rows)} rows came out as the first time;`),
      html("li", {}, `hidden states that were computed again: ${all(same.num_same_repeated_hidden_rows, same.num_repeated_hidden_rows)};`),
      html("li", {}, `keys and values of both ways, in all ${count(model.num_layers)} layers: ${all(same.num_same_kv_rows, same.num_kv_rows)} rows agree.`),
    ),
  ];
}
