// Explain: the page of `kvik explain`, made for a prompt that is typed here.

import { html } from "./draw.js";
import { bytes } from "./figures.js";
import { ask, asksForKey, json } from "./server.js";

export function build(section, app) {
  const prompt = html("textarea", { rows: 2, "aria-label": "Prompt" });
  prompt.value = "The cat sat on the mat because";
  const most = html("input", { type: "number", min: 1, max: 128, value: 16, name: "explain_tokens" });
  const asMessage = html("input", { type: "checkbox" });
  const make = html("button", { class: "main" }, "Make the page");
  const problem = html("p", { class: "problem", role: "alert" });
  const outcome = html("div", { role: "status" });
  const form = html("form", { class: "composer" }, prompt,
    html("div", { class: "buttons" }, make, html("label", {}, "Tokens ", most), html("label", {}, asMessage, " as a message")), problem);
  section.append(
    html("h1", { class: "view" }, "Explain"),
    html("p", {}, "Why does the KV cache work? A page about a prompt of yours: every step, token and head of this model, once without the cache and once with it, traced on this machine. It is one file with everything in it, to keep and to send."),
    form,
    outcome,
  );

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!prompt.value || make.disabled) return;
    make.disabled = true;
    problem.textContent = "";
    outcome.replaceChildren(html("p", { class: "note" }, "The model writes, and each step is computed again under watch: it takes some seconds …"));
    try {
      await app.ready;
      const { id, is_chat: isChat } = app.model();
      const asked = asMessage.checked && isChat ? { messages: [{ role: "user", content: prompt.value }] } : { prompt: prompt.value };
      const told = await json("/v1/explain", { method: "POST", body: { model: id, max_tokens: Number(most.value), ...asked } });
      outcome.replaceChildren(made(told));
    } catch (error) {
      problem.textContent = error.message;
      outcome.replaceChildren();
    }
    make.disabled = false;
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });

  return { draw() {} };
}

// A browser sends no key with a link: where one is asked for, each opening gets an address of its own that holds once.
function made({ url, bytes: size }) {
  const button = (name, act) => {
    const found = html("button", { type: "button" }, name);
    found.addEventListener("click", () => act().catch((error) => (problem.textContent = error.message)));
    return found;
  };
  const problem = html("p", { class: "problem", role: "alert" });
  const place = html("div");
  const addressOf = async () => (asksForKey ? (await json(`${url}/link`, { method: "POST", body: {} })).url : url);
  const save = button("Save it", async () => {
    const text = await (await ask(url)).text();
    const link = html("a", { href: URL.createObjectURL(new Blob([text], { type: "text/html" })), download: "kvik-explain.html" });
    link.click();
    URL.revokeObjectURL(link.href);
  });
  const show = button("Show it here", async () => {
    if (place.firstChild) place.replaceChildren();
    else place.replaceChildren(html("iframe", { src: await addressOf(), sandbox: "allow-scripts", title: "The explained prompt" }));
    show.textContent = place.firstChild ? "Hide it" : "Show it here";
  });
  const open = asksForKey
    ? button("Open it in a new tab", async () => window.open(await addressOf(), "_blank", "noopener"))
    : html("a", { href: url, target: "_blank", rel: "noopener" }, "Open it in a new tab");
  return html("div", {},
    html("div", { class: "figure made" }, html("p", {}, html("b", {}, "The page is made"), `, of ${bytes(size)}.`), html("div", { class: "controls" }, show, open, save)),
    problem,
    place);
}
