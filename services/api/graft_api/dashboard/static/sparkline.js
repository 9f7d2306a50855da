// A loss curve the size of a word.

import { s } from "./dom.js";
import { extent, scale } from "./scale.js";
import { smoothed, thinned } from "./series.js";

const WIDTH = 96;
const HEIGHT = 22;

/** The points as a small line; the number beside it says the same in words. */
export function sparkline(points) {
  const drawn = thinned(points.length > WIDTH ? smoothed(points) : points, WIDTH);
  const svg = s("svg", {
    class: "spark",
    width: WIDTH,
    height: HEIGHT,
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    "aria-hidden": "true",
  });
  if (drawn.length < 2) return svg;
  const x = scale([drawn[0][0], drawn.at(-1)[0]], [1, WIDTH - 3]);
  const y = scale(extent(drawn.map(([, value]) => value)), [HEIGHT - 2, 2]);
  const [step, value] = drawn.at(-1);
  svg.append(
    s("polyline", {
      class: "line first",
      points: drawn.map(([at, height]) => `${x(at).toFixed(1)},${y(height).toFixed(1)}`).join(" "),
    }),
    s("circle", { class: "mark first", cx: x(step), cy: y(value), r: 2 }),
  );
  return svg;
}
