// Race: one prompt answered without the cache and with it, side by side.

import { html, widthOf, box, picture } from "./draw.js";
import { bytes, count, counted, short, time, times } from "./figures.js";
import { ask, eventsOf } from "./server.js";

const FIGURES = [
  ["num_tokens", "tokens written", count],
  ["num_computed_tokens", "tokens computed", count],
  ["multiply_adds", "multiply-adds", short],
  ["read_bytes", "bytes read", bytes],
  ["seconds", "time", time],
];
const LANES = [
  ["without the cache", "Everything is computed anew for each token."],
  ["with the cache", "Keys and values are kept: one token is computed for each."],
];

export function build(section, app) {
  const prompt = html("textarea", { rows: 2, "aria-label": "Prompt" });
  prompt.value = "Write a short story about a lighthouse keeper.";
  const most = html("input", { type: "number", min: 1, max: 512, value: 64, name: "race_tokens" });
  const go = html("button", { class: "main" }, "Race");
  const problem = html("p", { class: "problem", role: "alert" });
  const form = html("form", { class: "composer screen" }, prompt, html("div", { class: "buttons" }, go, html("label", {}, "Tokens ", most)), problem);
  const verdict = html("p", { class: "verdict", role: "status" });
  const lanes = LANES.map(([name, note], at) => {
    const text = html("p", { class: "words" });
    const element = html("div", { class: "figure lane" }, html("h2", {}, `${name[0].toUpperCase()}${name.slice(1)}`), html("p", { class: "note" }, note), text);
    return { element, text, colour: at ? "kept" : "again" };
  });
  const table = html("div", { class: "figure" });
  const results = html("div", { hidden: true }, verdict, html("div", { class: "lanes" }, lanes.map(({ element }) => element)), table);
  section.append(
    html("h1", { class: "view" }, "Race"),
    html("p", {}, "The same prompt, the same weights, twice: once forgetting keys and values after each token, once keeping them. The lanes take turns, each on a clock of its own; what else the server does slows both."),
    form,
    results,
  );
  let abort;
  let latest;

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (abort) return abort.abort();
    if (!prompt.value.trim()) return;
    abort = new AbortController();
    go.textContent = "Stop";
    problem.textContent = verdict.textContent = "";
    latest = undefined;
    results.hidden = true;
    await app.ready;
    const model = app.model();
    const asked = model.is_chat ? { messages: [{ role: "user", content: prompt.value }] } : { prompt: prompt.value };
    try {
      const answer = await ask("/v1/race", { method: "POST", body: { model: model.id, ...asked, max_tokens: Number(most.value) }, signal: abort.signal });
      for await (const { name, data } of eventsOf(answer)) {
        latest = data;
        drawLanes();
        if (name === "verdict") verdict.replaceChildren(...saying(data));
      }
    } catch (error) {
      if (error.name !== "AbortError") problem.textContent = error.message;
    }
    abort = undefined;
    go.textContent = "Race";
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  section.addEventListener("keydown", (event) => {
    if (event.key === "Escape") abort?.abort();
  });

  function drawLanes() {
    if (!latest) return;
    results.hidden = false;
    lanes.forEach(({ text }, at) => (text.textContent = latest.lanes[at].text));
    const width = Math.min(420, widthOf(table) * 0.3);
    const rows = FIGURES.map(([name, what, write]) => {
      const values = latest.lanes.map((lane) => lane[name]);
      const largest = Math.max(...values) || 1;
      const cells = values.map((value, at) => html("td", { "data-lane": at, "data-name": name }, write(value)));
      const bars = picture(width, 18, `${what}: ${values.map(write).join(" and ")}`, values.map((value, at) => box(0, 10 * at, (width * value) / largest, 8, lanes[at].colour, { rx: 2 })));
      return html("tr", {}, html("td", {}, what), ...cells, html("td", { class: "bars" }, bars));
    });
    const heads = [html("span", { class: "unseen" }, "of"), ...LANES.map(([name]) => name), html("span", { class: "unseen" }, "as bars")].map((name) => html("th", { scope: "col" }, name));
    table.replaceChildren(html("table", {}, html("thead", {}, html("tr", {}, heads)), html("tbody", {}, rows)));
  }

  return { draw: drawLanes };
}

// The end, in one sentence.
function saying({ lanes: [without, kept], num_compared: compared, is_same: isSame }) {
  const ratio = (name) => times(without[name], kept[name]);
  const same = isSame ? "Same tokens, same bits" : "The lanes differ: a defect";
  return [
    html("b", {}, `${same}: `),
    `${counted(compared, "token")} and all of their logits were compared. Without the cache it took ${ratio("seconds")} as long, ${ratio("num_computed_tokens")} the tokens computed and ${ratio("multiply_adds")} the multiply-adds.`,
  ];
}
