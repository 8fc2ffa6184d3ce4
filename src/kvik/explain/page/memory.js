// Section 5: blocks that fill up, and who shares KV heads.

import { box, html, picture, svg, text, shorten, widthOf } from "kvik/draw.js";
import { bytes, count, counted, percent } from "kvik/trace.js";

export function build(figure, trace) {
  const { memory, model, tokens } = trace;
  const blocks = html("div", {});
  const filled = html("p", { id: "memory-sentence" });
  const heads = html("div", { id: "heads" });
  const table = html("div", {});
  const own = memory.variants.find((variant) => variant.is_own);
  const choice = html("fieldset", { "aria-label": "Kind of attention" },
    memory.variants.map((variant) =>
      html("label", {}, html("input", { type: "radio", name: "variant", value: variant.num_kv_heads, checked: variant === own }), ` ${variant.attention}, ${counted(variant.num_kv_heads, "KV head")}${variant === own ? " (this model)" : ""}`),
    ),
  );
  choice.addEventListener("change", drawHeads);
  figure.append(
    html("h3", {}, "Blocks of the cache, filling up"),
    blocks,
    filled,
    html("h3", {}, `${counted(model.num_heads, "query head")} of a layer, and the KV heads that they share`),
    html("div", { class: "controls" }, choice),
    heads,
    table,
    html("p", { class: "note" }, "MHA: multi-head, each query head has a KV head of its own. GQA: grouped-query, a group shares one. MQA: multi-query, all share one. Only the model's own kind is what it was trained with; the others are the same shape with other numbers of KV heads."),
  );
  table.replaceChildren(html("div", { class: "wide" }, variants(memory, model)));

  function drawHeads() {
    const kvHeads = Number(choice.querySelector("input:checked").value);
    heads.replaceChildren(sharing(model.num_heads, kvHeads, widthOf(figure)));
  }

  function show(step) {
    const { first_position: first, num_tokens } = trace.steps[step].with_cache;
    const kept = first + num_tokens;
    blocks.replaceChildren(grid(memory, tokens, first, kept, widthOf(figure)));
    const windowed = model.windows.some((window) => window !== null);
    filled.textContent =
      `A token takes 2 (key and value) × ${count(model.num_layers)} layers × ${counted(model.num_kv_heads, "KV head")} ×` +
      ` ${model.head_dim} numbers of type ${model.kv_dtype} = ${count(memory.token_bytes)} bytes. ${counted(kept, "token")}` +
      ` fill ${percent(kept / (memory.block_size * blocksOf(kept, memory)))} of ${counted(blocksOf(kept, memory), "block")} of` +
      ` ${memory.block_size}: ${bytes(memory.held_bytes[kept])} held.` +
      (windowed ? " Layers with a window give back blocks that no token sees any more." : "");
  }

  drawHeads();
  return { show: (step) => { show(step); drawHeads(); } };
}

const blocksOf = (kept, memory) => Math.ceil(kept / memory.block_size);

function grid(memory, tokens, first, kept, width) {
  const size = memory.block_size;
  const ids = [...new Set(memory.slots.map((slot) => Math.floor(slot / size)))];
  const label = 74;
  const [cell, line] = [(width - label) / size, 34];
  const offset = (position) => [ids.indexOf(Math.floor(memory.slots[position] / size)), memory.slots[position] % size];
  return picture(
    width,
    line * ids.length,
    `${kept} slots filled in ${blocksOf(kept, memory)} blocks`,
    ids.map((id, at) =>
      svg("g", {},
        text(0, at * line + 18, `block ${id}`, { class: "small muted" }),
        svg("rect", { x: label, y: at * line + 3, width: cell * size - 1, height: 24, fill: "none", rx: 3, style: "stroke:var(--line)", "stroke-width": 2 }),
      ),
    ),
    memory.slots.slice(0, kept).map((_, position) => {
      const [row, column] = offset(position);
      const kind = position < first ? "kept" : "new";
      return svg("g", {},
        box(label + column * cell, row * line + 3, cell - 1.5, 24, kind, { rx: 2 }, svg("title", {}, tokens[position].text)),
        svg("title", {}, `${tokens[position].text}: slot ${column} of block ${ids[row]}`),
        cell > 18 ? text(label + column * cell + cell / 2 - 1, row * line + 19, shorten(tokens[position].text.trim(), Math.floor(cell / 8)), { "text-anchor": "middle", class: "small", style: "fill:var(--page)" }) : null,
      );
    }),
  );
}

function sharing(numHeads, kvHeads, width) {
  const group = numHeads / kvHeads;
  const step = Math.min(46, (width - 70) / numHeads);
  const radius = Math.max(2, Math.min(11, step / 2 - 2));
  const left = 66;
  const x = (head) => left + head * step + step / 2;
  const middle = (kvHead) => (x(kvHead * group) + x(kvHead * group + group - 1)) / 2;
  const indices = (length) => Array.from({ length }, (_, at) => at);
  return picture(
    width,
    120,
    `${numHeads} query heads share ${kvHeads} KV heads`,
    text(0, 24, "queries", { class: "small muted" }),
    text(0, 104, "K and V", { class: "small muted" }),
    indices(numHeads).map((head) => svg("line", { x1: x(head), y1: 20 + radius, x2: middle(Math.floor(head / group)), y2: 88, style: "stroke:var(--muted)", "stroke-width": 1 })),
    indices(numHeads).map((head) => svg("circle", { cx: x(head), cy: 20, r: radius, style: "fill:var(--new)" })),
    indices(kvHeads).map((kvHead) => box(middle(kvHead) - radius - 2, 88, 2 * radius + 4, 2 * radius, "kept", { rx: 3 })),
  );
}

function variants({ variants: all, contexts }, model) {
  const columns = ["attention", "KV heads", "bytes a token", ...contexts.map((tokens) => `${count(tokens)} tokens`), `${count(model.context)} tokens, all`];
  const optional = (at) => ({ class: at > 2 && at < columns.length - 1 ? "optional" : "" });
  const most = all[0].token_bytes;
  return html("table", {},
    html("caption", {}, "Keys and values of one text, in memory"),
    html("thead", {}, html("tr", {}, columns.map((name, at) => html("th", { scope: "col", ...optional(at) }, name)))),
    html("tbody", {},
      all.map((variant) =>
        html("tr", {},
          html("td", {}, variant.is_own ? html("b", {}, `${variant.attention} (this)`) : variant.attention),
          html("td", {}, count(variant.num_kv_heads)),
          html("td", { "data-variant": variant.num_kv_heads }, `${count(variant.token_bytes)} (${percent(variant.token_bytes / most)})`),
          contexts.map((_, at) => html("td", optional(at + 3), bytes(variant.context_bytes[at]))),
          html("td", {}, bytes(variant.whole_context_bytes)),
        ),
      ),
    ),
  );
}
