// What a job was expected to hold at its worst moment, by component, and what it did.

import { memoryBar } from "../bars.js";
import { h, redraw } from "../dom.js";
import { facts, section, waiting } from "../parts.js";
import { bytes, figure, spaced } from "../words.js";

export function memoryPart(view) {
  const body = h("div", {});
  return {
    element: section("Memory", body),
    update() {
      const { memory } = view.job;
      redraw(body, memory, () => (memory.forecast ? drawn(memory) : [waiting("An earlier version placed this job: its forecast was not kept by component.")]));
    },
  };
}

function drawn({ forecast, measured, predicted_peak_bytes: predicted, measured_peak_bytes: peak }) {
  const ratio = peak && predicted ? ` (${figure((100 * peak) / predicted, 3)} % of it)` : "";
  const made = Object.entries(measured).filter(([name]) => name !== "measured_peak_bytes");
  return [
    h("h3", {}, "Predicted"),
    ...memoryBar(forecast.components, { label: `Predicted memory by component, ${bytes(forecast.expected_bytes)} in all` }),
    facts([
      ["Expected peak", `${bytes(predicted)}, at most ${bytes(forecast.high_bytes)}`],
      ["Measured peak", peak ? `${bytes(peak)}${ratio}` : "not measured yet"],
      ...made.map(([name, size]) => [`· ${spaced(name.replace("_bytes", ""))}`, bytes(size)]),
    ]),
  ];
}
