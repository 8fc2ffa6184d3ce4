// The page's one state is the step; every section draws it.

import { html, widthOf } from "kvik/draw.js";
import { bytes, count, counted, quoted, short, time, times } from "kvik/figures.js";
import { build as head } from "kvik/head.js";
import { build as loop } from "kvik/loop.js";
import { build as memory } from "kvik/memory.js";
import { build as phases } from "kvik/phases.js";
import { build as prefixes } from "kvik/prefixes.js";
import { readTrace, totals } from "kvik/trace.js";
import { build as work } from "kvik/work.js";

const trace = readTrace();
const { model, machine, steps, tokens, num_prompt_tokens: numPrompt } = trace;
const element = (id) => document.getElementById(id);
const sections = Object.entries({ loop, head, work, phases, memory, prefixes }).map(([id, build]) =>
  build(element(id).querySelector(".figure"), trace),
);
const slider = element("step");
let step = 0;

writeHeader();
slider.max = steps.length - 1;
slider.addEventListener("input", () => show(Number(slider.value)));
element("back").addEventListener("click", () => show(step - 1));
element("next").addEventListener("click", () => show(step + 1));
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const target = { ArrowLeft: step - 1, ArrowRight: step + 1, Home: 0, End: steps.length - 1 }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  show(target);
});
let width = widthOf(document.body);
addEventListener("resize", () => {
  if (width === widthOf(document.body)) return;
  width = widthOf(document.body);
  show(step);
});
show(Math.min(4, steps.length - 1));

function show(target) {
  step = Math.max(0, Math.min(steps.length - 1, target));
  slider.value = step;
  const { chosen, with_cache: own } = steps[step];
  const last = own.first_position + own.num_tokens - 1;
  element("position").textContent = `step ${step + 1} of ${steps.length}: ${quoted(tokens[last])} → ${quoted(chosen)}`;
  slider.setAttribute("aria-valuetext", element("position").textContent);
  element("back").disabled = step === 0;
  element("next").disabled = step === steps.length - 1;
  for (const [at, button] of [...element("text").children].entries()) {
    button.className = at === last + 1 ? "next" : at > last ? "later" : at < own.first_position ? "kept" : "new";
    if (at === last + 1) button.setAttribute("aria-current", "step");
    else button.removeAttribute("aria-current");
    button.tabIndex = at === last + 1 ? 0 : -1; // one stop for the tab key, not one a token
  }
  for (const section of sections) section.show(step);
}

function writeHeader() {
  const [plain, kept] = [totals(steps, "without", steps.length - 1), totals(steps, "with_cache", steps.length - 1)];
  element("kicker").textContent =
    `${model.name} · ${model.attention} · ${counted(model.num_layers, "layer")} · ${counted(model.num_heads, "query head")}, ${counted(model.num_kv_heads, "KV head")} · ${bytes(model.weight_bytes)} of weights`;
  element("summary").textContent =
    `A language model writes one token at a time, and each one depends on all before it. Here it wrote ${counted(steps.length, "token")}` +
    ` after a prompt of ${count(numPrompt)}, twice: once computing everything anew for each token, once keeping the keys and` +
    ` values of the tokens that it had computed. Every number here was measured or computed with this model, on this machine.`;
  const tiles = [
    [`${count(plain.num_tokens)} → ${count(kept.num_tokens)}`, "tokens computed, without and with the cache"],
    [`${short(plain.multiply_adds)} → ${short(kept.multiply_adds)}`, "multiply-adds"],
    [`${time(plain.seconds)} → ${time(kept.seconds)}`, `of computing; ${times(plain.seconds, kept.seconds)} as long without the cache`],
    [bytes(trace.memory.held_bytes[tokens.length - 1]), "of keys and values held at the end"],
    [trace.same.is_same ? "same bits" : "different!", `${counted(trace.same.num_tokens, "token")}, ${short(trace.same.num_logits)} logits compared`],
  ];
  element("tiles").append(...tiles.map(([figure, what]) => html("div", { class: "tile" }, html("b", {}, figure), html("span", {}, what))));
  element("text").append(
    ...tokens.map(({ text }, at) => {
      const button = html("button", { type: "button", title: at < numPrompt ? "prompt" : `written in step ${at - numPrompt + 1}` }, text);
      button.addEventListener("click", () => show(at - numPrompt));
      return button;
    }),
  );
  element("footer").textContent =
    `Drawn by kvik ${trace.version} from a traced run on ${machine.processor}, ${counted(machine.threads, "thread")}, activations in` +
    ` ${model.activations}, keys and values in ${model.kv_dtype}. Times are of steps as the engine runs them; watching happens beside that clock.`;
}
