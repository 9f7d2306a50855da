// A line chart by step: drawn anew whenever points come, read with the pointer or the arrow keys.

import { h, newId, s } from "./dom.js";
import { extent, scale, ticks } from "./scale.js";
import { smoothed, thinned } from "./series.js";
import { figure, whole } from "./words.js";

const HEIGHT = 180;
const MARGIN = { top: 10, right: 10, bottom: 22, left: 52 };
const MANY = 80; // points from which on a noisy line is drawn faintly, with its moving mean
const MARKED = 40; // points up to which each has its mark

/**
 * A chart with a title. `draw` takes `[{ name, points, kind }]`: `first` is drawn in the accent, `second` dashed,
 * `dots` with a mark at each point. What is `noisy` is drawn with its mean, once there is much of it.
 * Without any point it says what it is told to.
 */
export function lineChart(title, { unit = "", format = figure, noisy = false } = {}) {
  const heading = newId("chart");
  const svg = s("svg", { class: "chart", role: "img", tabindex: 0, height: HEIGHT, "aria-labelledby": heading });
  const reading = h("span", { class: "reading" });
  const summary = h("span", { class: "unseen" });
  const name = h(
    "span",
    { id: heading },
    h("b", {}, title),
    unit && h("span", { class: "muted" }, ` ${unit}`),
    summary,
  );
  const element = h("figure", { class: "plot" }, h("figcaption", { class: "plot-head" }, name, reading), svg);
  let lines = [];
  let absence = "nothing yet";
  let at = null; // the step that is read; null: the last one

  const paint = () => {
    const view = viewOf(lines, svg.clientWidth || 320);
    svg.setAttribute("viewBox", `0 0 ${view.width} ${HEIGHT}`);
    svg.replaceChildren(
      ...(view.isEmpty
        ? [empty(view, absence)]
        : [...axes(view, format), ...lines.flatMap((line) => pathsOf(line, view, noisy))]),
    );
    if (!view.isEmpty) svg.append(...cross(view, at));
    reading.textContent = view.isEmpty ? "" : read(lines, at, format);
    summary.textContent = view.isEmpty ? `, ${absence}` : `, last: ${read(lines, null, format)}`;
  };
  const move = (step) => {
    at = step;
    requestAnimationFrame(paint);
  };
  svg.addEventListener("pointermove", (event) => {
    const { left } = svg.getBoundingClientRect();
    move(nearest(lines, viewOf(lines, svg.clientWidth).stepAt(event.clientX - left)));
  });
  svg.addEventListener("pointerleave", () => move(null));
  svg.addEventListener("blur", () => move(null));
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const steps = longest(lines).map(([step]) => step);
    const index = at == null ? steps.length - 1 : steps.indexOf(at) + by;
    move(steps[Math.min(steps.length - 1, Math.max(0, index))] ?? null);
  });
  new ResizeObserver(() => requestAnimationFrame(paint)).observe(svg);
  return {
    element,
    draw(next, without = "nothing yet") {
      lines = next;
      absence = without;
      paint();
    },
  };
}

function viewOf(lines, width) {
  const all = lines.flatMap((line) => line.points);
  const steps = all.map(([step]) => step);
  const [from, to] = [
    steps.reduce((a, b) => Math.min(a, b), Infinity),
    steps.reduce((a, b) => Math.max(a, b), -Infinity),
  ];
  const values = extent(all.map(([, value]) => value));
  const across = [MARGIN.left, width - MARGIN.right];
  return {
    width,
    values,
    steps: [from, to],
    isEmpty: all.length === 0,
    x: from === to ? () => (across[0] + across[1]) / 2 : scale([from, to], across),
    y: scale(values, [HEIGHT - MARGIN.bottom, MARGIN.top]),
    stepAt: scale(across, [from, to]),
  };
}

function axes({ width, values, steps, x, y }, format) {
  const level = ticks(values, 4).flatMap((value) => [
    s("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
    s("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, format(value)),
  ]);
  const along = ticks(steps, Math.max(2, width / 110))
    .filter(Number.isInteger)
    .map((step) => s("text", { x: x(step), y: HEIGHT - 6, "text-anchor": "middle" }, whole(step)));
  return [...level, ...along];
}

function pathsOf({ points, kind = "first" }, { x, y, width }, noisy) {
  if (points.length === 0) return [];
  const path = (given, faint = "") => {
    const at = thinned(given, width).map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`);
    return s("polyline", { class: `line ${kind} ${faint}`, points: at.join(" ") });
  };
  const marks = (kind === "dots" && points.length <= MARKED) || points.length === 1 ? points : [];
  const lines = noisy && points.length > MANY ? [path(points, "faint"), path(smoothed(points))] : [path(points)];
  return [
    ...lines,
    ...marks.map(([step, value]) => s("circle", { class: `mark ${kind}`, cx: x(step), cy: y(value), r: 3 })),
  ];
}

function cross({ x }, at) {
  return at == null
    ? []
    : [s("line", { class: "cross", x1: x(at), x2: x(at), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom })];
}

function empty({ width }, absence) {
  return s("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, absence);
}

/** What the lines say at a step, or at their ends. */
function read(lines, at, format) {
  const told = lines
    .filter(({ points }) => points.length > 0)
    .map(({ name, points }) => ({
      name,
      point: at == null ? points.at(-1) : (points.findLast(([step]) => step <= at) ?? points[0]),
    }));
  const step = at ?? Math.max(...told.map(({ point }) => point[0]));
  return [...told.map(({ name, point }) => `${name} ${format(point[1])}`), `step ${whole(step)}`].join(" · ");
}

function longest(lines) {
  return lines.reduce((found, { points }) => (points.length > found.length ? points : found), []);
}

function nearest(lines, step) {
  const points = longest(lines);
  return points.length === 0
    ? null
    : points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a))[0];
}
