// What a job was expected to hold at its worst moment, by component, and what it did.

import { memoryBar } from "../bars.js";
import { h, redraw } from "../dom.js";
import { facts, section, waiting } from "../parts.js";
import { bytes, figure } from "../words.js";

export function memoryPart(view) {
  const body = h("div", {});
  return {
    element: section("Memory", body),
    update() {
      const { memory } = view.job;
      redraw(body, memory, () =>
        memory.forecast
          ? drawn(memory)
          : [waiting("An earlier version placed this job: its forecast was not kept by component.")],
      );
    },
  };
}

function drawn({ forecast, measured, predicted_peak_bytes: predicted, measured_peak_bytes: peak }) {
  const ratio = peak && predicted ? ` (${figure((100 * peak) / predicted, 3)} % of it)` : "";
  const scale = Math.max(peak ?? 0, forecast.expected_bytes);
  return [
    h("h3", {}, "Predicted"),
    ...memoryBar(forecast.components, {
      limit: scale,
      label: `Predicted memory by component, ${bytes(forecast.expected_bytes)} in all`,
    }),
    facts([
      ["Expected peak", `${bytes(predicted)}, at most ${bytes(forecast.high_bytes)}`],
      ["Measured peak", peak ? `${bytes(peak)}${ratio}` : "not measured yet"],
    ]),
    ...(peak
      ? [
          h("h3", {}, "Measured"),
          ...memoryBar(madeOf(measured, peak), {
            limit: scale,
            label: `Measured memory by component, ${bytes(peak)} in all`,
          }),
        ]
      : []),
  ];
}

/** On a GPU the peak is the allocator's and what lies outside it; on a CPU it is one figure. */
function madeOf({ reserved_peak_bytes: reserved, allocated_peak_bytes: allocated, outside_bytes: outside }, peak) {
  if (reserved == null) return { "the process, resident": peak };
  return {
    "tensors, at their peak": allocated,
    "reserved beyond them": reserved - allocated,
    "context, libraries, paged optimizer": outside,
  };
}
