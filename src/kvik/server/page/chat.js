// Chat: a conversation that branches, and under each answer what it cost.

import { html } from "./draw.js";
import { count } from "./figures.js";
import { Conversation } from "./conversation.js";
import { drawReceipt, receipt, stoppedReceipt } from "./receipt.js";
import { ask, eventsOf } from "./server.js";
import { settings } from "./settings.js";

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
  section.append(html("div", { class: "chat" }, html("div", { class: "talk" }, empty, turns, form), chosen.element));

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
    drawAll();
    text.focus();
  });

  drawAll();

  // Have the model answer a turn of the user's.
  async function write(question) {
    problem.textContent = "";
    const turn = conversation.add(question, "assistant");
    const before = conversation.answerBefore(turn);
    const abort = new AbortController();
    running = { turn, abort };
    drawAll();
    turn.item.scrollIntoView({ block: "end" });
    try {
      await app.ready;
      const { path, body } = requestOf(turn, before);
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
    if (turn.error && !turn.content) { // nothing came of it: the words go back to be changed
      problem.textContent = turn.error;
      turn.parent.children.pop();
      if (!question.children.length && question === conversation.last) {
        question.parent.children.pop();
        question.parent.chosen = Math.max(0, question.parent.children.length - 1);
        text.value ||= question.content;
      }
    }
    drawAll();
    text.focus({ preventScroll: true });
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
    return { path: asked.path, body };
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
    drawAnswer(turn);
  }

  function drawAll() {
    empty.hidden = conversation.path.length > 0;
    turns.replaceChildren(...conversation.path.map(item));
    send.textContent = running ? "Stop" : "Send";
    fresh.hidden = !conversation.path.length;
  }

  function item(turn) {
    const { count: several, at } = conversation.siblings(turn);
    const button = (name, label, act) => {
      const made = html("button", { type: "button", "aria-label": label, disabled: Boolean(running) }, name);
      made.addEventListener("click", act);
      return made;
    };
    const go = (by) => () => {
      conversation.step(turn, by);
      drawAll();
    };
    const actions = html("span", { class: "actions" },
      several > 1 && html("span", { class: "branches" }, button("‹", "Previous branch", go(-1)), ` ${at + 1} of ${several} `, button("›", "Next branch", go(1))),
      turn.role === "user"
        ? button("Edit", "Edit this turn: the conversation branches here", () => edit(turn))
        : button("Again", "Answer again", () => write(turn.parent)));
    turn.body = html("div", { class: "words" });
    turn.foot = html("div", { class: "foot" });
    turn.item = html("li", { class: `turn ${turn.role}` }, html("p", { class: "who" }, ROLES[turn.role], actions), turn.body, turn.foot);
    if (turn.role === "user") turn.body.textContent = turn.content;
    else queueMicrotask(() => drawAnswer(turn)); // once it has a width
    return turn.item;
  }

  function drawAnswer(turn) {
    const isRunning = running?.turn === turn;
    turn.body.textContent = turn.content;
    turn.body.classList.toggle("writing", isRunning);
    for (const call of turn.calls ?? []) turn.body.append(html("pre", { class: "call" }, `${call.function.name}(${call.function.arguments})`));
    if (isRunning && !turn.receipt) return turn.foot.replaceChildren(html("p", { class: "note" }, progressOf(turn)));
    if (turn.receipt) drawReceipt(turn.foot, turn.receipt, turn, app.model()?.block_size ?? 32);
    else turn.foot.replaceChildren();
    if (turn.isStopped) turn.foot.prepend(html("p", { class: "note" }, "Stopped."));
    if (turn.finishReason === "length") turn.foot.prepend(html("p", { class: "note" }, "It ends here because of the limit on tokens."));
    if (turn.error) turn.foot.prepend(html("p", { class: "problem" }, turn.error));
  }

  function progressOf({ progress, content }) {
    if (content || !progress) return content ? "" : "Waiting for the model …";
    return `The prompt: ${count(progress.cache)} of ${count(progress.total)} tokens from the cache, ${count(progress.processed - progress.cache)} computed …`;
  }

  // In place of a turn's words, a box to change them; sending it makes a branch.
  function edit(turn) {
    const words = html("textarea", { rows: Math.min(12, turn.content.split("\n").length + 1), "aria-label": "The turn, to be changed" });
    words.value = turn.content;
    const cancel = html("button", { type: "button" }, "Cancel");
    const changed = html("form", { class: "composer" }, words, html("div", { class: "buttons" }, html("button", { class: "main" }, "Branch from here"), cancel));
    turn.body.replaceChildren(changed);
    words.focus();
    cancel.addEventListener("click", drawAll);
    words.addEventListener("keydown", (event) => {
      if (event.key === "Escape") drawAll();
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      changed.requestSubmit();
    });
    changed.addEventListener("submit", (event) => {
      event.preventDefault();
      if (words.value.trim()) write(conversation.add(turn.parent, "user", words.value));
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

function addCall(turn, { index, id, function: called }) {
  turn.calls ??= [];
  turn.calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } };
  turn.calls[index].function.name += called?.name ?? "";
  turn.calls[index].function.arguments += called?.arguments ?? "";
}
