// Section 3: the triangle of work without the cache beside the line with it, and what both cost so far.

import { box, html, picture, stripes, svg, text, widthOf } from "kvik/draw.js";
import { bytes, count, counted, short, time, times } from "kvik/figures.js";
import { totals } from "kvik/trace.js";

export function build(figure, trace) {
  const { steps, same, model } = trace;
  const without = html("div", {});
  const withCache = html("div", {});
  const table = html("div", {});
  const curve = html("div", {});
  const sentence = html("p", {});
  const proof = html("div", { class: "proof" });
  const triangles = [triangle(trace, without, "without"), triangle(trace, withCache, "with_cache")];
  figure.append(
    html("div", { class: "columns" }, html("div", {}, html("h3", {}, "Without the cache"), without), html("div", {}, html("h3", {}, "With the cache"), withCache)),
    html("p", { class: "note" }, "A line for each step, a column for each token. Steps to come are pale."),
    sentence,
    table,
    html("p", { class: "note" }, "Both ways read all weights once a step, and the keys and values of all tokens: the cache saves the arithmetic, and the writing."),
    html("h3", {}, "Time of each step, as the engine ran it: without the cache (dashed) and with it"),
    curve,
    html("h3", {}, "And the result is the same"),
    proof,
  );
  proof.append(...equality(same, model));

  function show(step) {
    for (const one of triangles) one(step);
    const [plain, kept] = [totals(steps, "without", step), totals(steps, "with_cache", step)];
    const last = steps[step];
    sentence.textContent =
      step === 0
        ? "In the first step both compute the whole prompt: there is nothing to reuse yet."
        : `In this step ${counted(last.without.num_tokens, "token is", "tokens are")} computed without the cache, of which` +
          ` ${count(last.without.num_repeated_tokens)} had been computed before; with it ${count(last.with_cache.num_tokens)} is.` +
          ` So far ${count(plain.num_repeated_tokens)} of ${count(plain.num_tokens)} computed tokens had been computed before.`;
    table.replaceChildren(html("div", { class: "wide" }, costs(plain, kept, step)));
    curve.replaceChildren(times_of_steps(steps, step, widthOf(figure)));
  }

  return { show };
}

// Draws all steps once for a width, and covers those to come.
function triangle(trace, place, lane) {
  const { steps, tokens } = trace;
  let drawn; // its width, and the cover
  function draw(width) {
    const cell = Math.min(14, width / (tokens.length - 1));
    const side = (cell - (cell > 5 ? 1 : 0)).toFixed(2);
    const paths = { kept: [], again: [], new: [] };
    steps.forEach(({ [lane]: { first_position: first, num_tokens, num_repeated_tokens } }, at) => {
      const old = first + num_repeated_tokens;
      for (let position = 0; position < first + num_tokens; position++) {
        const kind = position < first ? "kept" : position < old ? "again" : "new";
        paths[kind].push(`M${(position * cell).toFixed(2)} ${(at * cell).toFixed(2)}h${side}v${side}h-${side}z`);
      }
    });
    const id = `again-${lane}`;
    const fills = { kept: "var(--kept)", new: "var(--new)", again: `url(#${id})` };
    const cover = svg("rect", { x: 0, width, style: "fill:var(--panel)", opacity: 0.8 });
    const whole = picture(width, cell * steps.length, "", stripes(id),
      Object.entries(paths).map(([kind, all]) => svg("path", { d: all.join(""), style: `fill:${fills[kind]}`, opacity: kind === "kept" ? 0.3 : 1 })),
      cover);
    place.replaceChildren(whole);
    drawn = { width, cell, cover, whole };
  }
  return (current) => {
    const width = widthOf(place);
    if (drawn?.width !== width) draw(width);
    const sums = totals(steps, lane, current);
    drawn.cover.setAttribute("y", drawn.cell * (current + 1));
    drawn.cover.setAttribute("height", drawn.cell * (steps.length - current - 1));
    const label = `${counted(sums.num_tokens, "token")} computed in ${counted(current + 1, "step")}, ${count(sums.num_repeated_tokens)} of them again`;
    drawn.whole.setAttribute("aria-label", label);
  };
}

function costs(plain, kept, step) {
  const rows = [
    ["tokens computed", "num_tokens", count],
    ["keys and values computed (one vector of a head each)", "num_kv_vectors", short],
    ["multiply-adds", "multiply_adds", short],
    ["weights read", "weight_bytes", bytes],
    ["keys and values read by attention", "kv_bytes", bytes],
    ["keys and values written", "kv_written_bytes", bytes],
    ["time", "seconds", time],
  ];
  return html(
    "table",
    {},
    html("caption", {}, step ? `Total of the first ${counted(step + 1, "step")}` : "The first step"),
    html("thead", {}, html("tr", {}, ["", "without", "with", "ratio"].map((name) => html("th", { scope: "col" }, name)))),
    html(
      "tbody",
      {},
      rows.map(([label, name, write]) =>
        html(
          "tr",
          {},
          html("td", {}, label),
          html("td", { "data-total": `without.${name}`, "data-value": plain[name], title: exact(name, plain[name]) }, write(plain[name])),
          html("td", { "data-total": `with_cache.${name}`, "data-value": kept[name], title: exact(name, kept[name]) }, write(kept[name])),
          html("td", {}, times(plain[name], kept[name])),
        ),
      ),
    ),
  );
}

const exact = (name, value) => (name === "seconds" ? `${value} s` : count(value));

function times_of_steps(steps, current, width) {
  const [height, left, right, bottom] = [170, 68, 12, 24];
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
  );
}

function equality(same, model) {
  const all = (part, whole) => (part === whole ? `all ${count(whole)}` : `only ${count(part)} of ${count(whole)}`);
  const again = same.num_repeated_kv_rows
    ? [
        `keys and values that were computed again without the cache: ${all(same.num_same_repeated_kv_rows, same.num_repeated_kv_rows)} rows came out as the first time;`,
        `hidden states that were computed again: ${all(same.num_same_repeated_hidden_rows, same.num_repeated_hidden_rows)};`,
      ]
    : [];
  const items = [
    `${counted(same.num_tokens, "token")}, and the ${count(same.num_logits)} logits from which they were chosen;`,
    ...again,
    `keys and values of both ways, in all ${count(model.num_layers)} layers: ${all(same.num_same_kv_rows, same.num_kv_rows)} rows agree.`,
  ];
  return [
    html("p", {}, same.is_same ? "Both ways gave the same, to the last bit. What was compared in this run:" : "They differ! What was compared in this run:"),
    html("ul", {}, items.map((item) => html("li", {}, item))),
  ];
}
