// What the service would decide of a spec: the plan and its memory, or what would fit.

import { memoryBar } from "../bars.js";
import { h } from "../dom.js";
import { callout, facts, failure } from "../parts.js";
import { bytes, duration, figure, money, spaced, whole } from "../words.js";

/** An estimate or a refusal. `take` is called with the change that the user takes. */
export function verdict(answer, usable, take) {
  return answer.fits ? fitting(answer, usable) : refused(answer, take);
}

/** Why there is none: of the API, in its own words. */
export const unanswered = (error) => [failure(error)];

function fitting(
  { gpu_class: gpuClass, plan, memory, speed, live_workers: workers, warnings, target_modules: targets },
  usable,
) {
  const steps = speed?.steps;
  return [
    callout(
      "good",
      `Fits ${gpuClass}`,
      `About ${bytes(memory.expected_bytes)}${usable ? ` of ${bytes(usable)}` : ""}, at most ${bytes(memory.high_bytes)}.`,
    ),
    workers === 0 &&
      callout("warn", "Nobody serves this class now", "The job would be accepted, and wait for a worker."),
    ...warnings.map((warning) => callout("warn", spaced(warning.code), warning.message)),
    h("h3", {}, "Memory"),
    ...memoryBar(memory.components, {
      limit: usable,
      label: `Predicted memory by component, ${bytes(memory.expected_bytes)} in all`,
    }),
    h("h3", {}, "Time and cost"),
    speed
      ? facts([
          ["Speed", `${span(speed.tokens_per_second, whole)} tokens/s`],
          ["Steps", steps == null ? "known once there is a dataset" : whole(steps)],
          ["Time", speed.duration_seconds && span(speed.duration_seconds, duration)],
          ["Cost", speed.cost && span(speed.cost, money)],
        ])
      : h("p", { class: "muted" }, "The operator has not described this class's cards: no speed is forecast."),
    h("h3", {}, "Plan"),
    facts([
      ["Mode", plan.mode],
      ["Recomputed", spaced(plan.recompute)],
      ["Microbatch", `${whole(plan.microbatch_tokens)} tokens`],
      ["Packing", plan.packing ? "yes" : "no"],
      ["Optimizer", plan.optim],
      ["Adapted", targets.join(", ")],
    ]),
  ];
}

const span = ({ low, expected, high }, format) =>
  low === high ? format(expected) : `${format(expected)} (${format(low)} to ${format(high)})`;

function refused(
  {
    message,
    needed_bytes: needed,
    available_bytes: available,
    needed: components,
    changes,
    fits_here: others,
    required_class: required,
  },
  take,
) {
  return [
    callout("bad", "Does not fit", message),
    changes.length > 0 && h("h3", {}, "What would fit"),
    changes.length > 0 &&
      h(
        "ul",
        { class: "changes" },
        changes.map((change) => h("li", {}, changeButton(change, take))),
      ),
    required && h("p", { class: "muted after" }, `A worker of class ${required} would hold it as it is.`),
    changes.length === 0 &&
      others?.length > 0 &&
      h("p", { class: "muted after" }, `Bases that fit with these settings: ${others.join(", ")}.`),
    components && h("h3", {}, "What it would need at least"),
    ...(components
      ? memoryBar(withMargin(components, needed), {
          limit: available,
          label: `${bytes(needed)} needed, ${bytes(available)} available`,
        })
      : []),
  ];
}

/** The parts with what the forecast adds to them because it may be off: together they are what is needed. */
function withMargin(components, needed) {
  const parts = Object.values(components).reduce((sum, size) => sum + size, 0);
  return { ...components, margin_of_the_forecast: needed - parts };
}

function changeButton(change, take) {
  const { param, from, to, gpu_class: gpuClass, needed_bytes: needed } = change;
  return h(
    "button",
    { type: "button", class: "change", onclick: () => take(change) },
    h("b", {}, `${param} = ${shownValue(to)}`),
    h("span", { class: "note" }, `instead of ${shownValue(from)}; ${bytes(needed)} on ${gpuClass}`),
  );
}

const shownValue = (value) => (typeof value === "number" ? figure(value, 7) : String(value));
