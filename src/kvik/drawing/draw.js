// Making elements, and strips of cells whose colour tells a number.

const SVG = "http://www.w3.org/2000/svg";
const LEVELS = 10; // of colour on each side of zero

export const svg = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);
export const html = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (name === "style") element.style.cssText = value; // a strict policy lets no attribute do it
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

// A picture with a description for those who do not see it.
export function picture(width, height, description, ...children) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": description }, ...children);
}

export const text = (x, y, content, attributes = {}) => svg("text", { x, y, ...attributes }, content);

export const box = (x, y, width, height, colour, attributes = {}) =>
  svg("rect", { x, y, width: Math.max(0, width), height, style: `fill:var(--${colour})`, ...attributes });

// Cells of many rows of numbers as few paths, one for each level of colour: {x, y, row, cell, height} each.
export function heat(strips, largest) {
  const paths = new Map();
  for (const { x, y, row, cell, height } of strips) {
    row.forEach((value, i) => {
      const level = Math.max(-LEVELS, Math.min(LEVELS, Math.round((LEVELS * value) / largest)));
      if (level === 0) return;
      const d = `M${(x + i * cell).toFixed(2)} ${y}h${cell.toFixed(2)}v${height}h${(-cell).toFixed(2)}z`;
      paths.set(level, (paths.get(level) ?? "") + d);
    });
  }
  return [...paths].map(([level, d]) => svg("path", { d, style: `fill:${colour(level)}` }));
}

function colour(level) {
  const part = Math.round((100 * Math.abs(level)) / LEVELS);
  return `color-mix(in oklab, var(--${level < 0 ? "minus" : "plus"}) ${part}%, var(--panel))`;
}

// The value below which nearly all magnitudes lie, so that one outlier does not pale the others.
export function scaleOf(rows) {
  const magnitudes = rows.flatMap((row) => Array.from(row, Math.abs)).sort((a, b) => a - b);
  return magnitudes[Math.floor(0.98 * (magnitudes.length - 1))] || 1;
}

// Stripes, which tell work that is done again apart without colour.
export function stripes(id, colour = "again") {
  return svg(
    "defs",
    {},
    svg(
      "pattern",
      { id, width: 4, height: 4, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      svg("rect", { width: 4, height: 4, style: `fill:var(--${colour === "again" ? "again-tint" : "panel"})` }),
      svg("rect", { width: 2, height: 4, style: `fill:var(--${colour})` }),
    ),
  );
}

export function shorten(content, most) {
  const letters = [...content];
  return letters.length > most ? `${letters.slice(0, Math.max(1, most - 1)).join("")}…` : content;
}

export const widthOf = (element, least = 240) => {
  const style = getComputedStyle(element);
  return Math.max(least, element.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight));
};

// A token in a box; `kind` is kept, copied, new or again.
export const token = ({ text: content }, kind = "") => html("span", { class: `token ${kind}` }, content);
