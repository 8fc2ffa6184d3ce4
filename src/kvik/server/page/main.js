// The page: its views, the one that the address names, and the key.

import { html } from "./draw.js";
import { follow, live, onLive } from "./live.js";
import { asksForKey, hasKey, isReadOnly, json, setKey } from "./server.js";
import { build as blocks } from "./blocks.js";
import { build as chat } from "./chat.js";
import { build as explain } from "./explain.js";
import { build as numbers } from "./numbers.js";
import { build as planner } from "./planner.js";
import { build as prefixes } from "./prefixes.js";
import { build as race } from "./race.js";
import { build as requests } from "./requests.js";

const VIEWS = [
  ...(isReadOnly ? [] : [{ id: "chat", name: "Chat", build: chat }, { id: "race", name: "Race", build: race }]),
  { id: "blocks", name: "Blocks", build: blocks },
  { id: "prefixes", name: "Prefix tree", build: prefixes },
  { id: "requests", name: "Requests", build: requests },
  { id: "numbers", name: "Numbers", build: numbers },
  { id: "planner", name: "Planner", build: planner },
  ...(isReadOnly ? [] : [{ id: "explain", name: "Explain", build: explain }]),
];
const element = (id) => document.getElementById(id);
let isReady;
const app = {
  model: () => live.models.get(element("model").value),
  ready: new Promise((resolve) => (isReady = resolve)), // there is a model
  onModel: [], // called when another is chosen
};
let shown; // the view, once it is built
let isDue = false; // a drawing

element("key").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(element("key-text").value);
  element("key-text").value = "";
  open();
});
element("model").addEventListener("change", () => {
  app.onModel.forEach((told) => told());
  draw({ isWhole: true, changes: [] });
});
addEventListener("resize", () => draw({ isWhole: true, changes: [] }));
for (const media of ["(prefers-color-scheme: dark)", "print"]) {
  matchMedia(media).addEventListener("change", () => draw({ isWhole: true, changes: [] }));
}
element("skip").addEventListener("click", (event) => {
  event.preventDefault(); // its address would name a view
  element("main").focus();
});
onLive(draw);
open();

async function open() {
  if (asksForKey && !hasKey()) return askForKey("");
  try {
    await json("/v1/models");
  } catch (error) {
    if (error.status === 401) return askForKey(error.message);
  }
  element("key").hidden = true;
  element("main").hidden = false;
  if (!shown) build();
  try {
    await follow(); // which tries again where the server is not ready, or gone
  } catch (error) {
    if (error.status === 401) return askForKey(error.message);
    live.trouble = error.message;
    draw({ isWhole: false, changes: [] });
  }
}

function askForKey(error) {
  setKey("");
  element("main").hidden = true;
  element("key").hidden = false;
  element("key-error").textContent = error.replace(/ \(hint: .*\)$/, ""); // which is for programs
  element("key-text").focus();
}

function build() {
  element("views").replaceChildren(...VIEWS.map(({ id, name }) => html("a", { href: `#${id}` }, name)));
  element("main").replaceChildren(...VIEWS.map(({ id, name }) => html("section", { id, "aria-label": name, hidden: true })));
  for (const view of VIEWS) view.drawn = view.build(element(view.id), app);
  addEventListener("hashchange", show);
  show();
}

// An address names a view, and for some a place in it: "#prefixes/17".
function show() {
  const [name, place] = location.hash.slice(1).split("/");
  const wanted = VIEWS.find((view) => view.id === name) ?? VIEWS[0];
  for (const view of VIEWS) {
    element(view.id).hidden = view !== wanted;
    const link = element("views").querySelector(`[href="#${view.id}"]`);
    if (view === wanted) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (shown !== wanted) shown?.drawn.hide?.();
  if (shown && shown !== wanted) scrollTo({ top: 0, behavior: "instant" });
  shown = wanted;
  document.title = `${wanted.name} · kvik`;
  shown.drawn.show?.(wanted.id === name ? place : undefined);
  draw({ isWhole: true, changes: [] });
}

// At most once a frame, and only the view that is seen; others keep what they need of each change.
function draw(news) {
  if (news.isWhole && live.models.size) nameModels();
  for (const view of VIEWS) view.drawn?.note?.(news);
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    element("status").textContent = live.isConnected ? "" : live.trouble;
    document.body.classList.toggle("lost", !live.isConnected);
    if (app.model()) shown?.drawn.draw();
  });
}

function nameModels() {
  const select = element("model");
  const ids = [...live.models.keys()];
  if (ids.join("\n") === [...select.options].map((option) => option.value).join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...ids.map((id) => html("option", {}, id)));
  if (ids.includes(chosen)) select.value = chosen;
  element("models").hidden = false;
  isReady();
  app.onModel.forEach((told) => told());
}
