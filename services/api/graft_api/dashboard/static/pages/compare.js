// Two jobs beside each other: their curves in one picture, and the settings in which they differ.

import { get, list } from "../api.js";
import { lineChart } from "../chart.js";
import { h } from "../dom.js";
import { badge, failure, row, section, table, waiting } from "../parts.js";
import { pointsOf } from "../series.js";
import { bytes, duration, figure, money, titleOf, whole } from "../words.js";

const CHOICES = 100; // of the newest jobs
const CURVES = [
  ["loss", "Training loss", { noisy: true }],
  ["eval_loss", "Held-out loss", {}],
  ["learning_rate", "Learning rate", {}],
  ["tokens_per_second", "Speed", { unit: "tokens/s", format: whole, noisy: true }],
];

export async function comparePage(root, signal, a, b) {
  const { data } = await list("/jobs", {}, CHOICES, { signal });
  const body = h("div", { class: "beside" });
  root.append(h("div", { class: "head" }, h("h1", {}, "Compare two jobs")), chooser(data, [a, b]), body);
  if (!a || !b) {
    body.append(waiting("Choose two jobs."));
    return;
  }
  try {
    const sides = await Promise.all([a, b].map((id) => sideOf(id, signal)));
    body.append(
      curves(sides),
      h("div", { class: "card" }, outcomes(sides)),
      section("Settings that differ", differences(sides)),
    );
  } catch (error) {
    if (!signal.aborted) body.append(failure(error));
  }
}

async function sideOf(id, signal) {
  const [job, metrics] = await Promise.all([get(`/jobs/${id}`, { signal }), get(`/jobs/${id}/metrics`, { signal })]);
  return { job, metrics };
}

function chooser(jobs, chosen) {
  const selects = chosen.map((id, index) => {
    const known = jobs.some((job) => job.id === id) || !id ? jobs : [...jobs, { id, spec: {} }];
    const options = known.map((job) =>
      h("option", { value: job.id, selected: job.id === id }, job.spec.name ? `${job.spec.name} (${job.id})` : job.id),
    );
    const select = h("select", {}, h("option", { value: "" }, "choose…"), options);
    return { select, label: h("label", {}, h("span", {}, stroke(index), index === 0 ? "First" : "Second"), select) };
  });
  const go = () => {
    location.hash = `#/compare/${selects.map(({ select }) => select.value).join("/")}`;
  };
  return h(
    "form",
    { class: "filters", onchange: go, "aria-label": "Jobs" },
    selects.map(({ label }) => label),
  );
}

const stroke = (index) => h("span", { class: `stroke ${index === 0 ? "first" : "second"}`, "aria-hidden": "true" });

function curves(sides) {
  const plots = CURVES.map(([name, title, options]) => {
    const chart = lineChart(title, options);
    const lines = sides.map(({ metrics }, index) => ({
      name: index === 0 ? "first" : "second",
      points: pointsOf(metrics, name),
      kind: index === 0 ? "first" : "second",
    }));
    requestAnimationFrame(() => chart.draw(lines));
    return chart.element;
  });
  return section("Curves", h("div", { class: "plots" }, plots));
}

function outcomes(sides) {
  const heads = ["", ...sides.map(({ job }) => titleOf(job))];
  const rows = [
    ["Status", (job) => badge(job)],
    ["Base model", (job) => job.base_model],
    ["GPU class", (job) => job.gpu_class],
    ["Steps", (job) => whole(job.progress.step)],
    ["Training loss", (job) => figure(job.metrics.train_loss)],
    ["Held-out loss", (job) => figure(job.metrics.eval_loss)],
    ["Tokens seen", (job) => whole(job.progress.tokens_seen)],
    ["Measured peak", (job) => bytes(job.memory.measured_peak_bytes)],
    ["Time", (job) => (job.finished_at && job.started_at ? duration(job.finished_at - job.started_at) : "–")],
    ["Cost", (job) => money(job.cost)],
  ];
  return table(
    "Outcomes",
    heads,
    rows.map(([name, of]) => row(heads, [h("b", {}, name), ...sides.map(({ job }) => of(job))])),
  );
}

function differences(sides) {
  const [one, other] = sides.map(({ job }) => flat({ ...job.spec, plan: job.plan }));
  const names = [...new Set([...Object.keys(one), ...Object.keys(other)])].filter((name) => one[name] !== other[name]);
  const heads = ["Setting", ...sides.map(({ job }) => titleOf(job))];
  return names.length
    ? table(
        "Settings that differ",
        heads,
        names.map((name) => row(heads, [h("code", {}, name), one[name] ?? "–", other[name] ?? "–"])),
      )
    : waiting("None: they were asked for alike.");
}

/** Nested settings as dotted names and their texts. */
function flat(value, prefix = "") {
  if (value === null || typeof value !== "object" || Array.isArray(value))
    return { [prefix]: typeof value === "string" ? value : JSON.stringify(value) };
  return Object.assign(
    {},
    ...Object.entries(value).map(([name, part]) => flat(part, prefix ? `${prefix}.${name}` : name)),
  );
}
