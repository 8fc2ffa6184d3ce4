// Section 2: one head of one layer, number by number.

import { attend } from "kvik/attention.js";
import { box, heat, html, picture, scaleOf, shorten, svg, text, widthOf } from "kvik/draw.js";
import { count, counted, percent, quoted, real, visible } from "kvik/figures.js";

const [LINE, LEAST_LINE, LONG] = [20, 11, 700]; // heights of a row: usual, least; and of all rows together
const [STRIP, TOP] = [16, 58]; // heights of the cells of a query, of what stands above the rows

export function build(figure, trace) {
  const { model, tokens, layers, same } = trace;
  const layerChoice = html("select", { id: "layer" }, layers.map(({ layer }, at) => html("option", { value: at }, String(layer))));
  const headChoice = html("select", { id: "query-head" }, layers[0].heads.map((head, at) => html("option", { value: at }, String(head))));
  [layerChoice.value, headChoice.value] = mostTelling(layers, tokens.length - 2);
  const shared = html("span", { class: "note" });
  const canvas = html("div", { class: "scroll", tabindex: 0, id: "cells", role: "application", "aria-describedby": "detail",
    "aria-label": "Keys, scores, weights and values; arrow keys choose a cell" });
  const detail = html("p", { class: "detail", id: "detail", "aria-live": "polite" });
  const proof = html("p", { class: "proof" });
  const formula = html("p", { class: "formula" });
  figure.append(
    formula,
    html("div", { class: "controls" }, html("label", {}, "Layer ", layerChoice), html("label", {}, "Query head ", headChoice), shared),
    html("p", { class: "note" }, "Each little cell is a number: green above zero, purple below. Point at one, or tap it, to see its arithmetic; with the keyboard, focus the picture and use the arrow keys."),
    canvas,
    detail,
    proof,
  );
  let step = 0;
  let chosen = null; // the largest weight, until somebody points elsewhere
  let now; // what is drawn: the head's numbers and where its columns are
  for (const choice of [layerChoice, headChoice]) choice.addEventListener("change", () => show(step));
  canvas.addEventListener("pointermove", (event) => choose(cellAt(event)));
  canvas.addEventListener("pointerdown", (event) => choose(cellAt(event)));
  canvas.addEventListener("keydown", moveChoice);

  function show(newStep) {
    step = newStep;
    const layer = layers[layerChoice.value];
    const head = Number(headChoice.value);
    const own = trace.steps[step].with_cache;
    const position = own.first_position + own.num_tokens - 1;
    const result = attend(layer, head, position);
    const group = layer.heads.length / layer.kv_heads.length;
    const kvHead = layer.kv_heads[Math.floor(head / group)];
    shared.textContent =
      (group > 1 ? `shares KV head ${kvHead} with ${counted(group - 1, "other query head")}` : `has KV head ${kvHead} of its own`) +
      (layer.window ? `; this layer sees the newest ${count(layer.window)} tokens` : "");
    const line = Math.max(LEAST_LINE, Math.min(LINE, Math.floor(LONG / result.keys.length)));
    const columns = columnsFor(widthOf(canvas), model.head_dim);
    now = { ...result, layer, position, firstNew: own.first_position, columns, line, strip: line - 4 };
    canvas.replaceChildren(draw());
    canvas.scrollTop = canvas.scrollHeight;
    tell();
    formula.replaceChildren(...formulaOf(layer, model.head_dim));
    proof.textContent =
      `The picture computes the formula in your browser from the q of this run and the k and v that lie in its cache` +
      ` (${model.kv_dtype}). The engine's own result differs from it by ${same.attention_difference.toExponential(1)} at most, over` +
      ` all tokens and heads that this page has: the rounding of single precision` +
      (model.kv_dtype === "int8" ? `, and of queries and weights to 16-bit integers.` : `.`);
  }

  function draw() {
    const { columns, q, keys, values, scores, weights, output, first, firstNew } = now;
    const { cell, label, k, score, weight, bar, v, width } = columns;
    const { line, strip } = now;
    const row = (at) => TOP + at * line;
    const small = line < 15 ? "small" : "";
    const foot = strip / 2 + 6; // from a row's top to its text's base
    const bottom = row(keys.length) + 26;
    const most = Math.max(...weights);
    const sizes = { k: scaleOf([q, ...keys]), v: scaleOf(values) };
    const strips = (rows, x) => rows.map((numbers, at) => ({ x, y: row(at) + 2, row: numbers, cell, height: strip }));
    return svg(
      "svg",
      { viewBox: `0 0 ${width} ${bottom + 34}`, width, height: bottom + 34, role: "img", "aria-label": describe() },
      text(label - 8, 32, `q of ${shorten(visible(tokens[now.position]), Math.floor(label / 8) - 4)}`, { "text-anchor": "end", class: "strong" }),
      heat([{ x: k, y: 18, row: q, cell, height: STRIP }], sizes.k),
      frame(k, 18, cell * q.length, "new"),
      text(k, 11, "query of the newest token", { class: "small muted" }),
      text(k, TOP - 6, "keys K", { class: "small muted" }),
      text(score + columns.scoreWidth - 6, TOP - 6, "score", { class: "small muted", "text-anchor": "end" }),
      text(weight, TOP - 6, columns.narrow ? "wt." : "weight", { class: "small muted" }),
      text(v, TOP - 6, "values V", { class: "small muted" }),
      keys.map((_, at) => {
        const kind = first + at >= firstNew ? "new" : "kept";
        return svg(
          "g",
          {},
          box(0, row(at) + 2, label - 4, strip, `${kind}-tint`, { rx: 2 }),
          text(label - 8, row(at) + foot, shorten(visible(tokens[first + at]), Math.floor(label / 8)), { "text-anchor": "end", class: small }),
          frame(k, row(at) + 2, cell * q.length, kind, strip),
          frame(v, row(at) + 2, cell * q.length, kind, strip),
          text(score + columns.scoreWidth - 6, row(at) + foot, real(scores[at], 2), { "text-anchor": "end", class: small }),
          box(weight, row(at) + 3, (bar * weights[at]) / most, strip - 2, kind, { rx: 1 }),
          columns.narrow ? null : text(weight + bar + 4, row(at) + foot, percent(weights[at]), { class: small }),
        );
      }),
      heat(strips(keys, k), sizes.k),
      heat(strips(values, v), sizes.v),
      text(v - 8, bottom + 12, columns.narrow ? "sum" : "weighted sum of V", { "text-anchor": "end", class: "strong" }),
      heat([{ x: v, y: bottom, row: output, cell, height: STRIP }], sizes.v),
      frame(v, bottom, cell * q.length, "new"),
      text(v + cell * q.length, bottom + 29, "what this head hands on", { class: "small muted", "text-anchor": "end" }),
      svg("rect", { id: "chosen", fill: "none", style: "stroke:var(--ink)", "stroke-width": 2 }),
    );
  }

  function describe() {
    const best = now.weights.indexOf(Math.max(...now.weights));
    return `${counted(now.keys.length, "key")}; the largest weight, ${percent(now.weights[best])}, is that of ${visible(tokens[now.first + best])}`;
  }

  function cellAt(event) {
    const drawn = canvas.firstChild.getBoundingClientRect();
    const [x, y] = [event.clientX - drawn.left, event.clientY - drawn.top];
    const { k, score, weight, v, cell: size } = now.columns;
    const dimension = (start) => Math.max(0, Math.min(now.q.length - 1, Math.floor((x - start) / size)));
    const { row: before, d: same } = cell();
    if (y < TOP - 16) return { column: "q", row: before, d: dimension(k) };
    const row = Math.max(0, Math.floor((y - TOP) / now.line));
    if (row >= now.keys.length) return { column: "sum", row: before, d: dimension(v) };
    if (x < score) return { column: "k", row, d: dimension(k) };
    if (x < weight) return { column: "score", row, d: same };
    return x < v ? { column: "weight", row, d: same } : { column: "v", row, d: dimension(v) };
  }

  function choose(newCell) {
    chosen = newCell;
    tell();
  }

  // The chosen cell, or the nearest that there is in this step.
  function cell() {
    const { column, row, d } = chosen ?? { column: "weight", row: now.weights.indexOf(Math.max(...now.weights)), d: 0 };
    return { column, row: Math.min(row, now.keys.length - 1), d };
  }

  // Arrow keys move within the picture while it has the focus, and step through the text elsewhere.
  function moveChoice(event) {
    const order = ["k", "score", "weight", "v"];
    const from = cell();
    const { column, row, d } = from;
    const [wide, at] = [["q", "k", "v", "sum"].includes(column), order.indexOf(column)];
    const moves = {
      ArrowUp: () => (column === "sum" ? { ...from, column: "v", row: now.keys.length - 1 } : row ? { ...from, row: row - 1 } : { ...from, column: column === "k" ? "q" : column }),
      ArrowDown: () => (column === "q" ? { ...from, column: "k", row: 0 } : row < now.keys.length - 1 ? { ...from, row: row + 1 } : { ...from, column: column === "v" ? "sum" : column }),
      ArrowLeft: () => (wide && d ? { ...from, d: d - 1 } : at > 0 ? { column: order[at - 1], row, d: now.q.length - 1 } : from),
      ArrowRight: () => (wide && d < now.q.length - 1 ? { ...from, d: d + 1 } : at >= 0 && at < 3 ? { column: order[at + 1], row, d: 0 } : from),
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation();
    choose(moves[event.key]());
    canvas.querySelector("#chosen").scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  function tell() {
    const { columns, keys, line, strip } = now;
    const { column, row, d } = cell();
    const places = {
      q: [columns.k + d * columns.cell, 18, columns.cell],
      k: [columns.k + d * columns.cell, TOP + row * line + 2, columns.cell],
      score: [columns.score, TOP + row * line + 1, columns.scoreWidth - 2],
      weight: [columns.weight - 2, TOP + row * line + 1, columns.v - columns.weight - 4],
      v: [columns.v + d * columns.cell, TOP + row * line + 2, columns.cell],
      sum: [columns.v + d * columns.cell, TOP + keys.length * line + 26, columns.cell],
    };
    const [x, y, width] = places[column];
    const mark = canvas.querySelector("#chosen");
    for (const [name, value] of Object.entries({ x, y, width, height: ["q", "sum"].includes(column) ? STRIP : strip })) mark.setAttribute(name, value);
    detail.textContent = arithmetic(column, row, d);
  }

  function arithmetic(column, row, d) {
    const { q, keys, values, products, scores, sink, powers, sum, weights, output, layer, first, largest } = now;
    const name = quoted(tokens[first + row]);
    const by = isPlain(layer, q.length) ? `/ √${q.length}` : `× ${real(layer.scale, 4)}`;
    const scaled = `q·k ${by} = ${real(products[row])} ${by}`;
    const signed = (number) => (number < 0 ? `(${real(number)})` : real(number));
    const terms = weights
      .map((part, at) => [part, values[at][d]])
      .sort((a, b) => b[0] - a[0])
      .slice(0, 4)
      .map(([part, value]) => `${real(part)} × ${real(value)}`);
    const whole =
      layer.sinks !== null
        ? `with the sink's, ${real(Math.exp(sink - largest) / sum, 4)}, the weights add up to 1`
        : weights.length === 1
          ? "it is the only one"
          : `all ${weights.length} weights add up to 1`;
    return {
      q: () => `q[${d}] = ${real(q[d])}: dimension ${d} of what ${quoted(tokens[now.position])} looks for`,
      k: () => `q[${d}] × k[${d}] of ${name} = ${real(q[d])} × ${real(keys[row][d])} = ${real(q[d] * keys[row][d])}; all ${q.length} such products add up to q·k = ${real(products[row])}`,
      score: () =>
        layer.soft_cap === null
          ? `score of ${name}: ${scaled} = ${real(scores[row])}`
          : `score of ${name}: ${real(layer.soft_cap, 0)} × tanh(${scaled} / ${real(layer.soft_cap, 0)}) = ${real(scores[row])}`,
      weight: () => `weight of ${name}: exp(${real(scores[row])} − ${signed(largest)}) / Σ exp = ${real(powers[row])} / ${real(sum)} = ${real(weights[row], 4)}; ${whole}`,
      v: () => `weight × v[${d}] of ${name} = ${real(weights[row], 4)} × ${real(values[row][d])} = ${real(weights[row] * values[row][d], 4)}; over all tokens these add up to ${real(output[d])}`,
      sum: () => `output[${d}] = ${terms.join(" + ")}${weights.length > terms.length ? ` + ${weights.length - terms.length} smaller` : ""} = ${real(output[d])}`,
    }[column]();
  }

  return { show };
}

// The layer and head that look most at tokens other than the first, where many heads put what they do not need, and
// the newest.
function mostTelling(layers, position) {
  let best = [0, 0, -1];
  layers.forEach((layer, at) => {
    layer.heads.forEach((_, head) => {
      const { weights } = attend(layer, head, position);
      const most = Math.max(0, ...weights.slice(1, -1));
      if (most > best[2]) best = [at, head, most];
    });
  });
  return best.slice(0, 2);
}

// Whether scores are divided by the root of the head's dimensions, as in most models.
const isPlain = (layer, dimensions) => Math.abs(layer.scale * Math.sqrt(dimensions) - 1) < 1e-6;

// softmax(QK^T / sqrt(d)) V, or what a model with a scale or a cap of its own has in its place.
function formulaOf(layer, dimensions) {
  const letter = (name) => html("i", {}, name);
  const product = [letter("Q"), " ", letter("K"), html("sup", {}, "⊤")];
  const [scaled, where] = isPlain(layer, dimensions)
    ? [[...product, " / √", letter("d")], [`d = ${dimensions}, the numbers of a key`]]
    : [[letter("s"), " · ", ...product], [`s = ${real(layer.scale, 4)}, this model's own scale`]];
  const inside = layer.soft_cap === null ? scaled : [letter("c"), " · tanh(", ...scaled, " / ", letter("c"), ")"];
  if (layer.soft_cap !== null) where.push(`c = ${count(layer.soft_cap)}, which no score passes`);
  if (layer.sinks !== null) where.push("the softmax has one more score, this head's sink, which brings no value");
  return ["softmax(", ...inside, ") ", letter("V"), html("small", {}, where.join("; "))];
}

const frame = (x, y, width, kind, height = STRIP) =>
  svg("rect", { x: x - 0.5, y: y - 0.5, width: width + 1, height: height + 1, fill: "none", style: `stroke:var(--${kind})` });

// Where the columns are, for a picture so wide and heads of so many dimensions.
function columnsFor(width, dimensions) {
  const narrow = width < 560;
  const label = narrow ? 70 : 108;
  const scoreWidth = narrow ? 46 : 68;
  const bar = narrow ? 30 : 64;
  const weightWidth = bar + (narrow ? 10 : 64);
  const cell = (width - label - scoreWidth - weightWidth - 6) / (2 * dimensions);
  const k = label;
  const score = k + cell * dimensions + 4;
  const weight = score + scoreWidth;
  return { narrow, width, label, k, score, scoreWidth, weight, bar, v: weight + weightWidth, cell };
}
