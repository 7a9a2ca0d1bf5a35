"use strict";
// Elements and texts. Everything becomes text nodes: nothing of a run is ever parsed as markup.

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "selected") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  append(node, children);
  return node;
}

function append(node, children) {
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}

function replace(node, ...children) {
  node.replaceChildren();
  return append(node, children);
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return append(node, children);
}

// Characters that act on what stands around them, or show nothing: shown by their number.
const INVISIBLE =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e0fff}]|\p{Cs}/gu;
const FIRST_CHARACTERS = 20000; // of a text; the rest on demand
const MORE_CHARACTERS = 100000;

function named(character) {
  return "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
}

function appendText(node, text) {
  let done = 0;
  for (const match of text.matchAll(INVISIBLE)) {
    if (match.index > done) node.append(text.slice(done, match.index));
    node.append(el("span", { class: "invisible", title: "a character that is not shown as such" }, named(match[0])));
    done = match.index + match[0].length;
  }
  if (done < text.length) node.append(text.slice(done));
  return node;
}

// One line for lists: line breaks as a mark, invisible characters by number.
function appendLine(node, text) {
  return appendText(node, text.replace(/\s*\n\s*/g, " ⏎ "));
}

const MARKS = /(<\/?(?:think|tool_call|tool_response|tool|answer|SOLUTION|reasoning)>|<\|[\w ]{1,40}\|>)/;
const NAME_OF_MARK = /^<(\/?)([\w]+)>$/;

// A completion with its parts told apart: thinking, tool calls, what tools said, answers.
function appendMarked(node, text) {
  let inside = "";
  for (const piece of text.split(MARKS)) {
    if (!piece) continue;
    const mark = piece.match(NAME_OF_MARK);
    if (mark && MARKS.test(piece)) {
      inside = mark[1] ? "" : mark[2].toLowerCase();
      node.append(el("span", { class: "mark" }, piece));
    } else if (MARKS.test(piece)) {
      node.append(el("span", { class: "mark" }, piece));
    } else if (inside) {
      node.append(appendText(el("span", { class: "part part-" + inside }), piece));
    } else {
      appendText(node, piece);
    }
  }
  return node;
}

// A long text in parts: the first at once, others when asked for. write(node, text) fills a node.
function longText(text, write = appendText, attributes = { class: "text", dir: "auto" }) {
  const node = el("div", attributes);
  if (text === "") node.append(el("span", { class: "quiet" }, "(empty)"));
  let shown = 0;
  const more = el("button", { class: "more", onclick: () => show(MORE_CHARACTERS) });
  function show(count) {
    let end = Math.min(text.length, shown + count);
    if (end < text.length && /[\ud800-\udbff]/.test(text[end - 1])) end -= 1;
    more.remove();
    const part = el("span");
    write(part, text.slice(shown, end));
    node.append(part);
    shown = end;
    if (shown < text.length) {
      more.textContent = `show more: ${(text.length - shown).toLocaleString("en")} of ${text.length.toLocaleString("en")} characters left`;
      node.append(more);
    }
  }
  show(FIRST_CHARACTERS);
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return String(value).replace("-", "−");
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : value.toFixed(size >= 100 ? 1 : digits);
  return text.replace("-", "−");
}

function signed(value) {
  if (Number.isNaN(value)) return "–";
  return (value > 0 ? "+" : "") + number(value, 2);
}

function ago(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

function debounce(work, wait) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...values), wait);
  };
}

function select(options, value, onchange, attributes = {}) {
  const node = el("select", { ...attributes, onchange: () => onchange(node.value) });
  for (const [key, label] of options) node.append(el("option", { value: key }, label));
  node.value = value;
  return node;
}

function labelled(text, ...controls) {
  return el("label", { class: "field" }, el("span", {}, text), controls);
}

// A colour from orange (low) to teal (high) for a share from 0 to 1; told apart without seeing red or green.
function shade(share) {
  const bounded = Math.min(1, Math.max(0, share));
  return `hsl(${(20 + 155 * bounded).toFixed(0)} ${(75 - 12 * bounded).toFixed(0)}% ${(42 - 9 * bounded).toFixed(0)}%)`;
}
