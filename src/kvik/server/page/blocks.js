// Blocks: a cell for each, by group of layers; what is in one; and how they were some minutes ago.

import { html, token, widthOf } from "./draw.js";
import { bytes, count, counted } from "./figures.js";
import { Replay } from "./replay.js";
import { live, stateOf } from "./live.js";
import { json } from "./server.js";

const SIDE = { least: 3, most: 22, gap: 1 };
const MOST_HEIGHT = 460;
const FLASH_MS = 900;
const ASK_MS = 90;
const ROW = 8; // blocks that lie together

// What a cell looks like: a number each, so that the past is kept in bytes.
const [FREE, REUSABLE, KEPT, SHARED, FIRST_COLOUR] = [0, 1, 2, 3, 4];
const COLOURS = ["#e69f00", "#cc79a7", "#009e73", "#d55e00", "#8d6fd1", "#b8a500", "#56b4e9", "#a0522d"];
export function build(section, app) {
  const legend = html("ul", { class: "counts" });
  const figures = html("div");
  const detail = html("div", { class: "detail", role: "status" });
  const slider = html("input", { type: "range", min: -1, max: 0, value: 0, step: 1, "aria-label": "Seconds ago" });
  const moment = html("output", {}, "now");
  const now = html("button", { type: "button", disabled: true }, "Now");
  section.append(
    html("h1", { class: "view" }, "Blocks"),
    html("p", {}, "A cell for each block of the KV cache. Requests have colours; point at a cell, or use the arrow keys, to see the tokens in it."),
    legend,
    figures,
    html("div", { class: "replay screen" }, html("span", {}, "Replay"), slider, moment, now),
    detail,
  );
  let model; // that the grids are of
  let grids = [];
  let chosen; // {grid, block}
  let waiting; // before a block is asked for
  let isAsking = false;

  app.onModel.push(() => (model = undefined));
  slider.addEventListener("input", () => redraw());
  now.addEventListener("click", () => {
    slider.value = 0;
    redraw();
  });

  function note({ isWhole, changes }) {
    const wanted = app.model();
    if (!wanted) return;
    if (model !== wanted || isWhole) begin(wanted);
    const change = changes.find((each) => each.model === model);
    if (!change) return;
    for (const grid of grids) grid.take(change);
  }

  function begin(wanted) {
    if (model !== wanted) {
      model = wanted;
      chosen = undefined;
      grids = model.groups.map((group, at) => grid(model, group, at));
      figures.replaceChildren(...grids.map((each) => each.element));
      showNothing();
    }
    for (const each of grids) each.isStale = true;
  }

  function grid(model, group, at) {
    const canvas = html("canvas", { tabindex: 0, role: "application", "aria-label": `Blocks of ${nameOf(group)}; the arrow keys choose one` });
    const element = html("div", { class: "figure" }, html("h3", {}, nameOf(group), html("span", { class: "note" }, ` · ${counted(group.num_blocks, "block")} of ${bytes(group.block_bytes)}`)), canvas);
    const looks = new Uint8Array(group.num_blocks);
    const replay = new Replay(looks);
    const owners = new Map(); // requests by block, where one alone has it
    const flashes = new Map(); // block: {since, colour}
    const dirty = new Set();
    const made = { element, canvas, group, at, looks, replay, isStale: true, side: 0, columns: 0 };

    const look = (block) => {
      const { count: holders, name } = stateOf(group.states[block]);
      if (name !== "held") return name === "free" ? FREE : REUSABLE;
      if (holders > 1) return SHARED;
      return owners.has(block) ? FIRST_COLOUR + (owners.get(block) % COLOURS.length) : KEPT;
    };

    made.take = ({ blocks, rows, evicted, copied }) => {
      for (const row of rows) {
        if (!row.blocks) continue;
        for (const block of made.tables.get(row.key) ?? []) {
          if (owners.get(block) === row.key) owners.delete(block);
          dirty.add(block);
        }
        made.tables.set(row.key, row.blocks[at] ?? []);
        for (const block of row.blocks[at] ?? []) {
          owners.set(block, row.key);
          dirty.add(block);
        }
      }
      for (const block of blocks[at]) dirty.add(block);
      if (at === 0) for (const block of evicted) flashes.set(block, { since: performance.now(), colour: "--again" });
      for (const [, target, of] of copied) if (of === at) flashes.set(target, { since: performance.now(), colour: "--first" });
      for (const block of dirty) replay.set(block, look(block), live.now());
    };
    made.tables = new Map();

    // Everything anew: the grid's size, and each cell.
    made.layOut = () => {
      made.isStale = false;
      owners.clear();
      made.tables.clear();
      for (const row of model.requests.values()) {
        made.tables.set(row.key, row.blocks?.[at] ?? []);
        for (const block of row.blocks?.[at] ?? []) owners.set(block, row.key);
      }
      replay.look(look, live.now());
      const width = widthOf(element);
      const side = Math.floor(Math.sqrt((width * MOST_HEIGHT) / group.num_blocks));
      made.side = Math.max(SIDE.least, Math.min(SIDE.most, side));
      made.columns = Math.max(ROW, Math.floor(width / made.side / ROW) * ROW);
      const scale = devicePixelRatio;
      const [w, h] = [made.columns * made.side, Math.ceil(group.num_blocks / made.columns) * made.side];
      canvas.width = w * scale;
      canvas.height = h * scale;
      canvas.style.width = `${w}px`;
      canvas.style.height = `${h}px`;
      made.drawAll();
    };

    made.drawAll = () => {
      const pen = penOf(made);
      const shown = made.replay.at(momentOf());
      pen.context.clearRect(0, 0, canvas.width, canvas.height);
      for (let block = 0; block < shown.length; block++) pen.cell(block, shown[block]);
      dirty.clear();
      if (chosen?.grid === made) pen.ring(chosen.block);
    };

    // What has changed, and what flashes; whether some still do.
    made.drawChanged = () => {
      const pen = penOf(made);
      for (const block of dirty) pen.cell(block, looks[block]);
      dirty.clear();
      for (const [block, { since, colour }] of flashes) {
        const part = 1 - (performance.now() - since) / FLASH_MS;
        pen.cell(block, looks[block]);
        if (part <= 0) flashes.delete(block);
        else pen.flash(block, colour, part);
      }
      if (chosen?.grid === made) pen.ring(chosen.block);
      return flashes.size > 0;
    };

    const blockAt = ({ offsetX, offsetY }) => Math.floor(offsetY / made.side) * made.columns + Math.floor(offsetX / made.side);
    canvas.addEventListener("pointermove", (event) => choose(made, blockAt(event)));
    canvas.addEventListener("pointerdown", (event) => choose(made, blockAt(event)));
    canvas.addEventListener("focus", () => choose(made, chosen?.grid === made ? chosen.block : 0));
    canvas.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -made.columns, ArrowDown: made.columns }[event.key];
      const target = { Home: 0, End: group.num_blocks - 1 }[event.key] ?? (by && (chosen?.block ?? 0) + by);
      if (target === undefined) return;
      event.preventDefault();
      choose(made, Math.max(0, Math.min(group.num_blocks - 1, target)));
    });
    return made;
  }

  function choose(grid, block) {
    if (block < 0 || block >= grid.group.num_blocks || (chosen?.grid === grid && chosen.block === block)) return;
    const before = chosen?.grid;
    chosen = { grid, block };
    before?.drawAll();
    grid.drawAll();
    clearTimeout(waiting);
    waiting = setTimeout(askFor, ASK_MS);
  }

  // One question at a time: an answer may have to wait for a step.
  async function askFor() {
    if (isAsking || !chosen) return;
    const { grid, block } = chosen;
    isAsking = true;
    try {
      tell(grid, block, await json(`/v1/cache/blocks/${block}?group=${grid.at}&model=${encodeURIComponent(model.id)}`));
    } catch (error) {
      detail.replaceChildren(error.message);
    }
    isAsking = false;
    if (chosen && (chosen.grid !== grid || chosen.block !== block)) askFor();
  }

  function tell(grid, block, found) {
    if (chosen?.grid !== grid || chosen.block !== block) return;
    const holders = [...model.requests.values()].filter((row) => row.blocks?.[grid.at]?.includes(block));
    const changed = grid.replay.changedAt(block);
    const facts = [
      `Block ${count(block)}: ${found.state}${found.num_holders ? ` by ${found.num_holders}` : ""}${found.is_sealed ? ", sealed" : found.num_holders ? ", open" : ""}`,
      found.first_token !== null && found.num_tokens && `tokens ${count(found.first_token)} to ${count(found.first_token + found.num_tokens - 1)}`,
      changed && `as it is for ${Math.max(0, Math.round(live.now() - changed))} s`,
      found.num_evicted_before !== null && (found.num_evicted_before ? `${counted(found.num_evicted_before, "block")} would be evicted before it` : "the next to be evicted"),
      holders.length && `requests ${holders.map((row) => row.request_id).join(", ")}`,
    ];
    const words = found.tokens?.map((text) => token({ text }, found.state === "held" ? "kept" : "")) ?? [];
    const hidden = found.num_tokens && !found.tokens ? "Its text is not yours to see." : "";
    detail.replaceChildren(html("p", {}, facts.filter(Boolean).join(" · ")), html("div", {}, words.length ? words : hidden));
  }

  const showNothing = () => detail.replaceChildren(html("p", { class: "note" }, "Choose a block to see its tokens."));
  const momentOf = () => (Number(slider.value) === 0 ? undefined : live.now() + Number(slider.value));

  function redraw() {
    const isNow = Number(slider.value) === 0;
    moment.textContent = isNow ? "now" : `${-slider.value} s ago`;
    now.disabled = isNow;
    for (const grid of grids) grid.drawAll();
  }

  function draw() {
    if (!model) return;
    drawLegend();
    slider.min = -Math.max(1, Math.round(Math.max(...grids.map((grid) => grid.replay.seconds(live.now())))));
    let flashes = false;
    for (const grid of grids) {
      if (grid.isStale) grid.layOut();
      else if (Number(slider.value) === 0) flashes = grid.drawChanged() || flashes;
    }
    if (flashes && !section.hidden) requestAnimationFrame(draw);
  }

  function drawLegend() {
    const { held_blocks: held, reusable_blocks: reusable, free_blocks: free } = model.counters;
    const numShared = model.groups[0].states.reduce((sum, state) => sum + (state >= 4), 0);
    const numKept = grids[0].looks.reduce((sum, look) => sum + (look === KEPT), 0);
    const row = (colour, text) => html("li", {}, html("i", { style: `background:var(${colour})` }), text);
    legend.replaceChildren(...[
      html("li", {}, html("i", { style: `background:conic-gradient(${COLOURS.slice(0, 4).join(",")})` }), `${count(held)} held`),
      row("--kept", `${count(numShared)} of them shared`),
      numKept > 0 && row("--muted", `${count(numKept)} by a session, a pin, or others`),
      row("--kept-tint", `${count(reusable)} reusable`),
      row("--line", `${count(free)} free`),
    ].filter(Boolean));
  }

  return { draw, note, hide: () => clearTimeout(waiting) };
}

const nameOf = ({ kind, layers, window }) =>
  kind === "window" ? `${counted(layers, "layer")} that see${layers === 1 ? "s" : ""} the newest ${counted(window, "token")}` : `${counted(layers, "layer")} that see${layers === 1 ? "s" : ""} all tokens`;

function penOf({ canvas, side, columns }) {
  const context = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  const of = (name) => style.getPropertyValue(name).trim();
  const fills = [of("--line"), of("--kept-tint"), of("--muted"), of("--kept"), ...COLOURS];
  const size = side > 4 ? side - SIDE.gap : side - 0.5;
  context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  const place = (block) => [(block % columns) * side, Math.floor(block / columns) * side];
  const cell = (block, look) => {
    const [x, y] = place(block);
    context.clearRect(x, y, side, side);
    context.globalAlpha = look === FREE ? 0.55 : 1;
    context.fillStyle = fills[look];
    context.fillRect(x, y, size, size);
    context.globalAlpha = 1;
  };
  const flash = (block, colour, part) => {
    const [x, y] = place(block);
    context.globalAlpha = part;
    context.fillStyle = of(colour);
    context.fillRect(x, y, size, size);
    context.globalAlpha = 1;
  };
  const ring = (block) => {
    const [x, y] = place(block);
    context.strokeStyle = of("--ink");
    context.lineWidth = 2;
    context.strokeRect(x + 1, y + 1, Math.max(2, size - 2), Math.max(2, size - 2));
  };
  return { context, cell, flash, ring };
}
