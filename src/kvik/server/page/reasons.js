// Why a match with the cache goes no further: in words, in few words, and the colour that it has in a chart.

const REASONS = {
  all: ["All of the prompt is in the cache but its last token, which is always computed: its logits choose the next one.", "all but the last token was there", "var(--kept)"],
  short: ["What follows is new, and shorter than a block.", "less than a block was left", "var(--reusable)"],
  differs: ["From there on the tokens differ from what is cached.", "the tokens differ from what is cached", "var(--new)"],
  unseen: ["Nothing that is cached goes on from there.", "nothing cached goes on from there", "var(--muted)"],
  evicted: ["The block that goes on from there was in the cache, and was evicted for others.", "the next block was evicted", "var(--again)"],
  other_salt: ["The same beginning is cached for another key or salt, which is not shared.", "cached under another key or salt", "var(--first)"],
  other_format: ["The same beginning is cached in another number format.", "cached in another number format", "var(--plus)"],
  window: ["More is cached, but a layer's window reaches back to blocks that were given up.", "a window reaches back to blocks that were given up", "var(--minus)"],
  damaged: ["The block that goes on from there was stored, and its file is damaged: it was put aside.", "the stored block is damaged", "var(--ink)"],
  off: ["The prefix cache is off.", "the prefix cache is off", "var(--line)"],
};
const UNKNOWN = ["", undefined, "var(--line)"];

export const reasonOf = (reason) => (REASONS[reason] ?? UNKNOWN)[0];
export const inShort = (reason) => (REASONS[reason] ?? UNKNOWN)[1] ?? reason;
export const colourOf = (reason) => (REASONS[reason] ?? UNKNOWN)[2];
