"use strict";
// One chart: lines over steps or seconds, smoothed or not, with the values under the pointer or the arrow keys.

const COLOURS = 8; // .c0 to .c7 in style.css
const MOST_POINTS = 700; // of a line; more are averaged over equal parts
const SIZE = { width: 460, height: 200, left: 46, right: 10, top: 8, bottom: 22 };

// Exponential average, corrected for its start; keeps gaps between points.
function smooth(values, weight) {
  if (!weight) return values;
  let sum = 0;
  let count = 0;
  return values.map((value) => {
    if (value === null || Number.isNaN(value)) return value;
    sum = sum * weight + value * (1 - weight);
    count = count * weight + (1 - weight);
    return sum / count;
  });
}

function thinned(xs, ys) {
  if (xs.length <= MOST_POINTS) return [xs, ys];
  const size = xs.length / MOST_POINTS;
  const outX = [];
  const outY = [];
  for (let i = 0; i < MOST_POINTS; i++) {
    const from = Math.floor(i * size);
    const to = Math.max(from + 1, Math.floor((i + 1) * size));
    let sum = 0;
    for (let k = from; k < to; k++) sum += ys[k];
    outX.push(xs[to - 1]);
    outY.push(sum / (to - from));
  }
  return [outX, outY];
}

// Round numbers between two values.
function ticks(low, high, wanted) {
  const span = high - low || 1;
  const power = 10 ** Math.floor(Math.log10(span / wanted));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => span / one <= wanted) || 10 * power;
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) {
    found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  }
  return found;
}

function tickText(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(0);
  return String(+value.toPrecision(3));
}

function seconds(value) {
  if (value < 120) return `${number(value, 1)} s`;
  if (value < 7200) return `${number(value / 60, 1)} min`;
  return `${number(value / 3600, 1)} h`;
}

// lines: [{label, colour, dash, xs, ys}]; ys without nulls. options: {title, about, weight, xLabel, bounded, log}
function chart(lines, options) {
  const { width, height, left, right, top, bottom } = SIZE;
  const drawn = lines
    .map((line) => {
      const [xs, raw] = thinned(line.xs, line.ys);
      return { ...line, xs, raw, ys: smooth(raw, options.weight) };
    })
    .filter((line) => line.xs.length);
  const figure = el("figure", { class: "chart", "data-title": options.title });
  const last = drawn.length ? drawn.map((line) => `${line.label} ${number(line.raw.at(-1))}`).join(", ") : "not logged";
  figure.append(el("figcaption", {}, el("b", {}, options.title), el("span", { class: "quiet" }, options.about || "")));
  if (!drawn.length) {
    return append(figure, [el("div", { class: "empty" }, options.empty || "not logged by these runs")]);
  }
  let lowX = Infinity;
  let highX = -Infinity;
  let lowY = Infinity;
  let highY = -Infinity;
  for (const line of drawn) {
    lowX = Math.min(lowX, line.xs[0]);
    highX = Math.max(highX, line.xs.at(-1));
    for (const value of options.weight ? [...line.ys, ...limits(line.raw)] : line.raw) {
      lowY = Math.min(lowY, value);
      highY = Math.max(highY, value);
    }
  }
  if (options.bounded && lowY >= 0 && highY <= 1) [lowY, highY] = [0, 1];
  else if (lowY > 0 && lowY < highY * 0.6) lowY = 0;
  if (lowY === highY) [lowY, highY] = lowY === 0 ? [0, 1] : [lowY - Math.abs(lowY) * 0.1, highY + Math.abs(highY) * 0.1];
  const span = highY - lowY;
  if (!(options.bounded && lowY === 0 && highY === 1)) highY += span * 0.05;
  if (lowY !== 0) lowY -= span * 0.05;
  if (lowX === highX) [lowX, highX] = [lowX - 1, highX + 1];
  const px = (x) => left + ((x - lowX) / (highX - lowX)) * (width - left - right);
  const py = (y) => height - bottom - ((y - lowY) / (highY - lowY)) * (height - top - bottom);
  const path = (xs, ys) => xs.map((x, i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(ys[i]).toFixed(1)}`).join("");

  const image = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": `${options.title}. Last values: ${last}`,
  });
  for (const value of ticks(lowY, highY, 4)) {
    image.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: py(value), y2: py(value) }));
    image.append(svg("text", { class: "tick", x: left - 6, y: py(value) + 3.5, "text-anchor": "end" }, tickText(value)));
  }
  for (const value of ticks(lowX, highX, 5)) {
    const text = options.xLabel === "seconds" ? seconds(value) : tickText(value);
    image.append(svg("text", { class: "tick", x: px(value), y: height - 6, "text-anchor": "middle" }, text));
  }
  for (const line of drawn) {
    const kind = `line ${line.dash ? "dashed " : ""}c${line.colour % COLOURS}`;
    if (line.xs.length === 1) {
      image.append(svg("circle", { class: `dot ${kind}`, cx: px(line.xs[0]), cy: py(line.ys[0]), r: 3 }));
      continue;
    }
    if (options.weight) image.append(svg("path", { class: `${kind} faint`, d: path(line.xs, line.raw) }));
    image.append(svg("path", { class: kind, d: path(line.xs, line.ys) }));
    if (line.xs.length < 15) {
      line.xs.forEach((x, i) => image.append(svg("circle", { class: `dot ${kind}`, cx: px(x), cy: py(line.ys[i]), r: 2.4 })));
    }
  }
  const cross = svg("line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" });
  image.append(cross);
  const values = el("div", { class: "values" });
  const show = (x) => {
    const nearest = drawn.map((line) => {
      let best = 0;
      line.xs.forEach((one, i) => { if (Math.abs(one - x) < Math.abs(line.xs[best] - x)) best = i; });
      return { line, x: line.xs[best], y: line.ys[best] };
    });
    const at = nearest.reduce((a, b) => (Math.abs(a.x - x) <= Math.abs(b.x - x) ? a : b)).x;
    cross.setAttribute("x1", px(at));
    cross.setAttribute("x2", px(at));
    cross.setAttribute("visibility", "visible");
    replace(
      values,
      el("span", { class: "quiet" }, options.xLabel === "seconds" ? seconds(at) : `step ${number(at)}`),
      nearest.map(({ line, y }) => el("span", {}, el("i", { class: `swatch c${line.colour % COLOURS}` }), `${line.label} `, el("b", {}, number(y)))),
    );
    return at;
  };
  const rest = () => {
    cross.setAttribute("visibility", "hidden");
    replace(
      values,
      drawn.map((line) => el("span", {}, el("i", { class: `swatch c${line.colour % COLOURS}` }), `${line.label} `, el("b", {}, number(line.ys.at(-1))))),
    );
  };
  image.addEventListener("pointermove", (event) => {
    const box = image.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    show(lowX + ((x - left) / (width - left - right)) * (highX - lowX));
  });
  let at = highX;
  image.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    const xs = [...new Set(drawn.flatMap((line) => line.xs))].sort((a, b) => a - b);
    const place = xs.findIndex((x) => x >= at);
    const next = (place < 0 ? xs.length - 1 : place) + (event.key === "ArrowRight" ? 1 : -1);
    at = show(xs[Math.min(xs.length - 1, Math.max(0, next))]);
  });
  image.addEventListener("pointerleave", rest);
  image.addEventListener("blur", rest);
  rest();
  return append(figure, [image, values]);
}

// The middle 98 % of values: an outlier does not set the scale of a smoothed line.
function limits(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return [sorted[Math.floor(sorted.length * 0.01)], sorted[Math.ceil(sorted.length * 0.99) - 1]];
}
