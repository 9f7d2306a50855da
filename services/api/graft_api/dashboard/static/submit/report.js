// What would be learnt from a chosen file: asked of a worker before there is a job.

import { get } from "../api.js";
import { h, redraw } from "../dom.js";
import { callout, failure, section, waiting } from "../parts.js";
import { reportOf } from "../report.js";
import { spaced, whole } from "../words.js";

const LOOK_SECONDS = 1; // as `Retry-After` says
const NOTHING_YET = "What would be learnt appears here, once there are an uploaded dataset and settings without fault.";
const STEPS = {
  queued: "Waiting for a worker that prepares data …",
  running: "A worker reads the rows with the base's tokenizer …",
};

/** The report of a form's dataset. `show` takes a spec as the service would train it, or null where there is none. */
export function dataPart(signal) {
  const told = h("div", { role: "status" }, waiting(NOTHING_YET));
  const body = h("div", {});
  let path = null;
  let asking = new AbortController();
  signal.addEventListener("abort", () => asking.abort());

  const tell = (text) => redraw(told, text, () => waiting(text)); // told once, however often it is looked at
  const tellOf = (error) => redraw(told, error.message, () => failure(error));
  const show = async (spec) => {
    const wanted = pathOf(spec);
    if (wanted === path) return;
    path = wanted;
    asking.abort();
    asking = new AbortController();
    const { signal: stale } = asking;
    body.replaceChildren();
    tell(wanted ? STEPS.queued : NOTHING_YET);
    if (!wanted) return;
    try {
      const report = await made(wanted, (status) => tell(STEPS[status]), tellOf, stale);
      tell(`${whole(report.rows)} rows, as ${spec.base_model} reads them.`);
      body.replaceChildren(...report.warnings.map(warning), ...reportOf(report));
    } catch (error) {
      if (stale.aborted) return;
      path = null; // asked for again, it may be there
      tellOf(error);
    }
  };
  return { element: section("Data", told, body), show };
}

function pathOf(spec) {
  if (!spec?.dataset.file) return null;
  const { base_model, revision, training, validation, dataset } = spec;
  const settings = {
    base_model,
    revision,
    max_length: training.max_length,
    completion_only_loss: training.completion_only_loss,
    ...(validation?.split && { validation_split: validation.split, seed: training.seed }),
  };
  return `/files/${dataset.file}/report?${new URLSearchParams(settings)}`;
}

async function made(path, tell, tellOf, signal) {
  for (;;) {
    let pause = LOOK_SECONDS;
    try {
      const { status, report } = await get(path, { signal });
      if (report) return report;
      tell(status);
    } catch (error) {
      if (signal.aborted || !isPassing(error)) throw error;
      tellOf(error);
      pause = error.retryAfter ?? LOOK_SECONDS;
    }
    await new Promise((resolve) => setTimeout(resolve, pause * 1000));
  }
}

/** Whether the same question may be answered later; not after workers have failed at the report itself. */
const isPassing = ({ status, code }) =>
  code !== "report_unavailable" && (status === undefined || [429, 502, 503, 504].includes(status));

const warning = ({ code, message }) => callout("warn", spaced(code), message);
