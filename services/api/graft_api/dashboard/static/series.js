// What was measured while a job trained, as points by step.

/** Gathers `metrics` events; a step that was done twice stands once, as it was done last. */
export class Series {
  #values = new Map();

  add(data) {
    const { step, ...measured } = data;
    for (const [name, value] of Object.entries(measured)) {
      if (typeof value !== "number") continue;
      if (!this.#values.has(name)) this.#values.set(name, new Map());
      this.#values.get(name).set(step, value);
    }
  }

  /** The points of one name, by step. */
  points(name) {
    return [...(this.#values.get(name) ?? [])].sort(([a], [b]) => a - b);
  }
}

/** The points that GET /jobs/{id}/metrics gives of one name. */
export function pointsOf(metrics, name) {
  const found = metrics.series[name];
  return found ? found.steps.map((step, index) => [step, found.values[index]]) : [];
}

/** At most about so many points: of each stretch the lowest and the highest, so that no spike is lost. */
export function thinned(points, count) {
  if (points.length <= count) return points;
  const stretch = Math.ceil((2 * points.length) / count);
  const kept = [];
  for (let start = 0; start < points.length; start += stretch) {
    const part = points.slice(start, start + stretch);
    const low = part.reduce((a, b) => (b[1] < a[1] ? b : a));
    const high = part.reduce((a, b) => (b[1] > a[1] ? b : a));
    kept.push(...(low === high ? [low] : low[0] < high[0] ? [low, high] : [high, low]));
  }
  if (kept.at(-1) !== points.at(-1)) kept.push(points.at(-1));
  return kept;
}

/** The mean around each point, over about a fiftieth of them. */
export function smoothed(points) {
  const reach = Math.max(1, Math.round(points.length / 100));
  const sums = [0];
  for (const [, value] of points) sums.push(sums.at(-1) + value);
  return points.map(([step], index) => {
    const [from, to] = [Math.max(0, index - reach), Math.min(points.length, index + reach + 1)];
    return [step, (sums[to] - sums[from]) / (to - from)];
  });
}
