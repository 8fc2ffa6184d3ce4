// Markdown as answers use it, made of elements and text alone: nothing that a model writes is ever read as HTML.

import { html } from "./draw.js";

const MOST_DEPTH = 6; // of lists and quotes within each other
const MOST_OPEN = 16; // marks of emphasis that wait for their ends
const MOST_COLUMNS = 64;
const SETTLED = 2; // lines after which it is certain what a block is

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: |$)/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?= |$)/;
const ALIGNMENTS = /^ {0,3}\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const LINK = /\[([^[\]\n]{1,300})\]\((https?:\/\/[^\s()<>]{1,2000})\)/y;
const ADDRESS = /https?:\/\/[^\s<>()"'`*\]]{1,2000}/y;
const WORD = /[\p{L}\p{N}]/u;

// Text that grows: what was added last can change how the last blocks look, and only those are made again.
export class Markdown {
  element = html("div", { class: "markdown" });
  length = 0;
  #rest = ""; // from the first block on that may still change
  #open = []; // the elements of those

  append(text) {
    if (!text) return;
    this.length += text.length;
    this.#rest += text;
    const lines = this.#rest.split("\n");
    const blocks = [...blocksOf(lines, 0)];
    for (const element of this.#open) element.remove();
    this.element.append(...blocks.map(({ element }) => element));
    const last = blocks.findLastIndex(({ line }) => line + SETTLED < lines.length);
    if (last > 0) this.#rest = lines.slice(blocks[last].line).join("\n");
    this.#open = blocks.slice(Math.max(0, last)).map(({ element }) => element);
  }
}

// The blocks of lines: {line, element}, where the first line of each is.
function* blocksOf(lines, depth) {
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const read = kindOf(lines, at, depth) ?? paragraph;
    const { element, end } = read(lines, at, depth);
    yield { line: at, element };
    at = end;
  }
}

// What reads the block that begins with a line; undefined where it can only be a paragraph's.
function kindOf(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return fenced;
  if (HEADING.test(line)) return heading;
  if (RULE.test(line)) return rule;
  if (depth < MOST_DEPTH && QUOTE.test(line)) return quote;
  if (depth < MOST_DEPTH && ITEM.test(line)) return list;
  if (isTable(lines, at)) return table;
  return undefined;
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end, depth)) end++;
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return { element: html("p", {}, inline(text)), end };
}

// Years that begin a line are no lists, nor are dashes.
function interrupts(lines, at, depth) {
  const kind = kindOf(lines, at, depth);
  if (kind !== list) return kind !== undefined;
  const [, indent, mark] = ITEM.exec(lines[at]);
  return (mark.length === 1 || Number.parseInt(mark) === 1) && lines[at].length > indent.length + mark.length + 1;
}

function fenced(lines, at) {
  const [, fence, name] = FENCE.exec(lines[at]);
  const isEnd = (line) => line.trim().length >= fence.length && line.trim() === fence[0].repeat(line.trim().length);
  let end = at + 1;
  while (end < lines.length && !isEnd(lines[end])) end++;
  const code = html("code", {}, lines.slice(at + 1, end).join("\n"));
  return { element: html("pre", { tabindex: 0, role: "group", "aria-label": `Code ${name.trim().slice(0, 40)}`.trim() }, code), end: end + 1 };
}

function heading(lines, at) {
  const [, marks] = HEADING.exec(lines[at]);
  const text = lines[at].trim().slice(marks.length).trim();
  return { element: html(`h${Math.min(6, marks.length + 2)}`, {}, inline(text)), end: at + 1 };
}

const rule = (_, at) => ({ element: html("hr"), end: at + 1 });

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const within = lines.slice(at, end).map((line) => line.trimStart().slice(1).replace(/^ /, ""));
  return { element: html("blockquote", {}, elementsOf(within, depth + 1)), end };
}

function list(lines, at, depth) {
  const [, indent, first] = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(first);
  const goesOn = (line) => {
    const found = ITEM.exec(line);
    return found && found[1].length < indent.length + 2 && /\d/.test(found[2]) === isOrdered && found[2].at(-1) === first.at(-1);
  };
  const items = [];
  let end = at;
  while (end < lines.length && goesOn(lines[end]) && !RULE.test(lines[end])) {
    const mark = ITEM.exec(lines[end])[0].length;
    const within = [lines[end].slice(mark).replace(/^ /, "")];
    for (end++; end < lines.length; end++) {
      const depthOf = lines[end].length - lines[end].trimStart().length;
      const isBlank = !lines[end].trim();
      if (!isBlank && depthOf < indent.length + 2 && (!within.at(-1).trim() || kindOf(lines, end, depth))) break;
      within.push(lines[end].slice(Math.min(depthOf, mark + 1)));
    }
    items.push(html("li", {}, elementsOf(within, depth + 1)));
  }
  return { element: html(isOrdered ? "ol" : "ul", isOrdered && first !== "1." ? { start: Number.parseInt(first) } : {}, items), end };
}

const elementsOf = (lines, depth) => [...blocksOf(lines, depth)].map(({ element }) => element);

const isTable = (lines, at) =>
  lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("|") && ALIGNMENTS.test(lines[at + 1]) &&
  cellsOf(lines[at]).length === cellsOf(lines[at + 1]).length;

function table(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const sides = cellsOf(lines[at + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "centre" : "right") : "left"));
  const row = (kind, line) => {
    const cells = cellsOf(line);
    return html("tr", {}, sides.map((side, column) => html(kind, { class: side, scope: kind === "th" && "col" }, inline(cells[column] ?? ""))));
  };
  const body = lines.slice(at + 2, end).map((line) => row("td", line));
  const made = html("table", {}, html("thead", {}, row("th", lines[at])), html("tbody", {}, body));
  return { element: html("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "Table" }, made), end };
}

function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/, MOST_COLUMNS).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

// A line's text with code, emphasis and links: strings and elements.
function inline(text) {
  const open = [{ mark: "", nodes: [] }]; // what is emphasised is within what it stands in
  const unclosed = new Set(); // lengths of backticks that have no end any more
  let plain = "";
  const top = () => open.at(-1).nodes;
  const flush = () => {
    if (plain) top().push(plain);
    plain = "";
  };
  const put = (node) => {
    flush();
    top().push(node);
  };
  const leave = () => {
    flush();
    const { mark, nodes } = open.pop();
    return { mark, nodes };
  };
  const close = (count) => {
    while (open.length > count + 1) {
      const { mark, nodes } = leave(); // it has no end: its mark is text
      top().push(mark, ...nodes);
    }
    const { mark, nodes } = leave();
    top().push(html(mark[0] === "~" ? "del" : mark.length === 2 ? "strong" : "em", {}, nodes));
  };
  for (let at = 0; at < text.length; ) {
    const letter = text[at];
    if (letter === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (letter === "`") {
      const size = runOf(text, at);
      const end = unclosed.has(size) ? -1 : endOfCode(text, at + size, size);
      if (end < 0) {
        unclosed.add(size);
        plain += text.slice(at, at + size);
        at += size;
      } else {
        put(html("code", {}, unpadded(text.slice(at + size, end))));
        at = end + size;
      }
    } else if (letter === "*" || letter === "_" || letter === "~") {
      const size = runOf(text, at);
      const [before, after] = [text[at - 1] ?? " ", text[at + size] ?? " "];
      const isWithin = letter === "_" && WORD.test(before) && WORD.test(after);
      let left = size > 3 || isWithin || (letter === "~" && size !== 2) ? 0 : size;
      let rest = size - left;
      for (let at = open.length - 1; left && /\S/.test(before) && at > 0; at--) {
        if (open[at].mark[0] !== letter || open[at].mark.length > left) continue;
        left -= open[at].mark.length;
        close(at);
      }
      while (left && /\S/.test(after) && open.length < MOST_OPEN) {
        flush();
        open.push({ mark: letter.repeat(left >= 2 ? 2 : 1), nodes: [] });
        left -= open.at(-1).mark.length;
      }
      rest += left;
      plain += letter.repeat(rest);
      at += size;
    } else {
      const found = linkAt(text, at);
      if (found) put(link(found));
      else plain += letter;
      at += found?.length ?? 1;
    }
  }
  while (open.length > 1) {
    const { mark, nodes } = leave();
    top().push(mark, ...nodes);
  }
  flush();
  return open[0].nodes;
}

function runOf(text, at) {
  let end = at;
  while (text[end] === text[at]) end++;
  return end - at;
}

function endOfCode(text, from, size) {
  for (let at = text.indexOf("`", from); at >= 0; at = text.indexOf("`", at)) {
    const found = runOf(text, at);
    if (found === size) return at;
    at += found;
  }
  return -1;
}

const unpadded = (code) => (code.startsWith(" ") && code.endsWith(" ") && code.trim() ? code.slice(1, -1) : code);

// A link that begins at a place: {name, address, length}. An image is one too: nothing is fetched.
function linkAt(text, at) {
  if (text[at] === "[" || (text[at] === "!" && text[at + 1] === "[")) {
    LINK.lastIndex = at + Number(text[at] === "!");
    const found = LINK.exec(text);
    return found && { name: found[1], address: found[2], length: LINK.lastIndex - at };
  }
  if (text[at] !== "h" || WORD.test(text[at - 1] ?? " ")) return undefined;
  ADDRESS.lastIndex = at;
  const address = ADDRESS.exec(text)?.[0].replace(/[.,;:!?]{1,8}$/, "");
  return address && { name: address, address, length: address.length };
}

// Where it leads is seen before it is followed; whoever is there learns nothing of this page.
function link({ name, address }) {
  if (!URL.canParse(address)) return name;
  const { host, href } = new URL(address);
  const told = name.includes(host) ? undefined : html("small", {}, ` (${host})`);
  return html("a", { href, rel: "noopener noreferrer nofollow", target: "_blank" }, name, told);
}
