// Section 5: blocks that fill up, and who shares KV heads.

import { box, html, picture, shorten, stripes, svg, text, widthOf } from "kvik/draw.js";
import { bytes, count, counted, percent, visible } from "kvik/figures.js";

export function build(figure, trace) {
  const { memory, model, tokens } = trace;
  const blocks = html("div", {});
  const filled = html("p", { id: "memory-sentence" });
  const heads = html("div", { id: "heads" });
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
    html("div", { class: "wide" }, variants(memory, model)),
    html("p", { class: "note" }, "MHA: multi-head, each query head has a KV head of its own. GQA: grouped-query, a group shares one. MQA: multi-query, all share one. Only the model's own kind is what it was trained with; the others are the same shape with other numbers of KV heads."),
  );

  function drawHeads() {
    const kvHeads = Number(choice.querySelector("input:checked").value);
    heads.replaceChildren(sharing(model.num_heads, kvHeads, widthOf(figure)));
  }

  function show(step) {
    const { first_position: first, num_tokens } = trace.steps[step].with_cache;
    const kept = first + num_tokens;
    const width = widthOf(figure);
    blocks.replaceChildren(grid(memory, tokens, first, kept, width));
    const numBlocks = Math.ceil(kept / memory.block_size);
    const perLayer = `${counted(model.num_layers, "layer")} × ${counted(model.num_kv_heads, "KV head")} ×`;
    const [keyBytes, valueBytes] = memory.vector_bytes;
    const vectors =
      keyBytes === valueBytes
        ? `2 (key and value) × ${perLayer} ${counted(keyBytes, "byte")} (${model.head_dim} numbers of type ${model.kv_dtype}` +
          `${model.kv_dtype === "int8" ? " and a scale" : ""})`
        : `${perLayer} ${keyBytes + valueBytes} bytes (${keyBytes} of a key, ${valueBytes} of a value: ${model.kv_dtype})`;
    filled.textContent =
      `A token takes ${vectors} = ${counted(memory.token_bytes, "byte")}.` +
      ` ${counted(kept, "token is", "tokens are")} in ${counted(numBlocks, "block")} of ${memory.block_size}; whole blocks are held:` +
      ` ${bytes(memory.held_bytes[kept])}.` +
      memory.windows
        .map(({ window, num_layers: layers, first_blocks: firsts }) =>
          ` ${counted(layers, "layer sees", "layers see")} the newest ${counted(window, "token")} only, and gave back` +
          ` ${counted(firsts[kept], "block")}${firsts[kept] ? " (striped)" : ""}.`)
        .join("");
    drawHeads();
  }

  return { show };
}

function grid(memory, tokens, first, kept, width) {
  const size = memory.block_size;
  const ids = [...new Set(memory.slots.map((slot) => Math.floor(slot / size)))];
  const label = 74;
  const [cell, line] = [(width - label) / size, 34];
  const id = "given-back";
  const givenBack = Math.max(0, ...memory.windows.map(({ first_blocks: firsts }) => firsts[kept]));
  const offset = (position) => [ids.indexOf(Math.floor(memory.slots[position] / size)), memory.slots[position] % size];
  return picture(
    width,
    line * ids.length,
    `${counted(kept, "slot")} filled`,
    stripes(id, "muted"),
    ids.map((block, at) =>
      svg("g", {},
        text(0, at * line + 18, `block ${block}`, { class: "small muted" }),
        svg("rect", { x: label, y: at * line + 3, width: cell * size - 1, height: 24, fill: "none", rx: 3, style: "stroke:var(--line)", "stroke-width": 2 }),
      ),
    ),
    memory.slots.slice(0, kept).map((_, position) => {
      const [row, column] = offset(position);
      const kind = position < first ? "kept" : "new";
      const ink = kind === "new" ? "on-new" : "page";
      return svg("g", {},
        svg("title", {}, `${visible(tokens[position])}: slot ${column} of block ${ids[row]}`),
        box(label + column * cell, row * line + 3, cell - 1.5, 24, kind, { rx: 2 }),
        cell > 18 ? text(label + column * cell + cell / 2 - 1, row * line + 19, shorten(tokens[position].text.trim(), Math.floor(cell / 8)), { "text-anchor": "middle", class: "small", style: `fill:var(--${ink})` }) : null,
      );
    }),
    // Layers with a window have given these back; where there are others, those still hold them.
    givenBack ? svg("rect", { x: label, y: 0, width: cell * size, height: line * givenBack, style: `fill:url(#${id})`, opacity: 0.55 }) : null,
  );
}

function sharing(numHeads, kvHeads, width) {
  const group = numHeads / kvHeads;
  const step = Math.min(46, (width - 70) / numHeads);
  const radius = Math.max(2, Math.min(11, step / 2 - 2));
  const boxWidth = Math.max(2, Math.min(2 * radius + 4, step - 2));
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
    indices(kvHeads).map((kvHead) => box(middle(kvHead) - boxWidth / 2, 88, boxWidth, 2 * radius, "kept", { rx: Math.min(3, boxWidth / 4) })),
  );
}

function variants({ variants: all, contexts }, model) {
  const most = all[0].token_bytes;
  // Heading, cell and whether a narrow page has room for it.
  const columns = [
    ["attention", (one) => (one.is_own ? html("b", {}, `${one.attention} (this)`) : one.attention), true],
    ["KV heads", (one) => count(one.num_kv_heads), true],
    ["bytes a token", (one) => count(one.token_bytes), true],
    ["of MHA's", (one) => percent(one.token_bytes / most), false],
    ...contexts.map((tokens, at) => [counted(tokens, "token"), (one) => bytes(one.context_bytes[at]), false]),
    [`${count(model.context)} tokens, all`, (one) => bytes(one.whole_context_bytes), true],
  ];
  const optional = (isWide) => (isWide ? {} : { class: "optional" });
  return html("table", {},
    html("caption", {}, "Keys and values of one text, in memory"),
    html("thead", {}, html("tr", {}, columns.map(([name, , always]) => html("th", { scope: "col", ...optional(always) }, name)))),
    html("tbody", {}, all.map((one) => html("tr", { "data-variant": one.num_kv_heads }, columns.map(([, cell, always]) => html("td", optional(always), cell(one)))))),
  );
}
