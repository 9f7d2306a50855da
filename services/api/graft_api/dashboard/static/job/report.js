// What a job learns from.

import { get } from "../api.js";
import { h } from "../dom.js";
import { hasEnded, section, waiting } from "../parts.js";
import { reportOf } from "../report.js";

/** The report on a job's data, as soon as it is prepared. */
export function reportPart(view) {
  const body = h("div", {}, waiting("The data is not prepared yet."));
  let isAsked = false;
  return {
    element: h("div", { class: "wide" }, section("Data", body)),
    async update() {
      if (isAsked) return;
      if (!view.events.some(({ type }) => type === "prepared")) {
        if (hasEnded(view.job)) body.replaceChildren(waiting("It ended before its data was prepared."));
        return;
      }
      isAsked = true;
      try {
        const { report } = await get(`/jobs/${view.job.id}/report`, { signal: view.signal });
        body.replaceChildren(...reportOf(report));
      } catch (error) {
        if (!view.signal.aborted) body.replaceChildren(waiting(error.message));
      }
    },
  };
}
