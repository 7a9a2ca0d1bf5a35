"use strict";
// Where the data comes from: the local server, or the block of an exported file. Both answer the same questions.

const TYPED = { i: Int32Array, f: Float32Array };

// Columns of completions: see grpo/view/rollouts.py.
function unpack(buffer) {
  const size = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const columns = {};
  let place = 4 + size;
  for (const [name, code] of header.columns) {
    columns[name] = new TYPED[code](buffer, place, header.count);
    place += Math.ceil((header.count * 4) / 8) * 8;
  }
  return { ...header, columns };
}

function joined(old, added) {
  const columns = {};
  for (const [name, values] of Object.entries(added.columns)) {
    const all = new values.constructor(added.first + added.count);
    if (old.columns[name]) all.set(old.columns[name]);
    else all.fill(NaN, 0, added.first);
    all.set(values, added.first);
    columns[name] = all;
  }
  return { ...added, first: 0, count: added.first + added.count, columns };
}

class ServerSource {
  constructor() {
    this.live = true;
    this.rows_of = new Map();
  }
  async ask(name, query = {}) {
    const answer = await fetch(`/api/${name}?${new URLSearchParams(query)}`);
    if (!answer.ok) throw new Error((await answer.text()).trim());
    return answer;
  }
  async runs() {
    return (await this.ask("runs")).json();
  }
  async metrics(run) {
    return (await this.ask("metrics", { run })).json();
  }
  async rows(run) {
    const old = this.rows_of.get(run);
    const query = { run, first: old ? old.count : 0, generation: old ? old.generation : 0 };
    const added = unpack(await (await this.ask("rows", query)).arrayBuffer());
    const all = old && added.first > 0 ? joined(old, added) : added;
    this.rows_of.set(run, all);
    return all;
  }
  async texts(run, rows, whole = false) {
    return (await this.ask("texts", { run, rows: rows.join(","), whole: whole ? 1 : 0 })).json();
  }
  async search(run, text) {
    return (await this.ask("search", { run, text })).json();
  }
  async tokenRows(run) {
    return (await this.ask("token_rows", { run })).json();
  }
  async tokens(run, step, row) {
    return (await this.ask("tokens", { run, step, row })).json();
  }
}

class FileSource {
  constructor(data) {
    this.live = false;
    this.data = data;
  }
  static async open(block) {
    const bytes = Uint8Array.from(atob(block.textContent.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new FileSource(JSON.parse(await new Response(stream).text()));
  }
  async runs() {
    return { now: this.data.made, left_out: this.data.left_out, runs: this.data.runs.map((run) => run.about) };
  }
  async metrics(run) {
    return this.data.runs[run].metrics;
  }
  async rows(run) {
    const bytes = Uint8Array.from(atob(this.data.runs[run].rows), (letter) => letter.charCodeAt(0));
    return unpack(bytes.buffer);
  }
  async texts(run, rows) {
    return rows.map((row) => this.data.runs[run].records[row]);
  }
  async search(run, text) {
    const fold = (value) => (value || "").replace(/[A-Z]/g, (letter) => letter.toLowerCase());
    const wanted = fold(text);
    const found = [];
    this.data.runs[run].records.forEach((one, row) => {
      if ([one.completion, one.question, one.gold].some((own) => fold(own).includes(wanted))) found.push(row);
    });
    return found;
  }
  async tokenRows(run) {
    return Object.keys(this.data.runs[run].tokens).flatMap((place) => place.split(":").map(Number));
  }
  async tokens(run, step, row) {
    return this.data.runs[run].tokens[`${step}:${row}`] || null;
  }
}

// Texts of rows by number, fetched in pages; the least recently used pages are forgotten.
class Texts {
  constructor(source, run, onArrived) {
    this.source = source;
    this.run = run;
    this.onArrived = onArrived;
    this.known = new Map();
    this.wanted = new Set();
    this.asked = new Set();
    this.ask = debounce(() => this.fetch(), 15);
  }
  of(row) {
    const one = this.known.get(row);
    if (one === undefined) {
      if (!this.asked.has(row)) {
        this.wanted.add(row);
        this.ask();
      }
      return null;
    }
    return one;
  }
  async fetch() {
    const rows = [...this.wanted].slice(-200); // what was scrolled past is not fetched
    this.wanted.clear();
    if (!rows.length) return;
    rows.forEach((row) => this.asked.add(row));
    try {
      const found = await this.source.texts(this.run, rows);
      rows.forEach((row, i) => this.known.set(row, found[i]));
    } finally {
      rows.forEach((row) => this.asked.delete(row));
    }
    while (this.known.size > 20000) this.known.delete(this.known.keys().next().value);
    this.onArrived();
  }
}
