// The trace that is in the page, its tensors as numbers, and sums over its steps.

export function readTrace() {
  const trace = JSON.parse(document.getElementById("trace").textContent);
  trace.hidden = tensor(trace.hidden);
  for (const layer of trace.layers) {
    for (const name of ["queries", "keys", "values"]) layer[name] = tensor(layer[name]);
  }
  return trace;
}

// {shape, at(...index)} of base64, float32 or float16, little-endian.
export function tensor({ shape, dtype, data }) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const count = shape.reduce((product, size) => product * size, 1);
  const numbers = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    numbers[i] = dtype === "float16" ? half(view.getUint16(2 * i, true)) : view.getFloat32(4 * i, true);
  }
  const width = shape.at(-1);
  // The innermost row of an array, as a view of its numbers.
  const row = (...index) => {
    let at = 0;
    for (let axis = 0; axis < shape.length - 1; axis++) at = at * shape[axis] + index[axis];
    return numbers.subarray(at * width, (at + 1) * width);
  };
  return { shape, row };
}

// IEEE 754 binary16: a sign, 5 bits of exponent, 10 of fraction.
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

// Totals of the first steps of a lane, by name.
export function totals(steps, lane, last) {
  const sums = {};
  for (const step of steps.slice(0, last + 1)) {
    for (const [name, value] of Object.entries(step[lane])) sums[name] = (sums[name] ?? 0) + value;
  }
  return sums;
}
