"use strict";
// The same question at two places: two steps, or two runs. Rewards that flipped, lengths that changed, the first
// token that differs.

const ORDERS = { change: "change of reward", longer: "change of length", flips: "completions that flipped", reward: "reward at B" };
const KINDS = { "": "all questions", gained: "gained: wrong at A, right at B", lost: "lost: right at A, wrong at B", same: "neither" };

class Compare {
  constructor(app, node) {
    this.app = app;
    this.node = node;
    this.sides = null;
    this.of = 0; // 0: completions of training, 1: answers to held-out questions
    this.kind = "";
    this.sort = "change";
    this.down = true;
    this.limit = ""; // reward from which a completion is right; "": the middle of those seen
    this.controls = el("form", { class: "bar filters", onsubmit: (event) => event.preventDefault() });
    this.summary = el("p", { role: "status", id: "summary" });
    this.list = new List({
      rowHeight: 58, label: "questions",
      render: (index, row) => this.render(index, row), onChoose: (index) => this.app.run(() => this.open(index)),
    });
    this.detail = el("article", { class: "detail", tabindex: "-1" });
    append(node, [this.controls, this.summary, el("div", { class: "split" }, el("div", { class: "side" }, this.list.node), this.detail)]);
    this.again = debounce(() => this.app.run(() => this.load()), 200);
  }
  async show() {
    if (!this.sides) await this.choose();
    if (this.sides) await this.load();
    else replace(this.detail, el("p", { class: "empty" }, "These runs have no logged completions (log_samples_steps)."));
  }
  async update() {
    const version = this.sides && JSON.stringify(this.sides.map((side) => this.app.runs[side.run].versions.rollouts));
    if (version !== this.version) await this.show();
  }
  // Of the chosen runs the two that share most questions. Else of one run the first and the last evaluation, or the
  // first and the last third of its steps.
  async choose() {
    const with_rows = this.app.chosen.filter((run) => this.app.runs[run].versions.rollouts[1] > 0);
    const runs = with_rows.length ? with_rows : [this.app.firstWithRollouts()].filter((run) => run !== null);
    if (!runs.length) return;
    const data = await Promise.all(runs.slice(0, 6).map((run) => this.app.source.rows(run)));
    let [most, pair] = [0, null];
    data.forEach((a, i) => data.slice(i + 1).forEach((b, k) => {
      const known = new Set(a.questions);
      const shared = stepsOf(a, 0).length && stepsOf(b, 0).length ? b.questions.filter((key) => known.has(key)).length : 0;
      if (shared > most) [most, pair] = [shared, [i, i + 1 + k]];
    }));
    if (pair) {
      this.of = 0;
      this.sides = pair.map((place) => {
        const steps = stepsOf(data[place], 0);
        return { run: runs[place], from: steps[0] ?? 0, to: steps.at(-1) ?? 0 };
      });
      return;
    }
    const asked = stepsOf(data[0], 1);
    this.of = asked.length > 1 ? 1 : 0;
    if (this.of) {
      this.sides = [asked[0], asked.at(-1)].map((step) => ({ run: runs[0], from: step, to: step }));
    } else {
      const all = stepsOf(data[0], 0);
      const cut = all[Math.max(0, Math.ceil(all.length / 3) - 1)];
      this.sides = [{ run: runs[0], from: all[0], to: cut }, { run: runs[0], from: all[Math.floor((all.length * 2) / 3)], to: all.at(-1) }];
    }
  }
  // Called by other views: two steps, and the question to open.
  set(a, b, key, heldOut) {
    this.of = heldOut;
    this.sides = [a, b].map((side) => ({ run: side.run, from: side.step, to: side.step }));
    this.wanted = key;
    this.kind = "";
  }
  async setOf(of) {
    this.of = of;
    for (const side of this.sides) {
      const steps = stepsOf(await this.app.source.rows(side.run), of);
      [side.from, side.to] = [steps[0] ?? 0, steps.at(-1) ?? 0];
    }
    const [a, b] = this.sides;
    if (of && a.run === b.run) [a.to, b.from] = [a.from, b.to]; // the first and the last evaluation
    await this.load();
  }
  async load() {
    const turn = (this.turn = (this.turn || 0) + 1);
    const sides = this.sides.map((side) => ({ ...side }));
    const version = JSON.stringify(this.sides.map((side) => this.app.runs[side.run].versions.rollouts));
    const data = await Promise.all(sides.map((side) => this.app.source.rows(side.run)));
    if (turn !== this.turn) return; // a later load is on its way
    [this.data, this.version, this.shown] = [data, version, sides]; // of one moment: nothing waits until the list is drawn
    this.texts = sides.map((side) => new Texts(this.app.source, side.run, () => this.list.refresh()));
    this.drawControls();
    this.match();
    this.apply(true);
  }
  drawControls() {
    const runs = this.app.runs.map((run, i) => [i, run.name]);
    const side = (k) => {
      const own = this.sides[k];
      const step = (name) => el("input", {
        type: "number", class: "narrow", "aria-label": `${"AB"[k]} ${name}`, value: own[name], min: 0,
        oninput: (event) => { own[name] = Number(event.target.value); this.again(); },
      });
      return labelled("AB"[k], select(runs, own.run, async (value) => {
        const run = Number(value);
        const steps = stepsOf(await this.app.source.rows(run), this.of);
        Object.assign(own, steps.length ? { run, from: steps[0], to: steps.at(-1) } : { run });
        this.app.run(() => this.load());
      }, { id: `side-${"ab"[k]}` }), " steps ", step("from"), step("to"));
    };
    if (this.controls.contains(document.activeElement) && document.activeElement.type === "number") return; // being typed
    replace(this.controls,
      labelled("of", select([[0, "training"], [1, "held-out questions"]], this.of, (value) => this.app.run(() => this.setOf(Number(value))), { id: "compare-of" })),
      side(0), side(1),
      labelled("right from reward", el("input", {
        type: "number", step: "any", class: "narrow", id: "right-from", value: this.limit, placeholder: number(this.middle()),
        oninput: (event) => { this.limit = event.target.value; this.match(); this.apply(); },
      })),
      labelled("show", select(Object.entries(KINDS), this.kind, (value) => { this.kind = value; this.apply(); }, { id: "kind" })),
      labelled("sort", select(Object.entries(ORDERS), this.sort, (value) => { this.sort = value; this.apply(); }, { id: "compare-sort" }),
        el("button", { type: "button", "aria-label": "direction", onclick: (event) => {
          this.down = !this.down;
          event.target.textContent = this.down ? "↓" : "↑";
          this.apply();
        } }, this.down ? "↓" : "↑")));
  }
  bounds() {
    let [low, high] = [Infinity, -Infinity];
    for (const rows of this.data) {
      for (const value of rows.columns.reward) {
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    return [low, high];
  }
  middle() {
    const [low, high] = this.bounds();
    return low <= high ? (low + high) / 2 : 0.5;
  }
  match() {
    const sides = this.shown.map((side, k) => {
      const { columns, questions } = this.data[k];
      const found = new Map();
      for (let row = 0; row < this.data[k].count; row++) {
        if (columns.held_out[row] !== this.of || columns.step[row] < side.from || columns.step[row] > side.to) continue;
        const key = questions[columns.question[row]];
        if (!found.has(key)) found.set(key, []);
        found.get(key).push(row);
      }
      for (const rows of found.values()) rows.sort((a, b) => columns.step[a] - columns.step[b] || columns.row[a] - columns.row[b]);
      return found;
    });
    this.range = this.bounds();
    const limit = this.limit === "" ? this.middle() : Number(this.limit);
    this.right = (k, row) => this.data[k].columns.reward[row] >= limit - 1e-6;
    this.items = [];
    for (const [key, a] of sides[0]) {
      const b = sides[1].get(key);
      if (!b) continue;
      const rows = [a, b];
      const reward = rows.map((own, k) => average(own.map((row) => this.data[k].columns.reward[row])));
      const length = rows.map((own, k) => average(own.map((row) => this.length(k, row))));
      const share = rows.map((own, k) => own.filter((row) => this.right(k, row)).length / own.length);
      let flips = 0;
      for (let i = 0; i < Math.min(a.length, b.length); i++) flips += this.right(0, a[i]) !== this.right(1, b[i]);
      const kind = share[0] < 0.5 && share[1] >= 0.5 ? "gained" : share[0] >= 0.5 && share[1] < 0.5 ? "lost" : "same";
      this.items.push({ key, rows, reward, length, share, flips, kind });
    }
    const counts = { gained: 0, lost: 0 };
    this.items.forEach((item) => { counts[item.kind] += 1; });
    const mean = (name, k) => number(average(this.items.map((item) => item[name][k])), name === "length" ? 1 : 3);
    replace(this.summary,
      el("b", {}, `${this.items.length.toLocaleString("en")} questions on both sides`),
      this.items.length > 0 && [`: ${counts.gained} gained, ${counts.lost} lost; mean reward ${mean("reward", 0)} → ${mean("reward", 1)}, `
        + `mean length ${mean("length", 0)} → ${mean("length", 1)}. Right: at least half of a question's completions have a reward of ${number(limit)} or more.`]);
  }
  length(k, row) {
    const { length, characters } = this.data[k].columns;
    return length[row] < 0 ? characters[row] : length[row];
  }
  // again: the rows are others, so the detail is drawn anew.
  apply(again = false) {
    const keyOf = {
      change: (item) => item.reward[1] - item.reward[0],
      longer: (item) => item.length[1] - item.length[0],
      flips: (item) => item.flips,
      reward: (item) => item.reward[1],
    }[this.sort];
    const sign = this.down ? -1 : 1;
    this.order = [...this.items.keys()].filter((i) => !this.kind || this.items[i].kind === this.kind);
    const keys = this.items.map(keyOf);
    this.order.sort((a, b) => (Number.isNaN(keys[a]) ? 1 : Number.isNaN(keys[b]) ? -1 : sign * (keys[a] - keys[b]) || a - b));
    this.list.chosen = this.order.findIndex((item) => this.items[item].key === this.wanted);
    this.list.setCount(this.order.length);
    if (!this.order.length) replace(this.detail, el("p", { class: "empty" }, this.items.length ? "No such question."
      : "No question is on both sides. Widen the steps, or compare two runs on the same data."));
    else if (this.list.chosen < 0 || again) this.list.choose(Math.max(0, this.list.chosen));
  }
  render(index, node) {
    const item = this.items[this.order[index]];
    const text = this.texts[0].of(item.rows[0][0]);
    const line = el("div", { class: "preview", dir: "auto" });
    if (text) appendLine(line, text.question);
    else line.append("…");
    const change = item.length[1] - item.length[0];
    const strips = item.rows.map((rows, k) => strip(rows.map((row) => this.data[k].columns.reward[row]), this.range));
    append(node, [el("div", { class: "facts" },
      item.kind !== "same" && el("span", { class: `kind kind-${item.kind}` }, item.kind),
      strips[0], el("span", {}, "→"), strips[1],
      el("span", {}, `${number(item.reward[0], 2)} → ${number(item.reward[1], 2)}`),
      el("span", { class: "quiet" }, `length ${signed(Math.round(change))}`)), line]);
  }
  async open(index) {
    const item = this.items[this.order[index]];
    this.wanted = item.key;
    const { shown, data } = this;
    const texts = await Promise.all(shown.map((side, k) => this.app.source.texts(side.run, item.rows[k].slice(0, 64), true)));
    if (this.wanted !== item.key || this.shown !== shown) return;
    const flipped = item.rows[0].findIndex((row, i) => i < Math.min(64, item.rows[1].length) && this.right(0, row) !== this.right(1, item.rows[1][i]));
    const chosen = [Math.max(0, flipped), Math.max(0, flipped)].map((place, k) => Math.min(place, texts[k].length - 1));
    const pair = el("div", { class: "pair" });
    const choices = shown.map((side, k) => select(
      item.rows[k].slice(0, 64).map((row, i) => [i, this.name(k, row)]), chosen[k], (value) => { chosen[k] = Number(value); draw(); },
      { id: `pair-${"ab"[k]}`, "aria-label": `completion of ${"AB"[k]}` }));
    const draw = async () => {
      const rows = chosen.map((place, k) => item.rows[k][place]);
      const own = chosen.map((place, k) => texts[k][place]);
      const tokens = this.of ? [null, null] : await Promise.all(rows.map((row, k) => this.app.source.tokens(
        shown[k].run, data[k].columns.step[row], data[k].columns.row[row])));
      if (this.shown !== shown) return;
      const of_tokens = tokens.every((one, k) => one && one.texts && one.texts.join("").startsWith(own[k].completion.slice(0, 200)));
      const pieces = of_tokens ? tokens.map((one) => one.texts) : own.map((one) => words(one.completion));
      const first = firstDifference(...pieces);
      const unit = of_tokens ? "token" : "word";
      replace(pair, el("p", { class: "quiet first" }, first === null ? "The two completions are the same."
        : first === 0 ? `They differ from the first ${unit} on.`
        : `They are the same up to ${unit} ${first}; the first ${unit} that differs is marked.`),
        rows.map((row, k) => el("section", { class: "card" },
          el("header", {}, el("b", {}, "AB"[k]), choices[k], pill(this.data[k].columns.reward[row], this.range),
            el("span", { class: "quiet" }, `A ${signed(this.data[k].columns.advantage[row])}, length ${this.length(k, row)}`)),
          el("div", { class: "body" }, differing(pieces[k], first)))));
    };
    await draw();
    if (this.wanted !== item.key || this.shown !== shown) return;
    replace(this.detail, question_and_gold(texts[0][0]), pair);
    this.detail.scrollTop = 0;
  }
  name(k, row) {
    const { step, row: place, reward } = this.data[k].columns;
    return `step ${step[row]}, row ${place[row]}, reward ${number(reward[row])}`;
  }
}

// Steps with completions of training (of: 0) or with answers to held-out questions (1).
function stepsOf(rows, of) {
  const { step, held_out: heldOut } = rows.columns;
  return [...new Set(step.filter((_, row) => heldOut[row] === of))].sort((a, b) => a - b);
}

function words(text) {
  return text.match(/\s+|[\p{L}\p{N}_]{1,64}|([^\s])\1*/gsu) || [];
}

// Place of the first piece that differs; null: all are equal.
function firstDifference(a, b) {
  const shorter = Math.min(a.length, b.length);
  for (let i = 0; i < shorter; i++) if (a[i] !== b[i]) return i;
  return a.length === b.length ? null : shorter;
}

// A text of pieces: the common beginning faint, the first that differs marked.
function differing(pieces, first) {
  if (first === null) return longText(pieces.join(""), appendMarked);
  const node = el("div", { class: "text differing", dir: "auto" });
  appendText(append(node, [el("span", { class: "common" })]).lastChild, pieces.slice(0, first).join("").slice(-FIRST_CHARACTERS));
  const mark = el("mark", { class: "difference" });
  node.append(first < pieces.length ? appendText(mark, pieces[first]) : append(mark, ["(ends here)"]));
  node.append(longText(pieces.slice(first + 1).join("") || " ", appendMarked, { class: "inline" }));
  return node;
}
