"use strict";
// The three views, the choice of runs, and looking for news while the server runs.

const LOOK_S = 3;
const FIRST_CHOSEN = 6; // runs that are shown until the user chooses

class App {
  constructor(source) {
    this.source = source;
    this.runs = [];
    this.now = 0;
    this.chosen = [];
    this.views = {};
    this.current = null;
    this.status = document.getElementById("status");
  }
  async start() {
    await this.look();
    this.chosen = this.runs.map((_, i) => i).sort((a, b) => this.runs[b].written - this.runs[a].written).slice(0, FIRST_CHOSEN)
      .sort((a, b) => a - b);
    this.views = {
      overview: new Overview(this, document.getElementById("overview")),
      rollouts: new Rollouts(this, document.getElementById("rollouts")),
      compare: new Compare(this, document.getElementById("compare")),
    };
    document.querySelectorAll("#tabs button").forEach((button) => button.addEventListener("click", () => { location.hash = button.dataset.view; }));
    window.addEventListener("hashchange", () => this.route());
    document.addEventListener("keydown", (event) => this.key(event));
    await this.route();
    if (this.source.live) setInterval(() => this.news(), LOOK_S * 1000);
    document.documentElement.dataset.ready = "1";
  }
  async look() {
    const found = await this.source.runs();
    this.now = found.now;
    const text = JSON.stringify(found.runs);
    const changed = text !== this.known;
    this.known = text;
    this.runs = found.runs;
    if (found.left_out) this.note(found);
    else this.exportLink();
    return changed;
  }
  // What an exported file says of itself.
  note(found) {
    const made = new Date(found.now * 1000).toISOString().slice(0, 16).replace("T", " ");
    replace(document.getElementById("notes"), el("p", { class: "note" }, `Exported ${made} UTC. `,
      found.left_out.length ? `Left out for size: ${found.left_out.join("; ")}.` : "Nothing was left out."));
    this.status.textContent = "a file";
  }
  exportLink() {
    const link = document.getElementById("export");
    link.hidden = false;
    link.href = `/api/export?runs=${this.chosen.join(",")}`;
  }
  async news() {
    if (document.hidden || this.busy) return;
    this.busy = true;
    try {
      const before = this.runs.length;
      const changed = await this.look();
      for (let run = before; run < this.runs.length; run++) this.chosen.push(run);
      const running = this.runs.filter((run) => run.state === "running").length;
      this.status.textContent = running ? `${running} running` : "";
      this.status.className = "";
      if (changed) await this.views[this.current].update();
    } catch (error) {
      this.status.textContent = `no news: ${error.message}`;
      this.status.className = "warn";
    } finally {
      this.busy = false;
    }
  }
  toggle(run) {
    this.chosen = this.chosen.includes(run) ? this.chosen.filter((one) => one !== run) : [...this.chosen, run].sort((a, b) => a - b);
    if (this.source.live) this.exportLink();
    this.views.compare.sides = null;
    this.run(() => this.views.overview.show());
  }
  firstWithRollouts() {
    const has = (run) => this.runs[run].versions.rollouts[1] > 0;
    const found = [...this.chosen, ...this.runs.keys()].find(has);
    return found === undefined ? null : found;
  }
  compare(a, b, key, heldOut) {
    this.views.compare.set(a, b, key, heldOut);
    location.hash = "compare";
  }
  async route() {
    const name = location.hash.slice(1);
    this.current = name in this.views ? name : "overview";
    for (const view of Object.keys(this.views)) document.getElementById(view).hidden = view !== this.current;
    document.querySelectorAll("#tabs button").forEach((button) => button.setAttribute("aria-selected", button.dataset.view === this.current));
    await this.run(() => this.views[this.current].show());
  }
  async run(work) {
    try {
      await work();
    } catch (error) {
      this.status.textContent = error.message;
      this.status.className = "warn";
      console.error(error);
    }
  }
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const view = { 1: "overview", 2: "rollouts", 3: "compare" }[event.key];
    if (view) location.hash = view;
    else if (event.key === "/" && this.current === "rollouts") {
      event.preventDefault();
      document.getElementById("filter-text")?.focus();
    }
  }
}

function themes() {
  const order = ["", "light", "dark"];
  let place = 0;
  document.getElementById("theme").addEventListener("click", () => {
    place = (place + 1) % order.length;
    if (order[place]) document.documentElement.dataset.theme = order[place];
    else delete document.documentElement.dataset.theme;
  });
}

(async () => {
  themes();
  const block = document.getElementById("data");
  try {
    await new App(block ? await FileSource.open(block) : new ServerSource()).start();
  } catch (error) {
    replace(document.getElementById("notes"), el("p", { class: "note warn" }, `This page cannot show its runs: ${error.message}`));
    console.error(error);
  }
})();
