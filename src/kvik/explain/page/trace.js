// The trace that is in the page, its tensors as numbers; and how figures are written.

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

export const count = (number) => number.toLocaleString("en-US");

// A noun with its number: "1 token", "1,128 tokens".
export const counted = (number, noun, nouns = `${noun}s`) => `${count(number)} ${number === 1 ? noun : nouns}`;

// Three digits and a unit: "4.20 G".
export function short(number, unit = "") {
  for (const [size, prefix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (number >= 0.9995 * size) return `${(number / size).toPrecision(3)} ${prefix}${unit}`;
  }
  return `${count(Math.round(number))}${unit && " "}${unit}`;
}

export const bytes = (number) => short(number, "B");

export const time = (seconds) => (seconds < 0.9995 ? `${digits(1000 * seconds, 3)} ms` : `${digits(seconds, 3)} s`);

// How many times as much: "12 ×", "1,234 ×".
export const times = (more, less) => `${digits(more / less, 2)} ×`;

// So many significant digits, and never fewer than stand before the point: 9.7, 97, 1,234.
export const digits = (number, least) =>
  number >= 10 ** least - 0.5 ? count(Math.round(number)) : number.toPrecision(least);

export const real = (number, digits = 3) =>
  Math.abs(number) < 10 ** -digits / 2 ? (0).toFixed(digits) : number.toFixed(digits).replace("-", "−");

export const percent = (part) => `${(100 * part).toFixed(part < 0.0995 ? 1 : 0)} %`;

// A token as it is shown in a sentence: most begin with a space that only matters where nothing else is there.
export const quoted = ({ text }) => `“${text.trim() || visible({ text })}”`;

// A token as it is shown in a picture, where blanks at its ends would be lost.
export const visible = ({ text }) => text.replace(/^ +| +$/g, (blanks) => "␣".repeat(blanks.length));

// Totals of the first steps of a lane, by name.
export function totals(steps, lane, last) {
  const sums = {};
  for (const step of steps.slice(0, last + 1)) {
    for (const [name, value] of Object.entries(step[lane])) sums[name] = (sums[name] ?? 0) + value;
  }
  return sums;
}
