"use strict";
// Runs side by side: what they reached, how they ended, where their settings differ, their curves.

const STEP_SECONDS = "time/step_s";
const PHASES = ["rollout", "reward", "exchange", "logprobs", "update"];

class Overview {
  constructor(app, node) {
    this.app = app;
    this.node = node;
    this.weight = 0;
    this.axis = "steps";
    this.more = new Set(); // metrics that were added by hand
    this.allSettings = false;
    this.curves = new Map(); // run -> {version, data}
    this.table = el("div", { class: "scroll" });
    this.charts = el("div", { class: "charts" });
    this.settings = el("div", { class: "scroll" });
    this.adder = el("select", { "aria-label": "add a metric", onchange: () => this.add() });
    const slider = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, "aria-label": "smoothing", id: "smoothing" });
    slider.value = 0;
    const shown = el("output", {}, "0");
    slider.addEventListener("input", () => {
      this.weight = Number(slider.value);
      shown.textContent = slider.value;
      this.draw();
    });
    const axis = select([["steps", "steps"], ["seconds", "seconds of training"]], "steps", (value) => {
      this.axis = value;
      this.draw();
    }, { id: "axis" });
    append(node, [
      this.table,
      el("div", { class: "bar" }, labelled("smoothing", slider, shown), labelled("axis", axis), labelled("more", this.adder)),
      this.charts,
      el("h2", {}, "Settings"),
      this.settings,
    ]);
  }
  async show() {
    await this.load();
    this.draw();
  }
  async update() {
    await this.show();
  }
  async load() {
    await Promise.all(this.app.chosen.map(async (run) => {
      const version = String(this.app.runs[run].versions.metrics);
      const known = this.curves.get(run);
      if (!known || known.version !== version) {
        this.curves.set(run, { version, data: await this.app.source.metrics(run) });
      }
    }));
  }
  add() {
    if (this.adder.value) this.more.add(this.adder.value);
    this.draw();
  }
  draw() {
    this.drawRuns();
    this.drawCharts();
    this.drawSettings();
  }
  drawRuns() {
    const { app } = this;
    const rows = app.runs.map((run, number) => {
      const on = app.chosen.includes(number);
      return el("tr", { class: on ? "" : "off" },
        el("td", {}, el("input", {
          type: "checkbox", checked: on, "aria-label": `show ${run.name}`, onchange: () => app.toggle(number),
        })),
        el("th", { scope: "row" }, el("i", { class: `swatch c${number % COLOURS}` }), appendText(el("span"), run.name)),
        el("td", {}, state(run)),
        el("td", { class: "figure" }, run.total ? `${run.steps} / ${run.total}` : String(run.steps)),
        el("td", { class: "figure" }, number3(run.reward)),
        el("td", { class: "figure" }, run.versions.rollouts[1].toLocaleString("en")),
        el("td", { class: "quiet" }, run.written ? ago(app.now - run.written) : "–"),
        el("td", { class: "reason" }, appendText(el("span"), [run.reason, ...run.problems].filter(Boolean).join("; "))));
    });
    const heads = ["", "run", "state", "steps", "reward", "completions", "written", "exit reason, problems"];
    replace(this.table, el("table", { class: "runs" },
      el("thead", {}, el("tr", {}, heads.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, rows)));
  }
  // One line for each chosen run that has the metric; with several names, dashes tell them apart. A name may be a list:
  // of these, the first that a run has.
  lines(names, label = (name) => name) {
    const lines = [];
    for (const run of this.app.chosen) {
      const known = this.curves.get(run);
      if (!known) continue;
      const { curves, seconds: clock } = known.data;
      const times = new Map(clock[0].map((step, i) => [step, clock[1][i]]));
      const own_names = names.map((name) => [name].flat().find((one) => curves[one])).filter(Boolean);
      own_names.forEach((name, k) => {
        const xs = [];
        const ys = [];
        curves[name][0].forEach((step, i) => {
          const x = this.axis === "steps" ? step : step === 0 ? 0 : times.get(step);
          const y = curves[name][1][i];
          if (x !== undefined && y !== null) {
            xs.push(x);
            ys.push(y);
          }
        });
        const own = this.app.chosen.length === 1 && names.length > 1;
        const text = names.length === 1 ? this.app.runs[run].name : own ? label(name) : `${this.app.runs[run].name} ${label(name)}`;
        lines.push({ label: text, colour: own ? k : run, dash: !own && k > 0, xs, ys });
      });
    }
    return lines;
  }
  names(pattern) {
    const found = new Set();
    for (const run of this.app.chosen) {
      for (const name of Object.keys(this.curves.get(run)?.data.curves || {})) if (pattern.test(name)) found.add(name);
    }
    return [...found].sort();
  }
  drawCharts() {
    const rewards = this.names(/^reward\/[^/].*\/mean$/);
    const heldOut = this.names(/^eval\/(.*\/)?accuracy$/);
    const others = this.names(/^eval\/(?!.*(length_mean|user\/|_se|pass@|maj@))/);
    const hasKl = this.names(/^kl$/).length > 0;
    const short = (name) => name.replace(/^(reward|eval|time)\//, "").replace(/\/mean$|_s$/, "");
    const charts = [
      ["Reward", ["reward/mean"], "mean of the weighted sum"],
      ...(rewards.length > 1 ? rewards.map((name) => [short(name), [name], "mean of one reward function"]) : []),
      heldOut.length ? ["Held-out accuracy", heldOut, "share of held-out questions answered right", true]
        : ["Held-out reward", others.slice(0, 4), "mean on held-out questions"],
      ["Completion length", ["completions/length_mean"], "tokens, mean"],
      ["Truncated", ["completions/truncated"], "share cut at the limit", true],
      ["Entropy", [["entropy/true", "entropy"]], "nats a token"],
      ["Groups without variance", ["reward/zero_std_groups"], "share of groups that teach nothing", true],
      hasKl ? ["KL", ["kl"], "to the reference, mean over tokens"]
        : ["Sampler gap", [["sampler_gap/mean", "sampler_gap/max"]], "|trainer − sampler| log-prob"],
      ["Speed", ["tokens_per_s"], "completion tokens a second"],
      this.app.chosen.length > 1 ? ["Time of a step", [STEP_SECONDS], "seconds; by phase when one run is chosen"]
        : ["Time of a step", PHASES.map((phase) => `time/${phase}_s`), "seconds of each phase"],
      ...[...this.more].map((name) => [name, [name], "added"]),
    ];
    replace(this.charts, charts.map(([title, names, about, bounded]) => chart(this.lines(names, short), {
      title, about, bounded, weight: this.weight, xLabel: this.axis,
      empty: this.app.chosen.length ? "not logged by these runs" : "choose a run above",
    })));
    if (document.activeElement !== this.adder) {
      const rest = this.names(/./).filter((name) => !this.more.has(name));
      replace(this.adder, el("option", { value: "" }, "a metric …"), rest.map((name) => el("option", { value: name }, name)));
    }
  }
  drawSettings() {
    const runs = this.app.chosen.filter((run) => this.app.runs[run].settings);
    const without = this.app.chosen.filter((run) => !this.app.runs[run].settings).map((run) => this.app.runs[run].name);
    const all = new Map(runs.map((run) => [run, flat(this.app.runs[run].settings)]));
    const names = [...new Set([...all.values()].flatMap((own) => [...own.keys()]))].sort();
    const differ = names.filter((name) => new Set([...all.values()].map((own) => own.get(name))).size > 1);
    const shown = this.allSettings || runs.length < 2 ? names : differ;
    const note = runs.length < 2 ? "" : differ.length
      ? `${differ.length} of ${names.length} differ` : `all ${names.length} are equal`;
    const button = el("button", { onclick: () => { this.allSettings = !this.allSettings; this.drawSettings(); } },
      this.allSettings ? "only those that differ" : "all settings");
    replace(this.settings,
      el("p", { class: "quiet" }, note, " ", runs.length > 1 && button, without.length > 0 && ` No settings are recorded for ${without.join(", ")}.`),
      runs.length < 2 && runs.length > 0 && !this.allSettings
        ? el("p", {}, button)
        : shown.length > 0 && el("table", { class: "settings" },
          el("thead", {}, el("tr", {}, el("th", {}, "setting"),
            runs.map((run) => el("th", {}, el("i", { class: `swatch c${run % COLOURS}` }), this.app.runs[run].name)))),
          el("tbody", {}, shown.map((name) => el("tr", { class: differ.includes(name) ? "differs" : "" }, el("th", { scope: "row" }, name),
            runs.map((run) => el("td", {}, appendText(el("span"), all.get(run).get(name) ?? "–"))))))));
  }
}

function number3(value) {
  return value === null ? "–" : number(value);
}

function state(run) {
  const texts = {
    running: "running",
    done: "done",
    ended: run.code === 75 ? "stopped, saved" : `ended with ${run.code}`,
    unknown: "no end recorded",
  };
  return el("span", { class: `state state-${run.state === "ended" && run.code === 75 ? "stopped" : run.state}` }, texts[run.state]);
}

// Settings as name -> text, nested ones by a dotted name.
function flat(settings, before = "", found = new Map()) {
  for (const [name, value] of Object.entries(settings)) {
    if (value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length && before.length < 200) {
      flat(value, `${before}${name}.`, found);
    } else {
      found.set(before + name, typeof value === "string" ? value : JSON.stringify(value));
    }
  }
  return found;
}
