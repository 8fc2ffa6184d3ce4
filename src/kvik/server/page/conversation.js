// A conversation as a tree of turns: each may go on in several ways, and one path of it is shown.

let numbers = 0;

export class Conversation {
  constructor() {
    this.root = { children: [], chosen: 0 };
  }

  // The turns of the path that is shown, the first one first.
  get path() {
    const turns = [];
    for (let at = this.root; at.children.length; ) {
      at = at.children[at.chosen];
      turns.push(at);
    }
    return turns;
  }

  get last() {
    return this.path.at(-1) ?? this.root;
  }

  // A new turn behind another; from now on the path goes through it.
  add(parent, role, content = "") {
    const turn = { id: ++numbers, parent, role, content, children: [], chosen: 0, chosenBefore: parent.chosen };
    parent.chosen = parent.children.push(turn) - 1;
    return turn;
  }

  // Take the newest turn behind another away again; what was shown before it was added is shown.
  drop(turn) {
    turn.parent.children.splice(turn.parent.children.indexOf(turn), 1);
    turn.parent.chosen = turn.chosenBefore;
  }

  // Whether it has others beside it, and which one it is.
  siblings(turn) {
    return { count: turn.parent.children.length, at: turn.parent.chosen };
  }

  // Show the next or previous of the turns that stand beside one: which it is.
  step(turn, by) {
    const { count, at } = this.siblings(turn);
    turn.parent.chosen = (at + by + count) % count;
    return turn.parent.children[turn.parent.chosen];
  }

  // The turns above one, as messages.
  messagesBefore(turn, system) {
    const turns = [];
    for (let at = turn.parent; at.role; at = at.parent) turns.unshift(at);
    const messages = turns.map(({ role, content, calls }) => ({ role, content, ...(calls?.length && { tool_calls: calls }) }));
    return system ? [{ role: "system", content: system }, ...messages] : messages;
  }

  // The answer whose prompt is likeliest to begin like that of `turn`: of the same question before, or of one above it.
  answerBefore(turn) {
    const answered = (one) => one.role === "assistant" && one.responseId;
    for (let at = turn; at.role; at = at.parent) {
      const beside = at.parent.children.flatMap((one) => [one, ...one.children]).filter((one) => one !== turn && answered(one));
      if (beside.length) return beside.at(-1);
      if (at !== turn && answered(at)) return at;
    }
    return undefined;
  }
}
