// Planner: what this model, or any of the catalogue, would need here.

import { box, html, picture, svg, widthOf } from "./draw.js";
import { bytes, count, counted, percent } from "./figures.js";
import { json } from "./server.js";

const MOST_USERS = 8; // as a power of two
const LEAST_CONTEXT = 256;
const STEPS = 8; // of a slider, for each doubling
const ASK_MS = 80;
const HEIGHT = 34;

export function build(section, app) {
  const model = html("select", { name: "plan_model" });
  const context = html("input", { type: "range", min: 0, step: 1, name: "plan_context" });
  const users = html("input", { type: "range", min: 0, max: MOST_USERS, step: 1, value: 2, name: "plan_users" });
  const told = { context: html("output"), users: html("output") };
  const kinds = html("fieldset", { "aria-label": "Type of keys and values" });
  const field = (name, output, input) => html("label", { class: "field" }, name, output, input);
  const verdict = html("p", { class: "fits", role: "status" });
  const bar = html("div");
  const legend = html("ul", { class: "counts" });
  const tiles = html("div", { class: "tiles" });
  const pool = html("p", { class: "note" });
  const advice = html("ul");
  section.append(
    html("h1", { class: "view" }, "Planner"),
    html("p", {}, "What a model needs for so many users and so long a context, in the memory that this server's model has now: its weights, its pool and its tables."),
    html("div", { class: "planner" },
      html("div", {}, field("Model", null, model), field("Context ", told.context, context), field("Users at once ", told.users, users), kinds),
      html("div", {}, html("div", { class: "figure", style: "margin:0" }, verdict, bar, legend), tiles, pool, html("div", { class: "figure" }, html("h2", {}, "What follows"), advice))),
  );
  let found; // the newest plan
  let picked; // the type of keys and values, where one was
  let timer;
  let numbers = 0; // of questions, so that a late answer is not shown
  let listed; // once the models are
  let isDue = true; // a plan, without anybody's asking for it; what was refused is not asked for again

  for (const input of [context, users]) input.addEventListener("input", soon);
  model.addEventListener("change", () => {
    found = undefined;
    soon();
  });
  kinds.addEventListener("change", () => {
    picked = kinds.querySelector("input:checked").value;
    soon();
  });
  app.onModel.push(() => {
    if (model.options.length) model.value = app.model().id;
    found = undefined;
    isDue = true;
  });

  function soon() {
    isDue = false;
    clearTimeout(timer);
    timer = setTimeout(askFor, ASK_MS);
  }

  const tokensOf = (most) => Math.min(most, Math.round(LEAST_CONTEXT * 2 ** (Number(context.value) / STEPS)));

  // That which was picked, or the server's own, where the model can have it.
  function typeOf({ kv_dtypes: known, kv_dtype: usual }) {
    const wanted = picked ?? app.model().kv_dtype;
    return known.includes(wanted) ? wanted : usual;
  }

  async function askFor() {
    timer = undefined;
    const number = ++numbers;
    try {
      await (listed ??= list());
      const asked = new URLSearchParams({ served: app.model().id, model: model.value, users: 2 ** Number(users.value) });
      if (found) asked.set("context", tokensOf(found.max_context));
      if (found) asked.set("kv", typeOf(found));
      const answer = await json(`/v1/plan?${asked}`);
      if (number !== numbers) return;
      if (!found) { // of a model that is new here: not at the longest context, which few need
        found = answer;
        setSlider(answer);
        return soon();
      }
      found = answer;
      drawPlan();
    } catch (error) {
      if (!model.options.length) listed = undefined;
      if (number === numbers) verdict.textContent = error.message;
    }
  }

  async function list() {
    const { data } = await json("/v1/plan/models");
    const group = (name, served) => html("optgroup", { label: name }, data.filter((each) => each.is_served === served).map(({ id }) => html("option", {}, id)));
    model.replaceChildren(group("Served here", true), group("Catalogue", false));
    model.value = app.model().id;
  }

  function setSlider({ max_context: most }) {
    context.max = Math.ceil(STEPS * Math.log2(most / LEAST_CONTEXT));
    context.value = Math.floor(STEPS * Math.log2(most / 4 / LEAST_CONTEXT));
  }

  function drawPlan() {
    const { bytes: of, fits, doubled } = found;
    told.context.textContent = counted(found.context, "token");
    told.users.textContent = count(found.users);
    if ([...kinds.querySelectorAll("input")].map((input) => input.value).join() !== found.kv_dtypes.join()) {
      kinds.replaceChildren(...found.kv_dtypes.map((name) => html("label", {}, html("input", { type: "radio", name: "kv", value: name }), ` ${name}`)));
    }
    for (const input of kinds.querySelectorAll("input")) input.checked = input.value === found.kv_dtype;
    verdict.textContent = fits ? `It fits: ${bytes(of.memory - of.needed)} are left.` : `It does not fit: ${bytes(of.needed - of.memory)} are missing.`;
    verdict.classList.toggle("no", !fits);
    const parts = [["weights", of.weights ?? 0, "--muted"], ["keys and values", of.kv, "--new"], ["the rest", of.others, "--first"]];
    bar.replaceChildren(stacked(parts, of, widthOf(bar.parentElement)));
    const row = (colour, text) => html("li", {}, html("i", { style: `background:var(${colour})` }), text);
    legend.replaceChildren(...parts.map(([name, value, colour]) => row(colour, `${name} ${bytes(value)}`)), row("--ink", `memory ${bytes(of.memory)}`));
    const figures = [
      ["kv", bytes(of.kv), `keys and values of ${counted(found.users, "user")}`],
      ["token", bytes(of.token), `a token, with ${found.attention} in ${found.kv_dtype}`],
      ["users", count(found.most_users), `users of this context fit`],
      ["context", count(found.largest_context), `tokens fit for each of ${counted(found.users, "user")}`],
      ["doubled", doubled ? `+${bytes(doubled.more_bytes)}` : "–", doubled ? `for the next doubling, to ${count(doubled.context)} tokens` : "twice the context is more than the model allows"],
    ];
    tiles.replaceChildren(...figures.map(([name, figure, what]) => html("div", { class: "tile", "data-name": name }, html("b", {}, figure), html("span", {}, what))));
    advice.replaceChildren(...found.advice.map((sentence) => html("li", {}, sentence)));
    drawPool();
  }

  // The pool as it is now.
  function drawPool() {
    const { id, counters, groups, num_bytes: reserved } = app.model();
    const total = groups[0].num_blocks;
    pool.textContent =
      `The pool of ${id} has ${bytes(reserved)} in ${counted(total, "block")}: ${percent(counters.held_blocks / total)} held now,` +
      ` ${percent(counters.reusable_blocks / total)} kept for later, ${percent(counters.free_blocks / total)} free.`;
  }

  function draw() {
    if (found) drawPool();
    else if (isDue) soon();
  }

  // A server that is back may be able to.
  const note = ({ isWhole }) => (isDue ||= isWhole && !found);

  return { draw, note, show: () => (found ? drawPlan() : (isDue = true)), hide: () => (timer = clearTimeout(timer)) };
}

function stacked(parts, of, width) {
  const most = Math.max(of.needed, of.memory) * 1.02;
  let x = 0;
  const boxes = parts.map(([, value, colour]) => {
    const made = box(x, 6, (width * value) / most, HEIGHT - 12, colour.slice(2));
    x += (width * value) / most;
    return made;
  });
  const at = (width * of.memory) / most;
  const line = svg("path", { d: `M${at.toFixed(1)} 0V${HEIGHT}`, style: "stroke:var(--ink);stroke-width:2;stroke-dasharray:4 2" });
  return picture(width, HEIGHT, `needed ${bytes(of.needed)} of ${bytes(of.memory)}`, boxes, line);
}
