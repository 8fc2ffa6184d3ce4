// Under an answer: what it cost, its tokens as blocks of the cache, and why not more of it was found there.

import { box, html, picture, token, widthOf } from "./draw.js";
import { bytes, count, counted, time } from "./figures.js";
import { requestOf } from "./live.js";
import { reasonOf } from "./reasons.js";

const CELL = { height: 16, gap: 2, most: 36 };

// The figures of an answer: what its last chunk says, or as far as it came.
export function receipt({ usage, timings }) {
  const cached = usage.prompt_tokens_details.cached_tokens;
  const computed = usage.prompt_tokens - cached;
  const first_s = (timings.queue_ms + timings.prompt_ms) / 1000;
  return {
    prompt: usage.prompt_tokens,
    cached,
    computed,
    written: usage.completion_tokens,
    parts: [
      ["prompt", counted(usage.prompt_tokens, "token")],
      ["cached", count(cached), "kept"],
      ["computed", count(computed), "new"],
      ["written", count(usage.completion_tokens), "written"],
      ["first token", time(first_s)],
      ["speed", timings.predicted_per_second ? `${count(Math.round(timings.predicted_per_second))} tok/s` : "–"],
      ["KV", bytes(timings.kv_bytes)],
    ],
  };
}

// The same of an answer that was stopped, once the engine was seen to have ended it.
export function stoppedReceipt(requestId) {
  const row = requestOf(requestId);
  if (row?.phase !== "done" || !row.begun_s) return undefined;
  const decode_s = row.last_token_s - row.first_token_s;
  return receipt({
    usage: {
      prompt_tokens: row.num_prompt_tokens,
      completion_tokens: row.num_written_tokens,
      prompt_tokens_details: { cached_tokens: row.num_cached_tokens },
    },
    timings: {
      queue_ms: 0,
      prompt_ms: row.first_token_s ? 1000 * (row.first_token_s - row.submitted_s) : 0,
      predicted_per_second: decode_s > 0 ? (row.num_written_tokens - 1) / decode_s : 0,
      kv_bytes: row.kv_bytes,
    },
  });
}

export function drawReceipt(place, told, turn, blockSize) {
  const list = html("dl", { class: "receipt" }, told.parts.map(([name, figure, colour]) => html("div", {}, html("dt", {}, colour && html("i", { style: `background:var(--${colour})` }), name), html("dd", {}, figure))));
  const why = html("details", { class: "why" }, html("summary", {}, "Why not more?"), reason(told, turn));
  place.replaceChildren(strip(told, blockSize, widthOf(place)), list, why);
}

// A cell for each block: what was there, what was computed, what was written.
function strip({ prompt, cached, written }, blockSize, width) {
  const total = prompt + written;
  const numBlocks = Math.ceil(total / blockSize);
  const cell = Math.min(CELL.most, Math.max(2, width / numBlocks));
  const gap = cell > 6 ? CELL.gap : 0;
  const parts = [[0, cached, "kept"], [cached, prompt, "new"], [prompt, total, "written"]];
  const rects = [];
  for (let at = 0; at < numBlocks; at++) {
    for (const [first, end, colour] of parts) {
      const [from, to] = [Math.max(first, at * blockSize), Math.min(end, (at + 1) * blockSize)];
      if (from >= to) continue;
      const scale = (cell - gap) / blockSize;
      const x = at * cell + (from - at * blockSize) * scale;
      rects.push(box(x, 0, (to - from) * scale, CELL.height, colour, { rx: 1 }));
    }
  }
  const label = `${counted(numBlocks, "block")}: ${counted(cached, "token")} from the cache, ${count(prompt - cached)} computed, ${count(written)} written`;
  return picture(Math.min(width, numBlocks * cell), CELL.height, label, rects);
}

// `turn.match` is what the cache had of the prompt right before it was sent, where that was asked.
function reason({ prompt, cached }, turn) {
  const told = turn.diagnostics;
  const match = turn.match?.num_tokens === prompt && turn.match.num_cached_tokens === cached ? turn.match : undefined;
  const engine = told?.engine_reason ?? requestOf(turn.requestId)?.miss_reason ?? match?.miss_reason;
  const parts = [html("p", {}, `${counted(cached, "token")} of ${count(prompt)} came from the cache. ${reasonOf(engine)}`)];
  if (match?.found?.length && engine !== "all") {
    parts.push(difference(match.before.join(""), [["cached: ", match.expected ?? [], "kept"], ["now: ", match.found, "new"]]));
  }
  const earlier = told?.first_difference;
  if (earlier && match && earlier.position === cached) {
    parts.push(html("p", {}, `There it also leaves the prompt of the answer before it: they agree in ${counted(cached, "token")}.`));
  } else if (earlier) {
    parts.push(html("p", {}, `The prompt of the answer before it and this one agree in ${counted(earlier.position, "token")}, and then differ:`),
      difference(earlier.before, [["before: ", [earlier.expected], "kept"], ["now: ", [earlier.found], "new"]]));
  } else if (told?.type === "cache_hit") {
    parts.push(html("p", {}, "It begins with all of the prompt before it: nothing that could be reused was computed again."));
  }
  if (told?.changed_fields) parts.push(html("p", { class: "note" }, `Changed since then: ${told.changed_fields.join(", ")}.`));
  return parts;
}

// The end of what two prompts share, and a line for how each goes on.
function difference(before, lines) {
  const shown = lines.filter(([, texts]) => texts.length);
  return html("div", { class: "difference" }, before && html("p", { class: "before" }, `… ${oneLine(before)}`),
    shown.map(([name, texts, kind]) => html("p", {}, name, texts.map((text) => token({ text: oneLine(text) }, kind)))));
}

// With the ends of lines as they are written in code.
const oneLine = (text) => text.replaceAll("\n", "\\n");
