// Section 6: other prompts that begin alike, block by block.

import { html, token } from "kvik/draw.js";
import { count, counted, quoted, time, times } from "kvik/figures.js";

export function build(figure, trace) {
  for (const found of trace.follow_ups) figure.append(followUp(found, trace));
  if (!trace.follow_ups.length) figure.append(html("p", {}, "The context has no room for another prompt that goes on from here."));
  return { show() {} };
}

function followUp(found, { memory, tokens }) {
  const reused = found.num_shared_tokens + found.num_copied_tokens;
  return html(
    "article",
    { class: "follow-up" },
    html("h3", {}, found.title),
    html("div", { class: "blocks" }, blocks(found, memory.block_size)),
    html("p", {}, where(found, tokens)),
    html(
      "p",
      {},
      `${count(reused)} of ${counted(found.tokens.length, "token")} were there, ${count(found.num_computed_tokens)} had to be computed: the first token came after` +
        ` ${time(found.warm_s)}. With an empty cache it came after ${time(found.cold_s)}${reused ? `, ${times(found.cold_s, found.warm_s)} as long` : ""};` +
        ` ${found.is_same ? "the logits are the same, bit for bit" : "the logits differ (a defect!)"}.`,
    ),
  );
}

function blocks(found, size) {
  const boxes = [];
  for (let start = 0; start < found.tokens.length; start += size) {
    const index = start / size;
    const inside = found.tokens.slice(start, start + size);
    const isShared = start + size <= found.num_shared_tokens;
    const isCopied = !isShared && found.num_copied_tokens > 0 && start === found.num_shared_tokens;
    const kinds = inside.map((_, at) => (isShared ? "kept" : isCopied && at < found.num_copied_tokens ? "copied" : "new"));
    const name = isShared
      ? `block ${found.shared_blocks[index]}, shared`
      : isCopied
        ? `block ${found.copied_block}, copied as far as both agree`
        : "a new block";
    boxes.push(
      html("div", { class: `block ${isShared ? "kept" : isCopied ? "copied" : "new"}` }, html("small", {}, name), inside.map((one, at) => token(one, kinds[at]))),
    );
  }
  return boxes;
}

// Where the match ends, and why.
function where(found, tokens) {
  const common = found.num_common_tokens;
  const parts = [common ? `The texts agree in their first ${counted(common, "token")}` : "The texts differ from the first token on"];
  if (found.known_next && common < found.tokens.length) {
    parts.push(`; then the first one had ${quoted(found.known_next)}, this one has ${quoted(found.tokens[common])}`);
  } else if (common === tokens.length) {
    parts.push(": all that the first one has");
  }
  parts.push(`. ${reason(found)}`);
  return parts.join("");
}

function reason(found) {
  const reused = found.num_shared_tokens + found.num_copied_tokens;
  const common = found.num_common_tokens;
  if (reused === common) return common ? "There the match ends." : "So there is nothing to reuse.";
  if (reused === found.tokens.length - 1) return "Its last token is computed all the same: its logits choose the next one.";
  return `The match ends after ${counted(reused, "token")}: ${found.stop}.`;
}
