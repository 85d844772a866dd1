// A line chart of some series over the number of a segment or a step.
import { el } from "./dom.js";

const WIDTH = 640;
const HEIGHT = 240;
const EDGE = { left: 44, right: 10, top: 10, bottom: 26 };
const SMOOTH = 8;
const MOST = 300; // points of a line: of a long text, each is the mean of some

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

/** The mean of each value and those before it. */
function smooth(points) {
  return points.map(([x], at) => {
    const near = points.slice(Math.max(0, at - SMOOTH + 1), at + 1);
    return [x, near.reduce((sum, [, y]) => sum + y, 0) / near.length];
  });
}

function thin(points) {
  const size = Math.ceil(points.length / MOST);
  if (size === 1) return points;
  const found = [];
  for (let at = 0; at < points.length; at += size) {
    const part = points.slice(at, at + size);
    found.push([part.at(-1)[0], part.reduce((sum, [, y]) => sum + y, 0) / part.length]);
  }
  return found;
}

function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

export class Chart {
  /** `series`: a label and a class for each line; `unit`: of the values; `step`: what the numbers count. */
  constructor(series, unit, step) {
    Object.assign(this, { unit, step });
    this.series = series.map((one) => ({ ...one, points: [] }));
    this.drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    const legend = series.map(({ label, style }) => el("span", { class: `key ${style}` }, label));
    this.node = el("figure", { class: "chart", hidden: true }, el("figcaption", {}, `${unit} by ${step}`, ...legend), this.drawing);
  }

  add(index, x, y) {
    if (y != null) this.series[index].points.push([x, y]);
  }

  clear() {
    for (const one of this.series) one.points = [];
    this.node.hidden = true;
  }

  draw() {
    const lines = this.series.map(({ points, style }) => ({ points: thin(points), style }));
    const all = lines.flatMap(({ points }) => points);
    if (!all.length) return;
    this.node.hidden = false;
    const last = Math.max(2, ...all.map(([x]) => x));
    const low = Math.min(...all.map(([, y]) => y)) * 0.95;
    const high = Math.max(...all.map(([, y]) => y)) * 1.05 || 1;
    const across = (x) => EDGE.left + ((x - 1) / (last - 1)) * (WIDTH - EDGE.left - EDGE.right);
    const up = (y) => HEIGHT - EDGE.bottom - ((y - low) / (high - low || 1)) * (HEIGHT - EDGE.top - EDGE.bottom);
    const parts = [];
    for (const y of ticks(low, high, 4)) {
      parts.push(svg("line", { class: "grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: up(y), y2: up(y) }));
      parts.push(svg("text", { x: EDGE.left - 6, y: up(y) + 4, "text-anchor": "end" }, String(y)));
    }
    for (const x of ticks(1, last, 6).filter(Number.isInteger)) {
      parts.push(svg("text", { x: across(x), y: HEIGHT - 8, "text-anchor": "middle" }, String(x)));
    }
    for (const { points, style } of lines) {
      const line = (some) => some.map(([x, y]) => `${across(x).toFixed(1)},${up(y).toFixed(1)}`).join(" ");
      if (points.length > SMOOTH) parts.push(svg("polyline", { class: `each ${style}`, points: line(points) }));
      parts.push(svg("polyline", { class: `line ${style}`, points: line(points.length > SMOOTH ? smooth(points) : points) }));
      for (const [x, y] of points.length === 1 ? points : []) {
        parts.push(svg("circle", { class: `dot ${style}`, cx: across(x), cy: up(y), r: 3 }));
      }
    }
    this.drawing.replaceChildren(...parts);
    this.drawing.setAttribute("aria-label", this.describe());
  }

  /** The first and the last value of each line, for those who do not see it. */
  describe() {
    const said = this.series.filter(({ points }) => points.length).map(({ label, points }) => {
      const line = smooth(thin(points));
      return `${label}: from ${line[0][1].toFixed(2)} to ${line.at(-1)[1].toFixed(2)}`;
    });
    return `${this.unit} by ${this.step}. ${said.join(". ")}.`;
  }
}
