// The engine's state as `/v1/events` tells it: everything at first, then what changes.

import { ask, eventsOf } from "./server.js";

const MAX_SAMPLES = 900;
const SAMPLE_S = 1;
const AGAIN_MS = 1500;
const GONE = "The server is gone; trying again";
const STORED = 0x80;
const FINAL = [401, 403]; // what no later try would change

export const live = {
  models: new Map(), // by id: what the server says of it, and `groups` with `states`, `requests` by key
  isConnected: false,
  trouble: "", // why it is not connected
  seesText: true,
  now: () => performance.now() / 1000 + offset_s, // the server's clock
};
let offset_s = 0;
const listeners = new Set();

// Called with {isWhole, changes} after each message, and when the connection is lost or found.
export const onLive = (listener) => listeners.add(listener);

// A listener's error is its own: the console has it, and the others are told all the same.
function tell(news) {
  for (const listener of listeners) {
    try {
      listener(news);
    } catch (error) {
      reportError(error);
    }
  }
}

// For ever: read, and begin again where the connection is lost, or the server has no time yet. Raises the `Refusal` of
// a key, or of a page that may not ask.
export async function follow() {
  for (;;) {
    let wait_ms = AGAIN_MS;
    live.trouble = GONE;
    try {
      const answer = await ask("/v1/events");
      for await (const event of eventsOf(answer)) hear(event);
    } catch (error) {
      if (FINAL.includes(error.status)) throw error;
      if (error.status) live.trouble = error.message;
      wait_ms = Math.max(wait_ms, 1000 * (error.retryAfter_s ?? 0));
    } finally {
      live.isConnected = false;
    }
    tell({ isWhole: false, changes: [] });
    await new Promise((resolve) => setTimeout(resolve, wait_ms));
  }
}

// After an error of this page's own, the whole state is asked for again.
function hear({ name, data }) {
  let changes = [];
  try {
    offset_s = data.now_s - performance.now() / 1000;
    if (name === "state") take(data);
    else changes = data.models.map(change);
  } catch (error) {
    reportError(error);
    throw error;
  }
  live.isConnected = true;
  tell({ isWhole: name === "state", changes });
}

function take({ models, sees_text: seesText }) {
  live.seesText = seesText;
  live.models = new Map(
    models.map(({ states, requests, groups, hits, ...model }) => [
      model.id,
      {
        ...model,
        groups: groups.map((group, at) => ({ ...group, states: Uint8Array.from(atob(states[at]), (letter) => letter.charCodeAt(0)) })),
        hits: new Map(hits[0].map((block, at) => [block, hits[1][at]])), // requests that each block was read back for
        requests: new Map(requests.map((row) => [row.key, row])),
      },
    ]),
  );
}

function change({ id, counters, blocks, requests, hits, gone, evicted, copied }) {
  const model = live.models.get(id);
  blocks.forEach(([ids, states], group) => ids.forEach((block, at) => (model.groups[group].states[block] = states[at])));
  for (const row of requests) {
    const known = model.requests.get(row.key);
    if (known) Object.assign(known, row);
    else model.requests.set(row.key, row);
  }
  hits[0].forEach((block, at) => model.hits.set(block, hits[1][at]));
  for (const key of gone) model.requests.delete(key);
  model.counters = counters;
  const { names, rows } = model.history;
  const at_s = live.now();
  if (!rows.length || at_s - rows.at(-1)[0] >= SAMPLE_S) {
    rows.push(names.map((name) => (name === "at_s" ? at_s : counters[name])));
    if (rows.length > MAX_SAMPLES) rows.shift();
  }
  return { model, blocks: blocks.map(([ids]) => ids), rows: requests, gone, evicted, copied };
}

// A block's state in words; `count` are those who hold it.
export const stateOf = (byte) => {
  const count = (byte & ~STORED) >> 1;
  return { count, name: count ? "held" : byte & 1 ? "reusable" : "free", isStored: (byte & STORED) !== 0 };
};

// A request as it is now, by the id that its answer has.
export const requestOf = (id) => [...live.models.values()].flatMap((model) => [...model.requests.values()]).find((row) => row.request_id === id);
