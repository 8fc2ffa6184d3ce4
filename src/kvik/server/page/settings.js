// How an answer is written: system prompt, sampling, schema, tools.

import { html } from "./draw.js";

const FIRST = [
  { name: "max_tokens", label: "Most tokens", value: 256, min: 1, step: 1 },
  { name: "temperature", label: "Temperature", value: 0, min: 0, max: 2, step: 0.1 },
];
const SAMPLING = [
  { name: "top_p", label: "Top p", min: 0.05, max: 1, step: 0.05 },
  { name: "top_k", label: "Top k", min: 0, step: 1 },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05 },
  { name: "seed", label: "Seed", step: 1 },
];

export function settings() {
  const system = html("textarea", { rows: 3, name: "system", placeholder: "You are a helpful assistant." });
  const schema = html("textarea", { rows: 3, name: "schema", placeholder: '{"type": "object", …}', spellcheck: "false" });
  const tools = html("textarea", { rows: 3, name: "tools", placeholder: '[{"type": "function", …}]', spellcheck: "false" });
  const inputs = ({ label, ...given }) => [label, html("input", { type: "number", placeholder: " ", ...given })];
  const [first, sampling] = [FIRST.map(inputs), SAMPLING.map(inputs)];
  const field = (name, input, note) => html("label", { class: "field" }, name, input, note && html("small", {}, note));
  const row = (numbers) => html("div", { class: "numbers" }, numbers.map(([label, input]) => field(label, input)));
  const fold = (name, ...parts) => html("details", { class: "fold" }, html("summary", {}, name), parts);
  const element = html(
    "aside",
    { class: "settings", "aria-label": "Settings" },
    html("details", { open: innerWidth > 1100 }, html("summary", {}, "Settings"),
      field("System prompt", system),
      row(first),
      fold("Sampling", row(sampling)),
      fold("JSON schema", field("A schema that the answer follows", schema, "One that cannot be followed is refused.")),
      fold("Tools", field("Functions that the model may call", tools, "Calls are shown, not made."))),
  );

  // The fields of the request. Raises an `Error` in words.
  function fields() {
    const found = {};
    for (const [, input] of [...first, ...sampling]) if (input.value !== "") found[input.name] = Number(input.value);
    const wanted = parsed(schema.value, "The JSON schema");
    if (wanted !== undefined) found.response_format = { type: "json_schema", json_schema: { name: "answer", schema: wanted } };
    const given = parsed(tools.value, "The list of tools");
    if (given !== undefined) found.tools = given;
    return found;
  }

  return { element, fields, system: () => system.value.trim() };
}

function parsed(text, name) {
  if (!text.trim()) return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name} is not JSON: ${error.message}`);
  }
}
