// Blocks: a cell for each, by group of layers; what is in one; and how they were some minutes ago.

import { Cells, mixed, pixelsOf } from "./cells.js";
import { html, token, widthOf } from "./draw.js";
import { bytes, count, counted } from "./figures.js";
import { Replay } from "./replay.js";
import { live, stateOf } from "./live.js";
import { json } from "./server.js";

const FLASH_MS = 900;
const ASK_MS = 90;
const AGAIN_MS = 400; // of a block that changes all the time
const LEAST_RING = 8;

// What a cell looks like: a number each, so that the past is kept in bytes.
const [FREE, REUSABLE, KEPT, SHARED, FIRST_COLOUR] = [0, 1, 2, 3, 4];
const STORED = 64; // in addition
const COLOURS = ["#e69f00", "#cc79a7", "#009e73", "#d55e00", "#8d6fd1", "#b8a500", "#56b4e9", "#a0522d"];
const SPEEDS = [1, 5, 20];
const CALM_STEP_S = 1; // of a replay, for those who want little to move
const isCalm = matchMedia("(prefers-reduced-motion: reduce)");
const IN_WORDS = ["free", "reusable", "held by a session, a pin, or others", "shared"];

const paper = matchMedia("print");

export function build(section, app) {
  const legend = makeLegend();
  const figures = html("div");
  const detail = html("div", { class: "detail", role: "status" });
  const slider = html("input", { type: "range", min: -1, max: 0, value: 0, step: 1, "aria-label": "Seconds ago" });
  const moment = html("output", {}, "now");
  const now = html("button", { type: "button", disabled: true }, "Now");
  const play = html("button", { type: "button", class: "play", "aria-keyshortcuts": "Space" }, "Play");
  const speed = html("select", { "aria-label": "Speed" }, SPEEDS.map((each) => html("option", { value: each }, `${each} ×`)));
  const replay = html("div", { class: "replay screen", role: "group", "aria-label": "Replay" }, play, speed, slider, moment, now);
  section.append(
    html("h1", { class: "view" }, "Blocks"),
    html("p", {}, "A cell for each block of the KV cache. Requests have colours; point at a cell, or use the arrow keys, to see the tokens in it. Space plays the last minutes again."),
    legend.element,
    html("div", { class: "beside" }, html("div", {}, figures, replay), detail),
  );
  let model; // that the grids are of
  let grids = [];
  let palette;
  let seen_s = 0; // the newest time by the server's clock
  let chosen; // {grid, block}
  let waiting; // before a block is asked for
  let isAsking = false;
  let frame; // of what flashes
  let isTurned = false; // to another moment, since it was drawn
  let past_s; // the moment that is shown, by the server's clock, where it is not now
  let played; // {last_ms} while the past is played

  app.onModel.push(() => note({ isWhole: true, changes: [] }));
  slider.addEventListener("input", () => turn(Number(slider.value) === 0 ? undefined : live.now() + Number(slider.value)));
  now.addEventListener("click", () => turn(undefined));
  play.addEventListener("click", playOrPause);
  section.addEventListener("keydown", (event) => {
    if (event.key !== " " || !event.target.matches("canvas, input[type=range]")) return;
    event.preventDefault();
    playOrPause();
  });
  paper.addEventListener("change", () => {
    palette = undefined;
    if (!section.hidden) for (const grid of grids) grid.drawAll();
  });

  const isPast = () => past_s !== undefined;
  const secondsAgo = () => Math.max(0, Math.round(live.now() - past_s));
  const coloursNow = () => (palette ??= coloursOf(section, paper.matches));

  function note({ isWhole, changes }) {
    const wanted = app.model();
    if (!wanted) return;
    if (model !== wanted) begin(wanted);
    if (isWhole) {
      palette = undefined; // the scheme may be another
      for (const grid of grids) grid.isStale = true;
    }
    const change = changes.find((each) => each.model === model);
    if (change) for (const grid of grids) grid.take(change);
    seen_s = live.now();
  }

  // A state of the same blocks goes on where the one before ended.
  function begin(wanted) {
    const sizes = (of) => of?.groups.map((group) => group.num_blocks).join();
    const goesOn = model?.id === wanted.id && sizes(model) === sizes(wanted) && live.now() >= seen_s;
    model = wanted;
    if (!goesOn) {
      chosen = undefined;
      turn(undefined);
      grids = model.groups.map(makeGrid);
      figures.replaceChildren(...grids.map((each) => each.element));
    }
    for (const grid of grids) grid.takeAll();
    askSoon();
  }

  function makeGrid(group, at) {
    const number = group.num_blocks;
    const cells = new Cells(number, `Blocks of ${nameOf(group)}; the arrow keys choose one`);
    const { canvas } = cells;
    const ring = html("i", { class: "ring", hidden: true });
    const element = html("div", { class: "figure" }, html("h2", {}, nameOf(group), html("span", { class: "note" }, ` · ${counted(number, "block")} of ${bytes(group.block_bytes)}`)), html("div", { class: "cells" }, canvas, ring));
    const looks = new Uint8Array(number);
    const counts = noCounts();
    const replay = new Replay(looks);
    const owners = new Float64Array(number); // the key of a request that holds it
    const tables = new Map(); // blocks by the keys of requests
    const flashes = new Map(); // block: {since, colour}
    const dirty = new Set(); // blocks that are drawn otherwise than they look
    const made = { element, at, number, counts, replay, shown: looks, isStale: true };
    counts[FREE] = number;

    const look = (block) => {
      const { count: holders, name, isStored } = stateOf(model.groups[at].states[block]);
      const stored = isStored ? STORED : 0;
      if (name !== "held") return name === "free" ? FREE : REUSABLE | stored;
      if (holders > 1) return SHARED | stored;
      return (owners[block] ? FIRST_COLOUR + (owners[block] % COLOURS.length) : KEPT) | stored;
    };

    const update = (block, at_s) => {
      const [before, after] = [looks[block], look(block)];
      if (before === after) return;
      tally(counts, before, -1);
      tally(counts, after, 1);
      replay.set(block, after, at_s);
      dirty.add(block);
    };

    const hold = (key, blocks) => {
      const before = tables.get(key) ?? [];
      for (const block of before) if (owners[block] === key) owners[block] = 0;
      for (const block of blocks) owners[block] = key;
      if (blocks.length) tables.set(key, blocks);
      else tables.delete(key);
      return before;
    };

    made.take = ({ blocks, rows, gone, evicted, copied }) => {
      const touched = [blocks[at], ...gone.map((key) => hold(key, []))];
      for (const row of rows) {
        if (row.blocks) touched.push(row.blocks[at], hold(row.key, row.blocks[at]));
      }
      const now_s = live.now();
      for (const each of touched) for (const block of each) update(block, now_s);
      if (chosen?.grid === made && isNewAbout(touched, rows)) askSoon(AGAIN_MS);
      const flash = (block, colour) => {
        replay.flash(block, colour, now_s);
        if (!section.hidden && !isPast()) light(block, colour);
      };
      if (at === 0) for (const block of evicted) flash(block, "evicted");
      for (const [, target, of] of copied) if (of === at) flash(target, "copied");
    };

    const light = (block, colour) => flashes.set(block, { since: performance.now(), colour });

    // Whether the chosen block is another, or has more tokens.
    const isNewAbout = (touched, rows) =>
      touched.some((each) => each.includes(chosen.block)) || rows.some((row) => row.key === owners[chosen.block] && tables.get(row.key).at(-1) === chosen.block);

    made.takeAll = () => {
      owners.fill(0);
      tables.clear();
      for (const row of model.requests.values()) hold(row.key, row.blocks?.[at] ?? []);
      const now_s = live.now();
      for (let block = 0; block < number; block++) update(block, now_s);
      replay.begin(now_s);
    };

    made.layOut = () => {
      made.isStale = false;
      cells.layOut(widthOf(element));
      made.drawAll();
    };

    const paint = (block, shown, flash) => {
      const colour = coloursNow().looks[shown & ~STORED];
      cells.paint(block, flash?.(colour) ?? colour, shown === FREE && !flash, (shown & STORED) !== 0);
    };

    made.drawAll = () => {
      if (!cells.image) return;
      made.shown = replay.at(past_s);
      for (let block = 0; block < number; block++) paint(block, made.shown[block]);
      dirty.clear();
      if (isTurned) flashes.clear();
      cells.show();
      made.placeRing();
    };

    // On from the moment that is shown to a later one.
    made.advance = (to_s) => {
      const came = replay.between(past_s, to_s);
      for (const [, block, , look] of came.changes) {
        made.shown[block] = look;
        paint(block, look);
      }
      for (const [, block, colour] of came.flashes) light(block, colour);
    };

    // What has changed, and what flashes; whether some still do.
    made.drawChanged = () => {
      if (!isPast()) {
        for (const block of dirty) paint(block, looks[block]);
        dirty.clear();
      }
      const colours = coloursNow();
      for (const [block, { since, colour }] of flashes) {
        const part = 1 - (performance.now() - since) / FLASH_MS;
        const look = made.shown[block];
        if (part > 0) paint(block, look, (before) => mixed(colours[colour], before, isCalm.matches ? 1 : part));
        else {
          paint(block, look);
          flashes.delete(block);
        }
      }
      cells.show();
      return flashes.size > 0;
    };

    made.placeRing = () => {
      ring.hidden = chosen?.grid !== made;
      if (ring.hidden) return;
      const side = Math.max(LEAST_RING, cells.side + 2);
      const [x, y] = cells.place(chosen.block).map((edge) => edge + (cells.side - side) / 2);
      ring.style.cssText = `width:${side}px;height:${side}px;transform:translate(${x}px,${y}px)`;
    };

    const point = (event) => choose(made, cells.at(event.offsetX, event.offsetY));
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("focus", () => choose(made, chosen?.grid === made ? chosen.block : 0));
    canvas.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -cells.columns, ArrowDown: cells.columns }[event.key];
      const target = { Home: 0, End: number - 1 }[event.key] ?? (by && (chosen?.block ?? 0) + by);
      if (target === undefined) return;
      event.preventDefault();
      choose(made, Math.max(0, Math.min(number - 1, target)));
    });
    return made;
  }

  function choose(grid, block) {
    if (!(block >= 0 && block < grid.number) || (chosen?.grid === grid && chosen.block === block)) return;
    const before = chosen?.grid;
    chosen = { grid, block };
    before?.placeRing();
    grid.placeRing();
    clearTimeout(waiting);
    waiting = undefined;
    askSoon();
  }

  function askSoon(wait_ms = ASK_MS) {
    waiting ??= setTimeout(() => {
      waiting = undefined;
      if (!section.hidden) askFor();
    }, wait_ms);
  }

  // One question at a time: an answer may have to wait for a step. What the tokens were in the past is not kept.
  async function askFor() {
    if (isAsking) return;
    if (!chosen) return detail.replaceChildren(html("p", { class: "note" }, "Choose a block to see its tokens."));
    if (isPast()) return tellPast(chosen);
    const { grid, block } = chosen;
    isAsking = true;
    try {
      const found = await json(`/v1/cache/blocks/${block}?group=${grid.at}&model=${encodeURIComponent(model.id)}`);
      if (chosen?.grid === grid && chosen.block === block && !isPast()) tell(grid, block, found);
    } catch (error) {
      detail.replaceChildren(error.message);
    }
    isAsking = false;
    if (chosen?.grid !== grid || chosen.block !== block || isPast()) askFor();
  }

  function tellPast({ grid, block }) {
    const look = grid.replay.at(past_s)[block];
    detail.replaceChildren(
      html("p", {}, `Block ${count(block)}, ${secondsAgo()} s ago: ${IN_WORDS[look & ~STORED] ?? "held by a request"}${look & STORED ? ", also on disk" : ""}`),
      html("p", { class: "note" }, "Only the newest tokens of a block are kept."),
    );
  }

  function tell(grid, block, found) {
    const holders = [...model.requests.values()].filter((row) => row.blocks?.[grid.at]?.includes(block));
    const changed = grid.replay.changedAt(block);
    const facts = [
      `Block ${count(block)}: ${found.state}${found.num_holders ? ` by ${found.num_holders}` : ""}${found.is_sealed ? ", sealed" : found.num_holders ? ", open" : ""}${stateOf(model.groups[grid.at].states[block]).isStored ? ", also on disk" : ""}`,
      found.first_token !== null && found.num_tokens && `tokens ${count(found.first_token)} to ${count(found.first_token + found.num_tokens - 1)}`,
      changed && `unchanged for ${Math.max(0, Math.round(live.now() - changed))} s`,
      found.num_evicted_before !== null && (found.num_evicted_before ? `${counted(found.num_evicted_before, "block")} would be evicted before it` : "the next to be evicted"),
      holders.length && `requests ${holders.map((row) => row.request_id).join(", ")}`,
    ];
    const words = found.tokens?.map((text) => token({ text }, found.state === "held" ? "kept" : "")) ?? [];
    const hidden = found.num_tokens && !found.tokens ? "Its text is not yours to see." : "";
    detail.replaceChildren(html("p", {}, facts.filter(Boolean).join(" · ")), html("div", {}, words.length ? words : hidden));
  }

  // To another moment; now where it is not given, and there nothing is played.
  function turn(moment_s) {
    past_s = moment_s;
    if (!isPast()) played = undefined;
    isTurned = true;
    tellMoment();
    askSoon();
    frame ??= requestAnimationFrame(drawFrame);
  }

  function tellMoment() {
    slider.value = isPast() ? -secondsAgo() : 0;
    moment.textContent = isPast() ? `${secondsAgo()} s ago` : "now";
    slider.setAttribute("aria-valuetext", moment.textContent);
    now.disabled = !isPast();
    play.textContent = played ? "Pause" : "Play";
  }

  // From where the past is looked at, or from its beginning.
  function playOrPause() {
    if (played) played = undefined;
    else {
      played = { last_ms: performance.now() };
      if (!isPast()) return turn(live.now() - oldest_s());
    }
    tellMoment();
    askSoon();
    frame ??= requestAnimationFrame(drawFrame);
  }

  const oldest_s = () => Math.max(0, ...grids.map((grid) => grid.replay.seconds(live.now())));

  // As far as the time that has gone by since the last frame; then it is now again.
  function advance() {
    const now_ms = performance.now();
    const by_s = ((now_ms - played.last_ms) / 1000) * Number(speed.value);
    if (isCalm.matches && by_s < CALM_STEP_S) return;
    const to_s = past_s + by_s;
    if (to_s >= live.now()) return turn(undefined);
    for (const grid of grids) grid.advance(to_s);
    past_s = to_s;
    played.last_ms = now_ms;
    askSoon(AGAIN_MS);
  }

  function drawFrame() {
    frame = undefined;
    draw();
  }

  function draw() {
    if (!model || section.hidden) return;
    const least = String(-Math.max(1, Math.round(oldest_s())));
    if (slider.min !== least) slider.min = least;
    if (isPast() && past_s < live.now() - oldest_s()) past_s = live.now() - oldest_s(); // what was before is forgotten
    if (played && !isTurned) advance();
    let flashes = false;
    for (const grid of grids) {
      if (grid.isStale) grid.layOut();
      else if (isTurned) grid.drawAll();
      else flashes = grid.drawChanged() || flashes;
    }
    isTurned = false;
    tellMoment();
    if (isPast()) legend.draw(countsOf(grids[0].shown));
    else legend.draw(grids[0].counts, model.counters.disk_blocks);
    if (flashes || played) frame ??= requestAnimationFrame(drawFrame);
  }

  function hide() {
    waiting = clearTimeout(waiting);
    played = undefined;
  }

  return { draw, note, show: () => askSoon(), hide };
}

function countsOf(looks) {
  const counts = noCounts();
  for (const look of looks) tally(counts, look, 1);
  return counts;
}

// Of blocks, by what they look like; those on disk are counted in addition.
const noCounts = () => new Int32Array(STORED + 1);

function tally(counts, look, by) {
  counts[look & ~STORED] += by;
  if (look & STORED) counts[STORED] += by;
}

const nameOf = ({ kind, layers, window }) =>
  kind === "window" ? `${counted(layers, "layer")} that see${layers === 1 ? "s" : ""} the newest ${counted(window, "token")}` : `${counted(layers, "layer")} that see${layers === 1 ? "s" : ""} all tokens`;

function makeLegend() {
  const row = (style) => {
    const words = document.createTextNode("");
    return { element: html("li", {}, html("i", { style }), words), words };
  };
  const held = row(`background:conic-gradient(${COLOURS.slice(0, 4).join(",")})`);
  const [evicted, copied] = [["--again", "flashes: evicted"], ["--first", "flashes: copied"]].map(([colour, text]) => html("li", { class: "note screen" }, html("i", { style: `background:var(${colour})` }), text));
  const [shared, kept, reusable] = ["--kept", "--muted", "--reusable"].map((colour) => row(`background:var(${colour})`));
  const free = row("box-shadow:inset 0 0 0 1px var(--muted);opacity:0.6");
  const stored = row("background:var(--reusable);clip-path:polygon(0 0,100% 0,100% 45%,45% 100%,0 100%)");
  const write = ({ words }, text) => words.data !== text && (words.data = text);

  // Of those on disk there may be more than in memory: `numStored` now, which the past does not know.
  function draw(counts, numStored) {
    write(held, `${count(counts.slice(KEPT, STORED).reduce((sum, each) => sum + each, 0))} held`);
    write(shared, `${count(counts[SHARED])} of them shared`);
    write(kept, `${count(counts[KEPT])} by a session, a pin, or others`);
    kept.element.hidden = !counts[KEPT];
    write(reusable, `${count(counts[REUSABLE])} reusable`);
    write(free, `${count(counts[FREE])} free`);
    write(stored, `${count(counts[STORED])} also on disk${numStored > counts[STORED] ? `, of ${count(numStored)} there` : ""}`);
    stored.element.hidden = !counts[STORED] && !numStored;
  }

  return { element: html("ul", { class: "counts" }, [held, shared, kept, reusable, free, stored].map(({ element }) => element), evicted, copied), draw };
}

// The scheme's colours as pixels; on paper those that hold in any scheme unless another rule says otherwise.
function coloursOf(element, isPrinted) {
  const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]).filter((rule) => rule.selectorText === ":root");
  const style = isPrinted ? undefined : getComputedStyle(element);
  const of = (name) => (style ?? rules.find((rule) => rule.style.getPropertyValue(name)).style).getPropertyValue(name).trim();
  const pixel = pixelsOf();
  return {
    looks: [pixel(of("--muted"), 0.3), ...["--reusable", "--muted", "--kept"].map((name) => pixel(of(name))), ...COLOURS.map((colour) => pixel(colour))],
    evicted: pixel(of("--again")),
    copied: pixel(of("--first")),
  };
}
