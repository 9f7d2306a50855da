// Bars: bytes by component against a limit, and counts of rows by length.

import { h, s } from "./dom.js";
import { bytes, spaced, whole } from "./words.js";

const SHADES = 8; // classes shade-0 … shade-7 of charts.css; the smallest parts share the last

/** Memory by component as one bar up to `limit`, with a list that names each part and its bytes. */
export function memoryBar(components, { limit, label }) {
  const parts = Object.entries(components)
    .filter(([, size]) => size > 0)
    .sort(([, a], [, b]) => b - a);
  const total = parts.reduce((sum, [, size]) => sum + size, 0);
  const full = Math.max(limit ?? 0, total);
  let from = 0;
  const rects = parts.map(([, size], index) => {
    const rect = s("rect", {
      class: `shade-${Math.min(index, SHADES - 1)}`,
      x: (1000 * from) / full,
      y: 0,
      width: Math.max(1, (1000 * size) / full - 1),
      height: 16,
    });
    from += size;
    return rect;
  });
  if (limit && limit < full)
    rects.push(s("rect", { class: "limit", x: (1000 * limit) / full - 2, y: 0, width: 5, height: 16 }));
  return [
    s(
      "svg",
      { class: "bar-chart", viewBox: "0 0 1000 16", preserveAspectRatio: "none", role: "img", "aria-label": label },
      ...rects,
    ),
    h(
      "ul",
      { class: "key" },
      parts.map(([name, size], index) =>
        h(
          "li",
          {},
          h("span", { class: `swatch shade-${Math.min(index, SHADES - 1)}`, "aria-hidden": "true" }),
          h("span", {}, spaced(name)),
          h("span", { class: "number" }, bytes(size)),
        ),
      ),
    ),
  ];
}

/** One plain bar: how much of a whole is taken. */
export function shareBar(part, all, label) {
  const width = all > 0 ? Math.min(1000, (1000 * part) / all) : 0;
  return s(
    "svg",
    { class: "bar-chart thin", viewBox: "0 0 1000 6", preserveAspectRatio: "none", role: "img", "aria-label": label },
    s("rect", { class: "shade-0", x: 0, y: 0, width, height: 6 }),
  );
}

/** Rows by their number of tokens. */
export function histogram({ edges, counts }, label) {
  const most = Math.max(1, ...counts);
  const width = 1000 / Math.max(1, counts.length);
  const rects = counts.map((count, index) =>
    s(
      "rect",
      {
        class: "shade-1",
        x: index * width,
        y: 100 - (100 * count) / most,
        width: Math.max(1, width - 3),
        height: (100 * count) / most,
      },
      s("title", {}, `${whole(count)} rows of ${whole(edges[index])} to ${whole(edges[index + 1] - 1)} tokens`),
    ),
  );
  return h(
    "div",
    {},
    s(
      "svg",
      { class: "histogram", viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img", "aria-label": label },
      ...rects,
    ),
    h("div", { class: "ends muted" }, h("span", {}, whole(edges[0])), h("span", {}, `${whole(edges.at(-1))} tokens`)),
  );
}
