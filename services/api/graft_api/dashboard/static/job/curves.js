// The curves of a job, from its events.

import { lineChart } from "../chart.js";
import { h } from "../dom.js";
import { hasEnded, section, waiting } from "../parts.js";
import { Series } from "../series.js";
import { whole } from "../words.js";

/** Four charts that grow with the job. */
export function curvesPart(view) {
  const charts = {
    loss: lineChart("Training loss", { unit: "nats per token", noisy: true }),
    eval_loss: lineChart("Held-out loss", { unit: "nats per token" }),
    learning_rate: lineChart("Learning rate"),
    tokens_per_second: lineChart("Speed", { unit: "tokens/s", format: whole, noisy: true }),
  };
  const series = new Series();
  let read = 0;
  const grid = h(
    "div",
    { class: "plots" },
    Object.values(charts).map(({ element }) => element),
  );
  return {
    element: h("div", { class: "wide" }, section("Curves", grid)),
    update() {
      const news = view.events.slice(read).filter(({ type }) => type === "metrics");
      if (hasEnded(view.job) && !view.events.some(({ type }) => type === "metrics")) {
        grid.replaceChildren(waiting("It ended before its first step."));
        return;
      }
      if (read > 0 && news.length === 0) return;
      read = view.events.length;
      news.forEach(({ data }) => series.add(data));
      for (const [name, chart] of Object.entries(charts)) {
        const kind = name === "eval_loss" ? "dots" : "first";
        const without = name === "eval_loss" && !view.job.spec.validation ? "the job has no validation" : "nothing yet";
        chart.draw([{ name: "", points: series.points(name), kind }], without);
      }
    },
  };
}
