// How cells looked some minutes ago: each change is kept with its time, what was before and what came.

const MOST = 1 << 18; // changes
const SECONDS = 300;

export class Replay {
  constructor(looks) {
    this.looks = looks; // as they are now
    this.changes = []; // [at_s, block, before, after], the oldest first
    this.began_s = undefined;
    this.newest = new Map(); // when each block last changed
  }

  // All cells at once, as `look` tells them; the first time there is nothing before it.
  look(look, at_s) {
    const isFirst = this.began_s === undefined;
    this.began_s ??= at_s;
    for (let block = 0; block < this.looks.length; block++) {
      if (isFirst) this.looks[block] = look(block);
      else this.set(block, look(block), at_s);
    }
  }

  set(block, look, at_s) {
    const before = this.looks[block];
    if (before === look) return;
    this.looks[block] = look;
    if (this.began_s === undefined) return;
    this.changes.push([at_s, block, before, look]);
    this.newest.set(block, at_s);
    if (this.changes.length > MOST) this.changes.splice(0, MOST >> 2);
  }

  // How long ago it begins.
  seconds(now_s) {
    const first_s = this.changes.length > MOST / 2 ? this.changes[0][0] : this.began_s ?? now_s;
    return Math.min(SECONDS, now_s - first_s);
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
