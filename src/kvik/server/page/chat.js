// Chat: a conversation that branches, and under each answer what it cost.

import { html } from "./draw.js";
import { count } from "./figures.js";
import { Conversation } from "./conversation.js";
import { Markdown } from "./markdown.js";
import { drawReceipt, receipt, stoppedReceipt } from "./receipt.js";
import { ask, eventsOf, json } from "./server.js";
import { settings } from "./settings.js";

const NEAR = 48; // pixels: so far from its end a reader still follows an answer
const ROLES = { user: "You", assistant: "Model" };

export function build(section, app) {
  let conversation = new Conversation();
  let running; // {turn, abort}
  const chosen = settings();
  const turns = html("ol", { class: "turns", "aria-label": "Conversation" });
  const text = html("textarea", { id: "say", rows: 2, "aria-label": "Your message", placeholder: "Ask something" });
  const send = html("button", { class: "main" }, "Send");
  const fresh = html("button", { type: "button" }, "New chat");
  const problem = html("p", { class: "problem", role: "alert" });
  const form = html("form", { class: "composer" }, text, html("div", { class: "buttons" }, send, fresh), problem);
  const empty = html("div", { class: "empty" },
    html("h1", {}, "Talk to the model, watch its cache"),
    html("p", { class: "lead" }, "Each answer shows what was read back and what was computed. Edit an earlier turn: the conversation branches, and the shared beginning is not computed again."));
  const title = html("h1", { class: "unseen" }, "Chat");
  section.append(html("div", { class: "chat" }, html("div", { class: "talk" }, empty, title, turns, form), chosen.element));
  // What is scrolled to must not end below the composer.
  new ResizeObserver(() => document.documentElement.style.setProperty("--composer", `${form.offsetHeight}px`)).observe(form);

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return running.abort.abort();
    if (!text.value.trim()) return;
    const content = text.value;
    text.value = "";
    write(conversation.add(conversation.last, "user", content));
  });
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) form.requestSubmit();
  });
  section.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort.abort();
  });
  fresh.addEventListener("click", () => {
    running?.abort.abort();
    conversation = new Conversation();
    problem.textContent = "";
    drawAll();
    text.focus();
  });

  drawAll();

  // Have the model answer a turn of the user's, who wrote it in place of `edited` where that is given.
  async function write(question, edited) {
    problem.textContent = "";
    const turn = conversation.add(question, "assistant");
    const before = conversation.answerBefore(turn);
    const abort = new AbortController();
    running = { turn, abort };
    drawAll();
    reveal(turn.foot);
    try {
      await app.ready;
      const { path, body, prompt } = requestOf(turn, before);
      turn.match = await matchOf({ model: body.model, ...prompt, ...(body.tools && { tools: body.tools }) }, abort.signal);
      if (body.response_format || !prompt.messages) turn.isPlain = true; // JSON, or text that goes on: no Markdown
      const answer = await ask(path, { method: "POST", body, signal: abort.signal });
      turn.requestId = answer.headers.get("x-request-id");
      for await (const { data } of eventsOf(answer)) {
        if (data.error) throw new Error(data.error.message);
        take(turn, data);
      }
    } catch (error) {
      if (error.name === "AbortError") turn.isStopped = true;
      else turn.error = error.message;
    }
    running = undefined;
    if (turn.error && !turn.content && !turn.calls) takeBack(turn, edited);
    drawAll();
    drawAnswer(turn);
    if (document.activeElement === document.body || form.contains(document.activeElement)) text.focus({ preventScroll: true });
  }

  // Nothing came of an answer: the words go back to where they were written, and what was shown before is shown.
  function takeBack(turn, edited) {
    const question = turn.parent;
    const isShown = conversation.path.includes(turn);
    conversation.drop(turn);
    if (!question.children.length) conversation.drop(question);
    if (!isShown) return;
    if (edited) {
      drawAll();
      return edit(edited, question.content, turn.error);
    }
    problem.textContent = turn.error;
    if (!question.children.length) text.value ||= question.content;
  }

  function requestOf(turn, before) {
    const messages = conversation.messagesBefore(turn, chosen.system());
    const model = app.model();
    const asked = model.is_chat
      ? { path: "/v1/chat/completions", prompt: { messages } }
      : { path: "/v1/completions", prompt: { prompt: messages.map((message) => message.content).join("") } };
    const body = {
      model: model.id, ...asked.prompt, ...chosen.fields(), stream: true, return_progress: true,
      stream_options: { include_usage: true }, ...(before && { comparison_response_id: before.responseId }),
    };
    return { path: asked.path, body, prompt: asked.prompt };
  }

  // How far the cache goes now; afterwards the prompt itself is in it. An answer needs this for its explanation alone.
  function matchOf(body, signal) {
    return json("/v1/cache/match", { method: "POST", body, signal }).catch((error) => {
      if (error.name === "AbortError") throw error;
    });
  }

  function take(turn, data) {
    turn.responseId = data.id;
    if (data.prompt_progress) turn.progress = data.prompt_progress;
    if (data.usage) {
      turn.receipt = receipt(data);
      turn.diagnostics = data.prompt_cache_diagnostics;
    }
    const choice = data.choices[0];
    if (choice) {
      turn.content += choice.delta?.content ?? choice.text ?? "";
      for (const call of choice.delta?.tool_calls ?? []) addCall(turn, call);
      turn.finishReason = choice.finish_reason ?? turn.finishReason;
    }
    if (turn.isDue) return;
    turn.isDue = true;
    requestAnimationFrame(() => {
      turn.isDue = false;
      drawAnswer(turn);
    });
  }

  function drawAll() {
    empty.hidden = conversation.path.length > 0;
    title.hidden = !empty.hidden;
    const items = conversation.path.map((turn) => turn.item ?? item(turn));
    let numKept = 0;
    while (items[numKept] && turns.children[numKept] === items[numKept]) numKept++;
    while (turns.children.length > numKept) turns.lastChild.remove(); // those that stay keep the focus, and what is open
    turns.append(...items.slice(numKept));
    for (const turn of conversation.path) {
      const { count: several, at } = conversation.siblings(turn);
      if (several < 2) turn.branches.remove();
      else if (!turn.branches.isConnected) turn.change.before(turn.branches);
      turn.which.textContent = ` ${at + 1} of ${several} `;
      for (const button of turn.item.querySelectorAll(".actions button")) button.disabled = Boolean(running);
    }
    send.textContent = running ? "Stop" : "Send";
    fresh.hidden = !conversation.path.length;
  }

  function item(turn) {
    const button = (name, label, act) => {
      const made = html("button", { type: "button", "aria-label": label }, name);
      made.addEventListener("click", act);
      return made;
    };
    const go = (by) => () => {
      const other = conversation.step(turn, by);
      drawAll();
      (by < 0 ? other.previous : other.next).focus();
    };
    turn.previous = button("‹", "Previous branch", go(-1));
    turn.next = button("›", "Next branch", go(1));
    turn.which = html("span");
    turn.branches = html("span", { class: "branches" }, turn.previous, turn.which, turn.next);
    turn.change = turn.role === "user"
      ? button("Edit", "Edit this turn: the conversation branches here", () => edit(turn))
      : button("Again", "Answer again", () => write(turn.parent));
    turn.body = html("div", { class: "words" });
    turn.foot = html("div", { class: "foot" });
    const actions = html("span", { class: "actions" }, turn.change);
    turn.item = html("li", { class: `turn ${turn.role}` }, html("p", { class: "who" }, ROLES[turn.role], actions), turn.body, turn.foot);
    if (turn.role === "user") turn.body.textContent = turn.content;
    else {
      turn.words = html("div");
      turn.made = html("div"); // its calls
      turn.body.append(turn.words, turn.made);
      turn.source = button("As written", undefined, () => {
        turn.isPlain = !turn.isPlain;
        drawAnswer(turn);
      });
      turn.change.before(turn.source);
      turn.foot.addEventListener("toggle", ({ target }) => target.open && reveal(target), true); // it does not bubble
      drawAnswer(turn);
    }
    return turn.item;
  }

  function drawAnswer(turn) {
    const isRunning = running?.turn === turn;
    const isFollowed = turn.item.getBoundingClientRect().bottom < form.getBoundingClientRect().top + NEAR;
    drawWords(turn);
    turn.body.classList.toggle("writing", isRunning);
    turn.made.replaceChildren(...(turn.calls ?? []).map((call) => html("pre", { class: "call" }, `${call.function.name}(${call.function.arguments})`)));
    if (isRunning) turn.foot.replaceChildren(html("p", { class: "note" }, progressOf(turn)));
    else if (turn.receipt && turn.item.isConnected) drawReceipt(turn.foot, turn.receipt, turn, app.model()?.block_size ?? 32);
    else turn.foot.replaceChildren();
    if (turn.isStopped) turn.foot.prepend(html("p", { class: "note" }, "Stopped."));
    if (turn.finishReason === "length" && !isRunning) turn.foot.prepend(html("p", { class: "note" }, "It ends here because of the limit on tokens."));
    if (turn.error) turn.foot.prepend(html("p", { class: "problem" }, turn.error));
    if (isFollowed) reveal(turn.foot, "instant");
  }

  // What is new of the words; all of them where they are shown in another way than before.
  function drawWords(turn) {
    if (turn.text?.isPlain !== Boolean(turn.isPlain)) {
      turn.text = turn.isPlain ? new Plain() : new Markdown();
      turn.text.isPlain = Boolean(turn.isPlain);
      turn.words.replaceChildren(turn.text.element);
    }
    turn.text.append(turn.content.slice(turn.text.length));
    turn.source.hidden = !turn.content;
    turn.source.textContent = turn.isPlain ? "As Markdown" : "As written";
  }

  // Scroll no further than needed to see it above the composer.
  function reveal(element, behavior = "auto") {
    element.scrollIntoView({ block: "nearest", behavior });
  }

  function progressOf({ progress, content }) {
    if (content || !progress) return content ? "" : "Waiting for the model …";
    return `The prompt: ${count(progress.cache)} of ${count(progress.total)} tokens from the cache, ${count(progress.processed - progress.cache)} computed …`;
  }

  // In place of a turn's words, a box to change them; sending it makes a branch.
  function edit(turn, content = turn.content, error = "") {
    const words = html("textarea", { rows: Math.min(12, content.split("\n").length + 1), "aria-label": "The turn, to be changed" });
    words.value = content;
    const cancel = html("button", { type: "button" }, "Cancel");
    const changed = html("form", { class: "composer" }, words, html("div", { class: "buttons" }, html("button", { class: "main" }, "Branch from here"), cancel),
      html("p", { class: "problem", role: "alert" }, error));
    const close = () => (turn.body.textContent = turn.content);
    const leave = () => {
      close();
      turn.change.focus();
    };
    turn.body.replaceChildren(changed);
    words.focus();
    cancel.addEventListener("click", leave);
    words.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      changed.requestSubmit();
    });
    changed.addEventListener("submit", (event) => {
      event.preventDefault();
      if (running || !words.value.trim()) return;
      close();
      write(conversation.add(turn.parent, "user", words.value), turn);
    });
  }

  function draw() {
    for (const turn of conversation.path) {
      if (!turn.isStopped || turn.receipt) continue;
      turn.receipt = stoppedReceipt(turn.requestId);
      if (turn.receipt) drawAnswer(turn);
    }
  }

  return { draw, show: () => text.focus({ preventScroll: true }) };
}

// Text as it is, which grows.
class Plain {
  element = html("div", { class: "as-written" }, document.createTextNode(""));
  length = 0;

  append(text) {
    this.length += text.length;
    this.element.firstChild.appendData(text);
  }
}

function addCall(turn, { index, id, function: called }) {
  turn.calls ??= [];
  turn.calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } };
  turn.calls[index].function.name += called?.name ?? "";
  turn.calls[index].function.arguments += called?.arguments ?? "";
}
