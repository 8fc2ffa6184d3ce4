// Section 1: hidden states of all tokens, and the next token out of the last one.

import { box, heat, html, picture, scaleOf, shorten, svg, text, token, widthOf } from "kvik/draw.js";
import { count, counted, percent, quoted, real } from "kvik/trace.js";

const STRIP_HEIGHT = 14;

export function build(figure, trace) {
  const { model, tokens, predictions, hidden } = trace;
  const shown = hidden.shape[1];
  const largest = scaleOf(tokens.slice(0, -1).map((_, at) => hidden.row(at)));
  const flow = html("ol", { class: "flow" });
  const controls = html("p", { class: "note" });
  const rows = html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Hidden states, a row for each token" });
  const why = html("p", { class: "proof" });
  const candidates = html("div", {});
  const chosen = html("p", {});
  figure.append(
    flow,
    controls,
    rows,
    html("h3", {}, "From the last row: logits, likeliest tokens first"),
    candidates,
    chosen,
    html("h3", {}, "Why only the last hidden state matters"),
    why,
  );

  function strip(position, cell) {
    const row = hidden.row(position);
    return picture(cell * shown, STRIP_HEIGHT, `hidden state ${position}`, heat([{ x: 0, y: 0, row, cell, height: STRIP_HEIGHT }], largest));
  }

  function show(step) {
    const { with_cache: own, candidates: likely, chosen: next } = trace.steps[step];
    const last = own.first_position + own.num_tokens - 1;
    controls.textContent =
      `${count(last + 1)} tokens, ${shown} of ${count(model.hidden_size)} numbers of each hidden state behind layer` +
      ` ${model.num_layers}; green is above zero, purple below. Without the cache all of these rows are computed in` +
      ` this step, with it ${own.num_tokens === 1 ? "only the last one" : `these ${own.num_tokens}: the whole prompt`}.`;
    flow.replaceChildren(
      ...[
        [counted(last + 1, "token"), "the text so far"],
        [`${count(last + 1)} × ${count(model.hidden_size)}`, `hidden states; with the cache ${count(own.num_tokens)} computed now`],
        [`1 × ${count(model.hidden_size)}`, `the last row, that of ${quoted(tokens[last])}`],
        [count(model.vocab_size), "logits, one for each token there is"],
        [quoted(next), `${percent(likely[0].probability)} likely: the next token. And again ↺`],
      ].map(([figures, what]) => html("li", {}, html("b", {}, figures), html("span", {}, what))),
    );
    const cell = Math.max(1.5, Math.min(9, (widthOf(figure) * 0.42 - 20) / shown));
    const lines = [];
    for (let at = 0; at <= last; at++) {
      const isNew = at >= own.first_position;
      lines.push(
        html(
          "tr",
          { class: at === last ? "last" : "" },
          html("td", {}, token(tokens[at], isNew ? "new" : "kept")),
          html("td", { class: "strip" }, strip(at, cell)),
          html("td", {}, shorten(predictions[at].text, 14)),
          html("td", {}, at === last ? "not yet" : shorten(tokens[at + 1].text, 14)),
        ),
      );
    }
    const heads = ["token", "hidden state", "predicts", "comes next"].map((name) => html("th", { scope: "col" }, name));
    rows.replaceChildren(html("table", { class: "rows" }, html("thead", {}, html("tr", {}, heads)), html("tbody", {}, lines)));
    rows.scrollTop = rows.scrollHeight;
    candidates.replaceChildren(bars(likely, next, widthOf(figure)));
    chosen.replaceChildren(
      `${quoted(next)} is the likeliest of ${count(model.vocab_size)} tokens; it is put at the end, and becomes the next row.`,
    );
    why.textContent = reason(last);
  }

  function reason(last) {
    if (last === 0) return "There is one row, and it is the last.";
    const at = last - 1;
    const [guess, real_next] = [predictions[at], tokens[at + 1]];
    const verdict = guess.id === real_next.id ? "as it does" : `but it goes on with ${quoted(real_next)}`;
    return (
      `Each row predicts the token behind its own. The row of ${quoted(tokens[at])} says ${quoted(guess)},` +
      ` ${verdict}: that token is there already, so nobody needs this prediction. Only the row of` +
      ` ${quoted(tokens[last])} says something about a token that is not there yet. The other rows are needed for one` +
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
    likely.map((one) => `${one.text}: ${percent(one.probability)}`).join(", "),
    likely.map((one, at) => {
      const isNext = one.id === next.id;
      const y = at * line;
      return svg(
        "g",
        {},
        text(label - 8, y + 16, shorten(one.text, Math.floor(label / 8)), { "text-anchor": "end", class: isNext ? "strong" : "" }),
        box(label, y + 4, Math.max(1, (room * one.probability) / most), 16, isNext ? "new" : "muted", { rx: 2, opacity: isNext ? 1 : 0.45 }),
        text(label + (room * one.probability) / most + 8, y + 16, `${percent(one.probability)}  logit ${real(one.logit, 1)}`, { class: "muted" }),
      );
    }),
  );
}
