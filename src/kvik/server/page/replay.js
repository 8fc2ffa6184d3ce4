// How cells looked some minutes ago: each change is kept with its time, what was before and what came, and each flash.

const MOST = 1 << 18; // changes
const MOST_FLASHES = 1 << 16;
const SECONDS = 300;
const DROPPED = 1 << 12; // at once

export class Replay {
  constructor(looks) {
    this.looks = looks; // as they are now
    this.changes = []; // [at_s, block, before, after], the oldest first
    this.flashes = []; // [at_s, block, kind]
    this.began_s = undefined;
    this.newest = new Map(); // when each block last changed
  }

  // From now on changes are kept; before the first time there is nothing.
  begin(at_s) {
    this.began_s ??= at_s;
  }

  set(block, look, at_s) {
    const before = this.looks[block];
    if (before === look) return;
    this.looks[block] = look;
    if (this.began_s === undefined) return;
    this.changes.push([at_s, block, before, look]);
    this.newest.set(block, at_s);
    if (this.changes.length > MOST) this.drop(MOST >> 2);
    else if (this.changes.length > DROPPED && this.changes[DROPPED][0] < at_s - SECONDS) this.drop(DROPPED);
  }

  flash(block, kind, at_s) {
    if (this.began_s === undefined) return;
    this.flashes.push([at_s, block, kind]);
    if (this.flashes.length > MOST_FLASHES) this.flashes.splice(0, MOST_FLASHES >> 2);
  }

  // Forget the oldest.
  drop(number) {
    this.began_s = this.changes[number - 1][0];
    this.changes.splice(0, number);
    this.flashes.splice(0, behind(this.flashes, this.began_s));
  }

  // What came after one moment, up to another: changes and flashes.
  between(from_s, to_s) {
    const cut = (list) => list.slice(behind(list, from_s), behind(list, to_s));
    return { changes: cut(this.changes), flashes: cut(this.flashes) };
  }

  // How long ago it begins.
  seconds(now_s) {
    return Math.min(SECONDS, now_s - (this.began_s ?? now_s));
  }

  changedAt(block) {
    return this.newest.get(block);
  }

  // All looks at a moment; as they are now where it is not given.
  at(moment_s) {
    if (moment_s === undefined) return this.looks;
    const looks = this.looks.slice();
    for (let at = this.changes.length - 1; at >= 0 && this.changes[at][0] > moment_s; at--) looks[this.changes[at][1]] = this.changes[at][2];
    return looks;
  }
}

// Where what came after a moment begins, in a list by time.
function behind(list, moment_s) {
  let [low, high] = [0, list.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (list[middle][0] > moment_s) high = middle;
    else low = middle + 1;
  }
  return low;
}
