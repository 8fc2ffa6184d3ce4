// The arithmetic of one head, as the page shows it: softmax(q K^T scale) V for one query. A sink is one more score, which
// brings no value.

export function attend(layer, headIndex, position) {
  const group = layer.heads.length / layer.kv_heads.length;
  const kvIndex = Math.floor(headIndex / group);
  const first = layer.window ? Math.max(0, position - layer.window + 1) : 0;
  const q = layer.queries.row(position, headIndex);
  const keys = [];
  const values = [];
  for (let at = first; at <= position; at++) {
    keys.push(layer.keys.row(at, kvIndex));
    values.push(layer.values.row(at, kvIndex));
  }
  const products = keys.map((k) => dot(q, k));
  const scores = products.map((product) => capped(product * layer.scale, layer.soft_cap));
  const sink = layer.sinks === null ? -Infinity : layer.sinks[headIndex];
  const largest = Math.max(sink, ...scores);
  const powers = scores.map((score) => Math.exp(score - largest));
  const sum = powers.reduce((total, power) => total + power, Math.exp(sink - largest));
  const weights = powers.map((power) => power / sum);
  const output = Array.from(q, (_, d) => weights.reduce((total, weight, at) => total + weight * values[at][d], 0));
  return { first, q, keys, values, products, scores, sink, largest, powers, sum, weights, output };
}

const dot = (a, b) => a.reduce((total, value, i) => total + value * b[i], 0);

const capped = (score, cap) => (cap === null ? score : cap * Math.tanh(score / cap));
