// Why a match with the cache goes no further, in words.

const REASONS = {
  all: "All of the prompt is in the cache but its last token, which is always computed: its logits choose the next one.",
  short: "What follows is new, and shorter than a block.",
  differs: "From there on the tokens differ from what is cached.",
  unseen: "Nothing that is cached goes on from there.",
  evicted: "The block that goes on from there was in the cache, and was evicted for others.",
  other_salt: "The same beginning is cached for another key or salt, which is not shared.",
  other_format: "The same beginning is cached in another number format.",
  window: "More is cached, but a layer's window reaches back to blocks that were given up.",
  damaged: "The block that goes on from there was stored, and its file is damaged: it was put aside.",
  off: "The prefix cache is off.",
};

export const reasonOf = (reason) => REASONS[reason] ?? "";
