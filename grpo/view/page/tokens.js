"use strict";
// A completion token by token, shaded by one of its figures.

const FIGURES = {
  logprob: { label: "log-prob", about: "of the token as it was sampled, nats", share: (value) => Math.exp(value) },
  gap: { label: "policy − sampler", about: "log-prob in the update minus as sampled: rounding, and what earlier updates of the step moved", share: (value) => 1 - Math.min(1, Math.abs(value) / 0.5) },
  ratio: { label: "ratio", about: "policy / old probability in the last update", two: (value) => Math.log(value) / 0.2 },
  entropy: { label: "entropy", about: "nats", share: (value) => 1 - Math.min(1, value / 3) },
  trained: { label: "mask", about: "tokens that carry loss", share: (value) => (value === "1" ? 1 : 0) },
};

// The figures that a row has, in the order of FIGURES.
function figuresOf(tokens) {
  return Object.keys(FIGURES).filter((name) => valuesOf(tokens, name));
}

function valuesOf(tokens, name) {
  if (name === "trained") return tokens.trained ? [...tokens.trained] : null;
  if (name === "gap") {
    if (!tokens.policy || !tokens.logprob) return null;
    return tokens.policy.map((value, i) => (value === null ? null : value - tokens.logprob[i]));
  }
  return tokens[name] || null;
}

function background(name, value) {
  if (value === null || value === undefined) return "";
  const { share, two } = FIGURES[name];
  if (two) {
    const strength = Math.max(-1, Math.min(1, two(value)));
    return Math.abs(strength) < 0.02 ? "" : `hsl(${strength > 0 ? 215 : 10} 75% 50% / ${(Math.abs(strength) * 0.6).toFixed(2)})`;
  }
  const low = 1 - Math.max(0, Math.min(1, share(value)));
  return low < 0.02 ? "" : `hsl(${name === "trained" ? 0 : 28} ${name === "trained" ? 0 : 90}% 50% / ${(low * 0.6).toFixed(2)})`;
}

// The tokens as text, one span each; hovering or focusing shows every figure of a token.
function tokenText(tokens, name) {
  const node = el("div", { class: "text tokens", dir: "auto", "data-figure": name });
  const values = valuesOf(tokens, name);
  const texts = tokens.texts || tokens.ids.map((id) => `⟨${id}⟩`);
  const figures = figuresOf(tokens).map((figure) => [figure, valuesOf(tokens, figure)]);
  texts.forEach((text, i) => {
    const token = el("span", { class: "token", title: about(tokens, figures, i) });
    const colour = background(name, values[i]);
    if (colour) token.style.backgroundColor = colour;
    node.append(appendText(token, text === "" ? "·" : text));
  });
  return node;
}

function about(tokens, figures, i) {
  const lines = [`token ${i}, id ${tokens.ids[i]}`];
  for (const [name, values] of figures) {
    const value = values[i];
    const shown = name === "trained" ? (value === "1" ? "carries loss" : "no loss") : number(value);
    lines.push(`${FIGURES[name].label}: ${shown}${name === "logprob" ? ` (p = ${number(Math.exp(value))})` : ""}`);
  }
  return lines.join("\n");
}
