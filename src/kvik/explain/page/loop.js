// Section 1: hidden states of all tokens, and the next token out of the last one.

import { box, heat, html, picture, scaleOf, shorten, svg, text, token, widthOf } from "kvik/draw.js";
import { count, counted, percent, quoted, real, visible } from "kvik/figures.js";

const STRIP_HEIGHT = 14;

export function build(figure, trace) {
  const { model, steps, tokens, predictions, hidden } = trace;
  const shown = hidden.shape[1];
  const largest = scaleOf(tokens.slice(0, -1).map((_, at) => hidden.row(at)));
  const flow = html("ol", { class: "flow" });
  const note = html("p", { class: "note" });
  const body = html("tbody");
  const heads = ["token", "hidden state", "predicts", "comes next"].map((name) => html("th", { scope: "col" }, name));
  const rows = html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Hidden states, a row for each token" },
    html("table", { class: "rows" }, html("thead", {}, html("tr", {}, heads)), body));
  const why = html("p", { class: "proof" });
  const candidates = html("div");
  const chosen = html("p");
  figure.append(
    flow,
    note,
    rows,
    html("h3", {}, "From the last row: logits, likeliest tokens first"),
    candidates,
    chosen,
    html("h3", {}, "Why only the last hidden state matters"),
    why,
  );
  let lines = []; // a row of the table for each token, drawn once for a width
  let drawnCell;

  function drawLines(cell) {
    if (cell === drawnCell) return;
    drawnCell = cell;
    lines = tokens.slice(0, -1).map((one, at) =>
      html("tr", {},
        html("td", {}, token(one)),
        html("td", { class: "strip" }, strip(at, cell)),
        html("td", {}, shorten(visible(predictions[at]), 14)),
        html("td"),
      ),
    );
  }

  function strip(position, cell) {
    const row = hidden.row(position);
    return picture(cell * shown, STRIP_HEIGHT, `hidden state ${position}`, heat([{ x: 0, y: 0, row, cell, height: STRIP_HEIGHT }], largest));
  }

  function show(step) {
    const { with_cache: own, candidates: likely, chosen: next } = steps[step];
    const last = own.first_position + own.num_tokens - 1;
    flow.replaceChildren(
      ...[
        [counted(last + 1, "token"), "the text so far"],
        [`${count(last + 1)} × ${count(model.hidden_size)}`, `hidden states; with the cache ${count(own.num_tokens)} computed now`],
        [`1 × ${count(model.hidden_size)}`, `the last row, that of ${quoted(tokens[last])}`],
        [count(model.vocab_size), "logits, one for each token of the vocabulary"],
        [quoted(next), `${percent(likely[0].probability)} likely: the next token. And again ↺`],
      ].map(([figures, what]) => html("li", {}, html("b", {}, figures), html("span", {}, what))),
    );
    note.textContent =
      `${shown} of the ${count(model.hidden_size)} numbers of each hidden state after layer ${model.num_layers}; green is above zero,` +
      ` purple below. Without the cache all of these rows are computed in this step, with it` +
      (own.num_tokens === last + 1 ? " too: it is the whole prompt." : " only the last one.");
    drawLines(Math.max(1.5, Math.min(9, (widthOf(figure) * 0.42 - 20) / shown)));
    body.replaceChildren(...lines.slice(0, last + 1));
    lines.slice(0, last + 1).forEach((line, at) => {
      line.className = at === last ? "last" : "";
      line.firstChild.firstChild.className = `token ${at >= own.first_position ? "new" : "kept"}`;
      line.lastChild.textContent = at === last ? "not yet" : shorten(visible(tokens[at + 1]), 14);
    });
    rows.scrollTop = rows.scrollHeight;
    candidates.replaceChildren(bars(likely, next, widthOf(figure)));
    chosen.textContent = `${quoted(next)} is the likeliest of ${count(model.vocab_size)} tokens${outcome(step)}`;
    why.textContent = reason(last);
  }

  function outcome(step) {
    if (step < steps.length - 1) return "; it is put at the end, and becomes the next row.";
    return trace.finish_reason === "stop" ? "; it ends the text." : "; here the run stops.";
  }

  function reason(last) {
    if (last === 0) return "There is one row, and it is the last.";
    const [before, guess, came] = [tokens[last - 1], predictions[last - 1], tokens[last]];
    const verdict = guess.id === came.id ? `and ${quoted(came)} did come` : `but ${quoted(came)} came`;
    return (
      `Each row predicts the next token. The row before the last, ${quoted(before)}, predicts ${quoted(guess)}, ${verdict}. Right or` +
      ` wrong, that token is already there. Only the last row predicts one that is not. The other rows are needed for one` +
      ` thing alone: their keys and values, which the last row looks at in each layer. The next section shows them.`
    );
  }

  return { show };
}

function bars(likely, next, width) {
  const [label, line] = [Math.min(130, width * 0.3), 24];
  const room = width - label - 130;
  const most = likely[0].probability;
  return picture(
    width,
    line * likely.length,
    likely.map((one) => `${visible(one)}: ${percent(one.probability)}`).join(", "),
    likely.map((one, at) => {
      const isNext = one.id === next.id;
      const y = at * line;
      return svg(
        "g",
        {},
        text(label - 8, y + 16, shorten(visible(one), Math.floor(label / 8)), { "text-anchor": "end", class: isNext ? "strong" : "" }),
        box(label, y + 4, Math.max(1, (room * one.probability) / most), 16, isNext ? "new" : "muted", { rx: 2, opacity: isNext ? 1 : 0.45 }),
        text(label + (room * one.probability) / most + 8, y + 16, `${percent(one.probability)}  logit ${real(one.logit, 1)}`, { class: "muted" }),
      );
    }),
  );
}
