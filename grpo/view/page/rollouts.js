"use strict";
// Completions by step and question: filtered, sorted, one group beside the next.

const SORTS = {
  step: "step", reward: "reward", advantage: "advantage", length: "length", spread: "spread of rewards in the group",
};

class Rollouts {
  constructor(app, node) {
    this.app = app;
    this.run = null;
    this.mode = "groups";
    this.filter = { of: "0", from: "", to: "", low: "", high: "", short: "", long: "", finish: "", text: "", tokens: false };
    this.sort = "step";
    this.down = true;
    this.by = "reward"; // a column: "reward" or "reward:NAME"
    this.found = null; // rows that have the text, or null
    this.figure = "";
    this.openRow = null;
    this.maths = false; // TeX as symbols
    this.controls = el("form", { class: "bar filters", onsubmit: (event) => event.preventDefault() });
    this.count = el("p", { class: "quiet", role: "status", id: "count" });
    this.list = new List({
      rowHeight: 58, label: "groups or completions",
      render: (index, row) => this.render(index, row), onChoose: (index) => this.app.run(() => this.open(index)),
    });
    this.detail = el("article", { class: "detail", tabindex: "-1" });
    append(node, [this.controls, el("div", { class: "split" }, el("div", { class: "side" }, this.count, this.list.node), this.detail)]);
    this.search = debounce(() => this.app.run(() => this.find()), 250);
    this.refilter = debounce(() => this.apply(), 120);
  }
  async show() {
    if (this.run === null || !this.app.runs[this.run]) this.run = this.app.firstWithRollouts();
    await this.load();
  }
  async update() {
    if (this.run === null) return this.show();
    if (this.version !== this.versionOf()) await this.load(true);
  }
  versionOf() {
    return this.run === null ? "" : `${this.run} ${this.app.runs[this.run].versions.rollouts} ${this.app.runs[this.run].versions.tokens}`;
  }
  async load(again = false) {
    if (this.run === null) {
      replace(this.detail, el("p", { class: "empty" }, "These runs have no logged completions (log_samples_steps)."));
      return;
    }
    const [run, version] = [this.run, this.versionOf()];
    const [rows, places] = await Promise.all([this.app.source.rows(run), this.app.source.tokenRows(run)]);
    if (run !== this.run) return; // another run was chosen meanwhile
    // nothing waits from here on: rows, texts and list are of one run
    again = again && this.rows.generation === rows.generation; // else rows have other numbers
    const offered = this.offers();
    [this.rows, this.version] = [rows, version];
    this.withTokens = new Set();
    for (let i = 0; i < places.length; i += 2) this.withTokens.add(`${places[i]}:${places[i + 1]}`);
    if (!again) {
      this.texts = new Texts(this.app.source, this.run, () => this.list.refresh());
      this.openRow = null;
      this.found = null;
    }
    if (!again || offered !== this.offers()) this.drawControls();
    this.apply();
    if (this.filter.text) this.search();
    if (!this.order.length) replace(this.detail, el("p", { class: "empty" }, "No completions."));
  }
  // What the controls depend on; a filter that is not offered does not act.
  offers() {
    if (!this.rows) return "";
    const { held_out: heldOut } = this.rows.columns;
    const [trained, answers] = [heldOut.includes(0), heldOut.includes(1)];
    if (!answers) this.filter.of = "0";
    else if (!trained) this.filter.of = "1";
    if (!this.withTokens || !this.withTokens.size) this.filter.tokens = false;
    return JSON.stringify([answers, trained, this.filter.tokens, this.withTokens && this.withTokens.size > 0, this.rows.rewards, this.rows.finishes]);
  }
  setRun(run) {
    this.run = run;
    return this.app.run(() => this.load());
  }
  drawControls() {
    const input = (name, label, attributes = {}) => el("input", {
      "aria-label": label, placeholder: label, value: this.filter[name], id: `filter-${name}`, ...attributes,
      oninput: (event) => {
        this.filter[name] = event.target.value;
        if (name === "text") this.search();
        else this.refilter();
      },
    });
    const digits = { type: "number", step: "any", class: "narrow" };
    const rewards = [["reward", "sum"], ...this.rows.rewards.map((name) => [`reward:${name}`, shortName(name)])];
    const again = () => this.apply();
    replace(this.controls,
      labelled("run", select(this.app.runs.map((run, i) => [i, run.name]), this.run, (value) => this.setRun(Number(value)), { id: "run" })),
      this.rows.columns.held_out.includes(1) && labelled("of", select([["0", "training"], ["1", "held-out questions"], ["", "both"]],
        this.filter.of, (value) => { this.filter.of = value; again(); }, { id: "of" })),
      labelled("list", select([["groups", "groups"], ["rows", "completions"]], this.mode, (value) => { this.mode = value; again(); }, { id: "mode" })),
      labelled("text", input("text", "text in question, completion, gold", { type: "search", class: "wide" })),
      labelled("steps", input("from", "from", digits), input("to", "to", digits)),
      labelled("reward", rewards.length > 2 ? select(rewards, this.by, (value) => { this.by = value; again(); }, { id: "by" }) : null,
        input("low", "min", digits), input("high", "max", digits)),
      labelled("length", input("short", "min", digits), input("long", "max", digits)),
      labelled("finish", select([["", "any"], ...this.rows.finishes.map((name) => [name, name])], this.filter.finish,
        (value) => { this.filter.finish = value; again(); }, { id: "finish" })),
      this.withTokens.size > 0 && labelled("with token figures", el("input", {
        type: "checkbox", id: "filter-tokens", checked: this.filter.tokens,
        onchange: (event) => { this.filter.tokens = event.target.checked; again(); },
      })),
      labelled("TeX as symbols", el("input", {
        type: "checkbox", id: "maths", checked: this.maths,
        onchange: (event) => { this.maths = event.target.checked; this.list.choose(this.list.chosen); },
      })),
      labelled("sort", select(Object.entries(SORTS), this.sort, (value) => { this.sort = value; again(); }, { id: "sort" }),
        el("button", { type: "button", id: "direction", "aria-label": "direction", onclick: (event) => {
          this.down = !this.down;
          event.target.textContent = this.down ? "↓" : "↑";
          again();
        } }, this.down ? "↓" : "↑")));
  }
  async find() {
    const [run, { text }] = [this.run, this.filter];
    const found = text ? new Set(await this.app.source.search(run, text)) : null;
    if (text !== this.filter.text || run !== this.run) return; // a later request is on its way
    this.found = found;
    this.apply();
  }
  // Length in tokens, or in characters where an earlier version logged no tokens.
  length(row) {
    const { length, characters } = this.rows.columns;
    return length[row] < 0 ? characters[row] : length[row];
  }
  matches() {
    const { step, row: place, held_out: heldOut, finish, [this.by]: reward } = { ...this.rows.columns, [this.by]: this.rows.columns[this.by] || this.rows.columns.reward };
    const limit = (text, otherwise) => (text === "" || Number.isNaN(Number(text)) ? otherwise : Number(text));
    const f = this.filter;
    const [from, to] = [limit(f.from, -Infinity), limit(f.to, Infinity)];
    const [low, high] = [limit(f.low, -Infinity), limit(f.high, Infinity)];
    const [short, long] = [limit(f.short, -Infinity), limit(f.long, Infinity)];
    const wanted = f.finish ? this.rows.finishes.indexOf(f.finish) : -1;
    const anyReward = f.low === "" && f.high === "";
    const order = [];
    for (let row = 0; row < this.rows.count; row++) {
      if (f.of !== "" && heldOut[row] !== Number(f.of)) continue;
      if (step[row] < from || step[row] > to) continue;
      if (!anyReward && !(reward[row] >= low - 1e-6 && reward[row] <= high + 1e-6)) continue;
      if (wanted >= 0 && finish[row] !== wanted) continue;
      const length = this.length(row);
      if (length < short || length > long) continue;
      if (this.found && !this.found.has(row)) continue;
      if (f.tokens && (heldOut[row] || !this.withTokens.has(`${step[row]}:${place[row]}`))) continue;
      order.push(row);
    }
    return order;
  }
  apply() {
    const rows = this.matches();
    const { settings } = this.app.runs[this.run];
    this.groups = groupsOf(this.rows, (settings && Number(settings.num_generations)) || 0);
    const column = this.rows.columns[this.by] || this.rows.columns.reward;
    const { step, row: place, advantage } = this.rows.columns;
    const sign = this.down ? -1 : 1;
    const mean = (group, of) => average(group.map(of));
    const keyOfRow = {
      step: (row) => step[row],
      reward: (row) => column[row],
      advantage: (row) => advantage[row],
      length: (row) => this.length(row),
      spread: (row) => spread(this.groups.of(row).map((one) => column[one])),
    }[this.sort];
    if (this.mode === "groups") {
      const seen = new Set();
      this.items = [];
      for (const row of rows) {
        const group = this.groups.of(row);
        if (!seen.has(group)) {
          seen.add(group);
          this.items.push(group);
        }
      }
    } else {
      this.items = rows.map((row) => [row]);
    }
    const keys = this.items.map((group) => (this.sort === "spread" ? keyOfRow(group[0]) : mean(group, keyOfRow)));
    const order = [...keys.keys()].sort((a, b) => {
      const [x, y] = [keys[a], keys[b]];
      if (x !== y && !(Number.isNaN(x) && Number.isNaN(y))) return Number.isNaN(x) ? 1 : Number.isNaN(y) ? -1 : sign * (x - y);
      return step[this.items[a][0]] - step[this.items[b][0]] || place[this.items[a][0]] - place[this.items[b][0]];
    });
    this.order = order;
    const what = this.mode === "groups" ? `${order.length.toLocaleString("en")} groups, ` : "";
    this.count.textContent = `${what}${rows.length.toLocaleString("en")} of ${this.rows.count.toLocaleString("en")} completions`;
    this.matching = this.found || Object.entries(this.filter).some(([name, value]) => name !== "of" && value) ? new Set(rows) : null;
    this.list.chosen = this.openRow === null ? -1 : order.findIndex((item) => this.items[item].includes(this.openRow));
    this.list.setCount(order.length);
    if (this.list.chosen < 0) this.list.choose(0); // what was open is filtered out
  }
  render(index, node) {
    const group = this.items[this.order[index]];
    const { step, reward, row: place } = this.rows.columns;
    const text = this.texts.of(group[0]);
    const column = this.rows.columns[this.by] || reward;
    const line = el("div", { class: "preview", dir: "auto" });
    if (text) appendLine(line, this.mode === "groups" ? text.question : text.completion || "(empty)");
    else line.append("…");
    const facts = this.mode === "groups"
      ? [strip(group.map((row) => column[row]), this.range()), `mean ${number(average(group.map((row) => column[row])))}`,
        `length ${number(average(group.map((row) => this.length(row))), 0)}`]
      : [`row ${place[group[0]]}`, pill(column[group[0]], this.range()), `length ${this.length(group[0])}`,
        this.rows.finishes[this.rows.columns.finish[group[0]]]];
    const spans = facts.map((fact) => (typeof fact === "string" ? el("span", {}, fact) : fact));
    append(node, [el("div", { class: "facts" }, el("b", {}, `step ${step[group[0]]}`), spans), line]);
  }
  range() {
    if (this.rangeOf !== this.rows || this.rangeBy !== this.by) {
      let [low, high] = [Infinity, -Infinity];
      for (const value of this.rows.columns[this.by] || this.rows.columns.reward) {
        if (value < low) low = value;
        if (value > high) high = value;
      }
      [this.rangeOf, this.rangeBy, this.lowHigh] = [this.rows, this.by, [low, high]];
    }
    return this.lowHigh;
  }
  async open(index) {
    const row = this.items[this.order[index]][0];
    this.openRow = row;
    const group = this.groups.of(row);
    const [run, rows] = [this.run, this.rows];
    const texts = await this.app.source.texts(run, group, true);
    if (this.openRow !== row || this.run !== run) return;
    const { step, question, held_out: heldOut } = rows.columns;
    const elsewhere = new Set();
    question.forEach((one, other) => { if (one === question[row] && step[other] !== step[row] && heldOut[other] === heldOut[row]) elsewhere.add(step[other]); });
    const around = (by) => el("button", { disabled: index + by < 0 || index + by >= this.order.length, onclick: () => this.list.choose(index + by) },
      by < 0 ? "← previous" : "next →");
    const steps = [...elsewhere].sort((a, b) => a - b);
    replace(this.detail,
      el("div", { class: "detail-head" },
        el("h2", {}, `Step ${step[row]}${heldOut[row] ? ", held out" : ""}`), around(-1), around(1),
        steps.length > 0 && labelled("the same question in step", select([["", "…"], ...steps.slice(0, 500).map((one) => [one, one])], "",
          (value) => value && this.app.compare({ run, step: step[row] }, { run, step: Number(value) }, rows.questions[question[row]], heldOut[row])))),
      question_and_gold(texts[0], this.maths),
      el("div", { class: "cards" }, group.map((one, i) => this.card(one, texts[i]))));
    this.detail.scrollTop = 0;
    const chosen = this.mode === "rows" && this.detail.querySelector(".card.chosen");
    if (chosen) chosen.scrollIntoView({ block: "nearest" });
  }
  card(row, text) {
    const { columns } = this.rows;
    const body = el("div", { class: "body" });
    const plain = () => replace(body, completionBody(text, this.maths));
    const off = this.matching && !this.matching.has(row);
    const place = `${columns.step[row]}:${columns.row[row]}`;
    const card = el("section", { class: `card${off ? " off" : ""}${this.mode === "rows" && row === this.openRow ? " chosen" : ""}`, "data-row": columns.row[row] },
      el("header", {},
        el("b", {}, `row ${columns.row[row]}`),
        pill(columns.reward[row], this.sumRange()),
        el("span", { title: "advantage" }, `A ${signed(columns.advantage[row])}`),
        el("span", { class: "quiet" }, columns.length[row] < 0 ? `${columns.characters[row].toLocaleString("en")} characters` : `${columns.length[row].toLocaleString("en")} tokens`),
        el("span", { class: this.rows.finishes[columns.finish[row]] === "stop" ? "quiet" : "warn" }, this.rows.finishes[columns.finish[row]]),
        !columns.held_out[row] && this.withTokens.has(place) && this.tokenChoice(row, body, plain)),
      this.rows.rewards.length > 1 && el("div", { class: "parts" },
        this.rows.rewards.map((name) => el("span", {}, `${shortName(name)} `, el("b", {}, number(columns[`reward:${name}`][row]))))),
      body,
      (text.extracted !== null && text.extracted !== undefined || Object.keys(text.extra || {}).length > 0) && el("footer", {},
        text.extracted !== null && text.extracted !== undefined && appendLine(el("span", { dir: "auto" }, el("b", {}, "extracted ")), text.extracted),
        Object.entries(text.extra || {}).map(([name, value]) => appendLine(appendLine(el("span", { dir: "auto" }), `${name}: `), value.slice(0, 2000)))));
    plain();
    return card;
  }
  sumRange() {
    const by = this.by;
    this.by = "reward";
    const range = this.range();
    this.by = by;
    return range;
  }
  tokenChoice(row, body, plain) {
    const { step, row: place } = this.rows.columns;
    const node = el("select", { class: "shade", "aria-label": "shade tokens" }, el("option", { value: "" }, "shade tokens …"),
      Object.entries(FIGURES).map(([name, one]) => el("option", { value: name }, one.label)));
    node.addEventListener("change", async () => {
      if (!node.value) return plain();
      const tokens = await this.app.source.tokens(this.run, step[row], place[row]);
      if (!tokens || !valuesOf(tokens, node.value)) {
        return replace(body, el("p", { class: "quiet" }, `No ${FIGURES[node.value].label} was logged for this row.`));
      }
      return replace(body, el("p", { class: "quiet" }, `${FIGURES[node.value].label}: ${FIGURES[node.value].about}`), tokenText(tokens, node.value));
    });
    return node;
  }
}

function completionBody(text, maths) {
  const shown = (words) => longText(maths ? readable(words) : words, appendMarked);
  if (!text.turns) return shown(text.completion || "");
  return text.turns.map(([role, words]) => el("div", { class: `turn turn-${/^[a-z]+$/.test(role) ? role : "other"}` },
    appendLine(el("b", {}), role), shown(words)));
}

function question_and_gold(text, maths = false) {
  return el("div", { class: "question" }, longText(maths ? readable(text.question || "") : text.question || ""),
    text.gold !== null && text.gold !== undefined && appendText(el("p", { class: "gold", dir: "auto" }, el("b", {}, "gold ")), text.gold.slice(0, 20000)));
}

function shortName(name) {
  const short = name.split(":").pop().split("/").pop();
  return short.length > 40 ? short.slice(0, 39) + "…" : short;
}

function average(values) {
  let sum = 0;
  let count = 0;
  for (const value of values) {
    if (!Number.isNaN(value)) {
      sum += value;
      count += 1;
    }
  }
  return count ? sum / count : NaN;
}

function spread(values) {
  const mean = average(values);
  return Math.sqrt(average(values.map((value) => (value - mean) ** 2)));
}

function pill(value, [low, high]) {
  const node = el("span", { class: "pill", title: "reward" }, number(value));
  if (!Number.isNaN(value)) node.style.backgroundColor = shade(high > low ? (value - low) / (high - low) : 0.5);
  return node;
}

// The rewards of a group as bars.
function strip(values, [low, high]) {
  const node = el("span", { class: "strip", title: values.map((value) => number(value)).join(", ") });
  for (const value of values.slice(0, 32)) {
    const cell = el("i");
    const share = high > low ? (value - low) / (high - low) : 0.5;
    if (Number.isNaN(value)) cell.className = "none";
    else {
      cell.style.backgroundColor = shade(share);
      cell.style.height = `${4 + 9 * share}px`;
    }
    node.append(cell);
  }
  return node;
}

// Groups of rows of one step and one question, each by row; made once for each set of rows.
// size: completions of a prompt, 0 where it is not known; two prompts of a step may have one question.
function groupsOf(rows, size = 0) {
  if (rows.groups) return rows.groups;
  const { step, question, row: place, held_out: heldOut } = rows.columns;
  const number_of = new Int32Array(rows.count);
  const groups = [];
  const known = [new Map(), new Map()]; // of training and held out: step -> question -> group
  for (let row = 0; row < rows.count; row++) {
    const own = known[heldOut[row]];
    if (!own.has(step[row])) own.set(step[row], new Map());
    const of_step = own.get(step[row]);
    const key = size && !heldOut[row] ? `${question[row]}:${Math.floor(place[row] / size)}` : question[row];
    let group = of_step.get(key);
    if (group === undefined) {
      group = groups.length;
      of_step.set(key, group);
      groups.push([]);
    }
    groups[group].push(row);
    number_of[row] = group;
  }
  for (const group of groups) group.sort((a, b) => place[a] - place[b]);
  rows.groups = { all: groups, of: (row) => groups[number_of[row]] };
  return rows.groups;
}
