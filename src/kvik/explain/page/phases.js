// Section 4: the first token against the rest, on one time line; and first tokens after longer prompts.

import { box, html, picture, stripes, svg, text, widthOf } from "kvik/draw.js";
import { bytes, count, counted, short, time, times } from "kvik/figures.js";
import { totals } from "kvik/trace.js";

export function build(figure, trace) {
  const { steps, first_tokens: firsts, num_prompt_tokens: numPrompt } = trace;
  const line = html("div", {});
  const sentence = html("p", { id: "phase-sentence" });
  const bars = html("div", {});
  figure.append(html("h3", {}, "This run, on one clock"), line, sentence);
  if (firsts.length) {
    figure.append(html("h3", {}, "Time to the first token, by the length of the prompt (measured here, prompts of random tokens)"), bars);
    figure.append(html("p", {}, growth(firsts)));
  }
  const [first, ...later] = steps.map((step) => step.with_cache);
  const texts = [
    `The first step computes ${counted(first.num_tokens, "token")} with ${short(first.multiply_adds)} multiply-adds and reads` +
      ` ${bytes(first.weight_bytes)} of weights: ${time(first.seconds)}.`,
  ];
  if (later.length) {
    const middle = median(later.map((step) => step.seconds));
    texts.push(
      ` A later step computes one token with ${short(later[0].multiply_adds)} multiply-adds, and reads ${bytes(later[0].weight_bytes)}` +
        ` of weights too: ${time(middle)} (median).`,
      first.num_tokens > 1
        ? ` So the prompt needs ${times(first.multiply_adds, later[0].multiply_adds)} the arithmetic of a later token, and took` +
            ` ${times(first.seconds, middle)} its time.`
        : " This prompt is one token, so its first step is like the others: the longer a prompt, the longer its first token takes.",
    );
  }
  sentence.textContent = texts.join("");

  function show(step) {
    const width = widthOf(figure);
    line.replaceChildren(timeline(trace, step, width, numPrompt));
    if (firsts.length) bars.replaceChildren(lengths(firsts, width));
  }

  return { show };
}

function timeline(trace, current, width, numPrompt) {
  const { steps } = trace;
  const lanes = [["with_cache", "with"], ["without", "without"]];
  const most = Math.max(...lanes.map(([lane]) => totals(steps, lane, steps.length - 1).seconds));
  const scale = (width - 2) / most;
  const id = "again-time";
  return picture(
    width,
    146,
    lanes.map(([lane, name]) => `${name}: first token after ${time(steps[0][lane].seconds)}, all after ${time(totals(steps, lane, steps.length - 1).seconds)}`).join("; "),
    stripes(id),
    lanes.map(([lane, name], index) => {
      const y = 20 + index * 62;
      let x = 0;
      const whole = totals(steps, lane, steps.length - 1).seconds;
      const blocks = steps.map((step, at) => {
        const [start, length] = [x, step[lane].seconds * scale];
        x += length;
        const colour = at === 0 ? "first" : "new";
        const fill = lane === "without" && at > 0 ? `url(#${id})` : `var(--${colour})`;
        return svg("rect", { x: start, y, width: Math.max(0.5, length - 0.8), height: 26, style: `fill:${fill}`, opacity: at > current ? 0.3 : 1 });
      });
      const prompt = counted(numPrompt, "token");
      return svg("g", {},
        text(0, y - 6, `${name}: ${lane === "with_cache" ? `${prompt} at once, then one by one` : "all again for each token"}`, { class: "small muted" }),
        blocks,
        text(0, y + 40, "prefill | decode", { class: "small muted" }),
        text(Math.max(whole * scale, 190), y + 40, time(whole), { class: "small", "text-anchor": "end" }),
      );
    }),
  );
}

function lengths(firsts, width) {
  const [label, line] = [52, 26];
  const most = Math.max(...firsts.map((each) => Math.max(each.first_s, each.later_s)));
  const room = width - label - 190;
  return picture(
    width,
    line * firsts.length + 22,
    firsts.map((each) => `${each.length} tokens: ${time(each.first_s)}, a later token ${time(each.later_s)}`).join("; "),
    firsts.map((each, at) => {
      const y = at * line;
      const first = (room * each.first_s) / most;
      return svg("g", {},
        text(label - 8, y + 16, count(each.length), { "text-anchor": "end" }),
        box(label, y + 3, Math.max(1, first), 11, "first", { rx: 1 }),
        box(label, y + 15, Math.max(1, (room * each.later_s) / most), 6, "new", { rx: 1 }),
        text(label + first + 8, y + 14, `${time(each.first_s)} · later ${time(each.later_s)}`, { class: "small muted" }),
      );
    }),
    text(label, line * firsts.length + 16, "thick: first token · thin: a later token", { class: "small muted" }),
  );
}

function growth(firsts) {
  const [short_, long] = [firsts[0], firsts.at(-1)];
  return (
    `A prompt of ${counted(long.length, "token")} takes ${times(long.first_s, short_.first_s)} as long to its first token as a prompt of` +
    ` ${counted(short_.length, "token")}; a later token after it takes ${times(long.later_s, short_.later_s)} as long, for it computes one row and reads` +
    ` what is kept. Users feel the first as waiting, the second as the speed of writing.`
  );
}

function median(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
