// A job's history: every run that was begun, and every event but the steps.

import { h, redraw } from "../dom.js";
import { row, section, table, waiting } from "../parts.js";
import { clock, duration, spaced, whole } from "../words.js";

const RUN_HEADS = ["Run", "Stage", "Worker", "Began", "Took", "Ended"];
const EVENT_HEADS = ["When", "Event", "Message"];
const ENDS = new Set(["prepared", "requeued", "paused", "succeeded", "failed", "cancelled"]);

/** Each epoch of the job: who held it, for how long, and how it ended. */
export function attemptsPart(view) {
  const body = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Runs" });
  return {
    element: h("div", { class: "wide" }, section("Runs", body)),
    update() {
      const runs = runsOf(view.events);
      redraw(body, runs, () =>
        runs.length ? [table("Runs", RUN_HEADS, runs.map(runRow))] : [waiting("No worker has taken it yet.")],
      );
    },
  };
}

/** Everything that happened, newest first. */
export function eventsPart(view) {
  const body = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Events" });
  return {
    element: section("Events", body),
    update() {
      const told = view.events.filter(({ type }) => type !== "metrics");
      redraw(body, told.length, () => [table("Events", EVENT_HEADS, told.toReversed().map(eventRow))]);
    },
  };
}

function runsOf(events) {
  const runs = new Map();
  for (const { type, epoch, data, message, created_at: moment } of events) {
    if (type === "claimed") runs.set(epoch, { epoch, ...data, began: moment, ended: null, how: "under way" });
    const run = runs.get(epoch);
    if (run && ENDS.has(type) && run.ended === null)
      Object.assign(run, { ended: moment, how: type === "prepared" ? "data prepared" : message });
  }
  return [...runs.values()];
}

function runRow({ epoch, stage, attempt, worker, began, ended, how }) {
  const took = ended === null ? "" : duration(ended - began);
  const what = stage === "train" ? `train, attempt ${attempt}` : stage;
  return row(RUN_HEADS, [whole(epoch), what, worker, h("span", { class: "nowrap" }, clock(began)), took, how]);
}

function eventRow({ type, level, message, created_at: moment }) {
  return row(EVENT_HEADS, [
    h("span", { class: "nowrap" }, clock(moment)),
    h("span", { class: `nowrap event ${level}` }, spaced(type)),
    message,
  ]);
}
