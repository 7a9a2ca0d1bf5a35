"use strict";
// A list of any length of which only the rows on the screen exist. Arrow keys move the choice.

const MAX_HEIGHT = 8e6; // px that browsers can scroll; a longer list moves several rows a pixel

class List {
  constructor({ rowHeight, render, onChoose, label }) {
    this.rowHeight = rowHeight;
    this.render = render;
    this.onChoose = onChoose;
    this.count = 0;
    this.chosen = -1;
    this.canvas = el("div", { class: "list-canvas" });
    this.node = el("div", { class: "list", tabindex: "0", role: "listbox", "aria-label": label }, this.canvas);
    this.shown = new Map(); // index -> node
    this.node.addEventListener("scroll", () => this.draw(), { passive: true });
    this.node.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("click", (event) => {
      const row = event.target.closest("[data-index]");
      if (row) this.choose(Number(row.dataset.index));
    });
    new ResizeObserver(() => this.draw()).observe(this.node);
  }
  get height() {
    return Math.min(MAX_HEIGHT, this.count * this.rowHeight);
  }
  // Rows before the first on the screen, a fraction.
  get first() {
    const room = this.height - this.node.clientHeight;
    const rows = this.count - this.node.clientHeight / this.rowHeight;
    return room > 0 ? (this.node.scrollTop / room) * Math.max(0, rows) : 0;
  }
  setCount(count) {
    this.count = count;
    this.canvas.style.height = `${this.height}px`;
    this.refresh();
  }
  refresh() {
    this.shown.forEach((node) => node.remove());
    this.shown.clear();
    this.draw();
  }
  draw() {
    const first = this.first;
    const from = Math.max(0, Math.floor(first) - 3);
    const to = Math.min(this.count, Math.ceil(first + this.node.clientHeight / this.rowHeight) + 3);
    for (const [index, node] of this.shown) {
      if (index < from || index >= to) {
        node.remove();
        this.shown.delete(index);
      }
    }
    for (let index = from; index < to; index++) {
      let node = this.shown.get(index);
      if (!node) {
        node = el("div", { class: "list-row", role: "option", "data-index": index });
        this.render(index, node);
        this.shown.set(index, node);
        this.canvas.append(node);
      }
      node.setAttribute("aria-selected", index === this.chosen);
      node.style.transform = `translateY(${this.node.scrollTop + (index - first) * this.rowHeight}px)`;
      node.style.height = `${this.rowHeight}px`;
    }
  }
  choose(index, quietly = false) {
    if (index < 0 || index >= this.count) return;
    this.chosen = index;
    this.reveal(index);
    this.draw();
    if (!quietly) this.onChoose(index);
  }
  reveal(index) {
    const seen = this.node.clientHeight / this.rowHeight;
    const first = this.first;
    let wanted = first;
    if (index < first) wanted = index;
    else if (index + 1 > first + seen) wanted = index + 1 - seen;
    if (wanted === first) return;
    const rows = Math.max(1e-9, this.count - seen);
    this.node.scrollTop = (wanted / rows) * (this.height - this.node.clientHeight);
  }
  key(event) {
    const page = Math.max(1, Math.floor(this.node.clientHeight / this.rowHeight) - 1);
    const moves = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: page, PageUp: -page };
    let next = null;
    if (event.key in moves) next = Math.min(this.count - 1, Math.max(0, this.chosen + moves[event.key]));
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = this.count - 1;
    if (next === null || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.choose(next);
  }
}
