// How figures and tokens are written.

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

export const percent = (part) => `${(100 * part).toFixed(part && part < 0.0995 ? 1 : 0)} %`;

// A token as it is shown in a sentence: most begin with a space that only matters where nothing else is there.
export const quoted = ({ text }) => `“${text.trim() || visible({ text })}”`;

// A token as it is shown in a picture, where blanks at its ends would be lost.
export const visible = ({ text }) => text.replace(/^ +| +$/g, (blanks) => "␣".repeat(blanks.length));
