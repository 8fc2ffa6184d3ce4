// Requests in the format of ui.perfetto.dev: a track for each, times in microseconds ("Trace Event Format", Google, 2016).

export function traceOf(model) {
  const events = [];
  for (const row of model.requests.values()) {
    const { submitted_s: submitted, begun_s: begun, first_token_s: first, last_token_s: last } = row;
    if (submitted === null) continue;
    events.push({ name: "thread_name", ph: "M", pid: 1, tid: row.key, args: { name: `${row.request_id} ${row.choice || ""}`.trim() } });
    const args = Object.fromEntries(
      ["num_prompt_tokens", "num_cached_tokens", "num_computed_tokens", "num_written_tokens", "kv_bytes", "miss_reason", "finish_reason"].map((name) => [name, row[name]]),
    );
    for (const [name, from, to] of [["queue", submitted, begun], ["prefill", begun, first], ["decode", first, last]]) {
      if (from !== null && to !== null) events.push({ name, cat: "request", ph: "X", pid: 1, tid: row.key, ts: 1e6 * from, dur: 1e6 * (to - from), args });
    }
  }
  return { displayTimeUnit: "ms", otherData: { producer: "kvik", model: model.id }, traceEvents: events };
}
