"use strict";
// TeX as plain symbols, where a reader asks for it: fractions, roots, powers, Greek letters. A text stays a text.

const SYMBOLS = {
  times: "×", cdot: "·", div: "÷", pm: "±", mp: "∓", le: "≤", leq: "≤", ge: "≥", geq: "≥", ne: "≠", neq: "≠", approx: "≈",
  equiv: "≡", sim: "∼", infty: "∞", sum: "∑", prod: "∏", int: "∫", partial: "∂", nabla: "∇", to: "→", rightarrow: "→",
  leftarrow: "←", Rightarrow: "⇒", implies: "⇒", iff: "⇔", in: "∈", notin: "∉", subset: "⊂", subseteq: "⊆", cup: "∪",
  cap: "∩", emptyset: "∅", forall: "∀", exists: "∃", neg: "¬", land: "∧", lor: "∨", ldots: "…", dots: "…", cdots: "⋯",
  circ: "°", angle: "∠", triangle: "△", perp: "⊥", parallel: "∥", quad: " ", qquad: "  ", left: "", right: "",
  displaystyle: "", alpha: "α", beta: "β", gamma: "γ", delta: "δ", epsilon: "ε", zeta: "ζ", eta: "η", theta: "θ",
  lambda: "λ", mu: "μ", nu: "ν", xi: "ξ", pi: "π", rho: "ρ", sigma: "σ", tau: "τ", phi: "φ", chi: "χ", psi: "ψ",
  omega: "ω", Gamma: "Γ", Delta: "Δ", Theta: "Θ", Lambda: "Λ", Pi: "Π", Sigma: "Σ", Phi: "Φ", Psi: "Ψ", Omega: "Ω",
};
const RAISED = { 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹", "+": "⁺", "-": "⁻", n: "ⁿ" };
const LOWERED = { 0: "₀", 1: "₁", 2: "₂", 3: "₃", 4: "₄", 5: "₅", 6: "₆", 7: "₇", 8: "₈", 9: "₉", "+": "₊", "-": "₋", n: "ₙ" };
const NESTED = 6; // levels of braces

function grouped(text) {
  return /^[\p{L}\p{N}.]*$/u.test(text) ? text : `(${text})`;
}

// \frac{1}{2} becomes 1/2, x^{10} becomes x¹⁰; what is not known stays as it is.
function readable(text) {
  let shown = text.replace(/\$\$?([^$\n]{1,1000})\$\$?/g, (whole, inner) => (/[\\^_=]/.test(inner) ? inner : whole))
    .replace(/\\[()[\]]/g, "").replace(/\\[,;:!]/g, " ");
  for (let level = 0; level < NESTED; level++) {
    const before = shown;
    shown = shown
      .replace(/\\[dt]?frac\{([^{}]{0,500})\}\{([^{}]{0,500})\}/g, (_, a, b) => `${grouped(a)}/${grouped(b)}`)
      .replace(/\\sqrt\{([^{}]{0,500})\}/g, (_, a) => `√${grouped(a)}`)
      .replace(/\\boxed\{([^{}]{0,500})\}/g, (_, a) => `⟦${a}⟧`)
      .replace(/\\(?:text|mathrm|mathbf|textbf|operatorname)\{([^{}]{0,500})\}/g, (_, a) => a)
      .replace(/\^(?:\{([0-9n+-]{1,9})\}|([0-9n]))/g, (_, a, b) => [...(a || b)].map((one) => RAISED[one]).join(""))
      .replace(/_(?:\{([0-9n+-]{1,9})\}|([0-9n]))/g, (_, a, b) => [...(a || b)].map((one) => LOWERED[one]).join(""));
    if (shown === before) break;
  }
  return shown.replace(/\\([A-Za-z]{1,20})/g, (whole, name) => (Object.hasOwn(SYMBOLS, name) ? SYMBOLS[name] : whole));
}
