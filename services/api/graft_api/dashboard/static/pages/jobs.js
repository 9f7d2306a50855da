// All jobs, newest first: what each is doing now, and its loss.

import { get, list } from "../api.js";
import { h, redraw } from "../dom.js";
import { every } from "../every.js";
import { badge, failure, hasEnded, row, table } from "../parts.js";
import { shareBar } from "../bars.js";
import { pointsOf } from "../series.js";
import { sparkline } from "../sparkline.js";
import { ago, duration, figure, titleOf, whole } from "../words.js";

const STATUSES = [
  "validating_files",
  "queued",
  "running",
  "pausing",
  "paused",
  "cancelling",
  "succeeded",
  "failed",
  "cancelled",
];
const SIZES = [25, 100, 1000];
const HEADS = ["", "Job", "Status", "Progress", "Loss", "Class", "Submitted"];
const LOOK_SECONDS = 4;
const NEWEST = 100; // rows that are looked at again while more are shown
const WHOLE_SECONDS = 60; // between two looks at all of them
const CURVE_SECONDS = 15; // between two looks at a running job's curve
const CURVES_AT_ONCE = 4;

export async function jobsPage(root, signal) {
  const state = {
    filter: {},
    size: SIZES[0],
    pages: [null],
    rows: new Map(),
    chosen: new Set(),
    turns: 0,
    more: false,
    wholeAt: 0,
  };
  const told = h("div", { class: "muted", role: "status" });
  const curves = new Curves(signal);
  const compare = h("a", { class: "button", hidden: true }, "Compare");
  const pager = h("div", { class: "pager" });
  const grid = table("Jobs", HEADS, []);
  grid.classList.add("jobs");
  const [body] = grid.tBodies;

  const choose = (id, isOn) => {
    isOn ? state.chosen.add(id) : state.chosen.delete(id);
    const [a, b] = state.chosen;
    compare.hidden = state.chosen.size !== 2;
    compare.href = `#/compare/${a}/${b}`;
  };
  const look = async (count) => {
    const { turns, size } = state;
    const found = await list("/jobs", { ...state.filter, after: state.pages.at(-1) }, count, { signal });
    if (turns !== state.turns) return; // another page or filter was asked for meanwhile
    const rows = found.data.map((job) => rowFor(job, state, choose));
    if (count === size || !found.more) {
      show(body, rows);
      state.last = found.data.at(-1)?.id;
      state.more = found.more;
      state.wholeAt = Date.now();
      redraw(pager, [state.pages.length, state.more], () => pagerOf(state, turn));
    } else {
      show(body, [...rows, ...olderThan(rows, body)]);
    }
    curves.watch(rows);
    redraw(told, [body.rows.length, state.more], () => countOf(body.rows.length, state.more));
  };
  const turn = async () => {
    const started = performance.now();
    state.turns += 1;
    state.wholeAt = 0; // rows of before may be shown until then
    state.rows.clear();
    try {
      await look(state.size);
      const detail = body.rows.length;
      requestAnimationFrame(() => performance.measure("jobs-shown", { start: started, detail }));
    } catch (error) {
      if (!signal.aborted) redraw(told, error.message, () => failure(error));
    }
  };
  root.append(
    h("div", { class: "head" }, h("h1", {}, "Jobs"), h("a", { class: "button primary", href: "#/new" }, "New job")),
    filters(state, turn),
    h("div", { class: "above" }, told, compare),
    grid,
    pager,
  );
  await turn();
  const isDue = () => Date.now() - state.wholeAt > WHOLE_SECONDS * 1000;
  every(LOOK_SECONDS, () => look(isDue() ? state.size : Math.min(state.size, NEWEST)), signal);
}

/** The rows shown that newer ones tell nothing of. */
function olderThan(rows, body) {
  const { created_at: last } = rows.at(-1).job;
  const newer = new Set(rows);
  return Array.from(body.rows, ({ known }) => known).filter((row) => !newer.has(row) && row.job.created_at <= last);
}

const countOf = (count, more) => [
  count ? `${whole(count)} ${count === 1 ? "job" : "jobs"}${more ? ", and more" : ""}` : "No job matches.",
];

/** Put rows in their order; those that stay where they are are not touched, so that focus stays. */
function show(body, rows) {
  const wanted = new Set(rows.map(({ element }) => element));
  for (const element of [...body.rows]) if (!wanted.has(element)) element.remove();
  let next = body.firstElementChild;
  for (const element of wanted) {
    if (element === next) next = next.nextElementSibling;
    else body.insertBefore(element, next);
  }
}

function filters(state, turn) {
  const option = (value, text) => h("option", { value }, text);
  const status = h(
    "select",
    { name: "status" },
    option("", "any"),
    STATUSES.map((word) => option(word, word.replaceAll("_", " "))),
  );
  const base = h("input", { name: "base_model", list: "bases", autocomplete: "off", placeholder: "any" });
  const bases = h("datalist", { id: "bases" });
  const pair = h("input", { name: "metadata", placeholder: "team=search", autocomplete: "off" });
  const size = h(
    "select",
    { name: "size" },
    SIZES.map((count) => option(count, whole(count))),
  );
  get("/models").then(
    ({ data }) => bases.append(...data.map(({ id }) => option(id))),
    () => {},
  );
  const apply = (event) => {
    event.preventDefault();
    const [name, value] = pair.value.split(/=(.*)/s);
    const metadata = name && value ? { [`metadata[${name.trim()}]`]: value.trim() } : {};
    state.filter = { status: status.value, base_model: base.value.trim(), ...metadata };
    state.size = Number(size.value);
    state.pages = [null];
    turn();
  };
  return h(
    "form",
    { class: "filters", onsubmit: apply, onchange: apply, "aria-label": "Filter" },
    h("label", {}, "Status", status),
    h("label", {}, "Base model", base, bases),
    h("label", {}, "Metadata", pair),
    h("label", {}, "Rows", size),
    h("button", { class: "unseen" }, "Apply"),
  );
}

function pagerOf(state, turn) {
  const to = (pages) => () => {
    state.pages = pages;
    turn();
  };
  return [
    h("button", { type: "button", disabled: state.pages.length === 1, onclick: to(state.pages.slice(0, -1)) }, "Newer"),
    h("span", { class: "muted" }, `Page ${state.pages.length}`),
    h("button", { type: "button", disabled: !state.more, onclick: to([...state.pages, state.last]) }, "Older"),
  ];
}

/** The row of a job, made once and brought up to date from then on. */
function rowFor(job, state, choose) {
  const known = state.rows.get(job.id) ?? madeRow(job, state, choose);
  state.rows.set(job.id, known);
  known.job = job;
  const [, , status, progress, , , submitted] = known.element.cells;
  redraw(status, [job.status, job.phase, job.queue?.reason, job.error], () => [
    badge(job),
    noteOf(job) && h("span", { class: "note" }, noteOf(job)),
  ]);
  redraw(progress, job.progress, () => progressOf(job));
  redraw(known.value, job.metrics, () => [job.metrics.train_loss == null ? "" : figure(job.metrics.train_loss, 3)]);
  submitted.textContent = ago(job.created_at);
  return known;
}

function madeRow(job, state, choose) {
  const curve = h("span", { class: "curve" });
  const value = h("span", { class: "number" });
  const tick = h("input", {
    type: "checkbox",
    "aria-label": `Compare ${titleOf(job)}`,
    checked: state.chosen.has(job.id),
  });
  tick.addEventListener("change", () => choose(job.id, tick.checked));
  const name = h(
    "div",
    {},
    h("a", { href: `#/jobs/${job.id}` }, titleOf(job)),
    h("span", { class: "note" }, job.base_model),
  );
  const element = row(HEADS, [tick, name, null, null, h("div", { class: "loss" }, curve, value), job.gpu_class, null]);
  return { element, curve, value, job };
}

function noteOf(job) {
  if (job.error) return job.error.code;
  if (job.queue) return job.queue.reason;
  return "";
}

function progressOf(job) {
  const { step, total_steps: total, percent, eta_seconds: eta } = job.progress;
  if (!total) return [];
  const left = job.status === "running" && eta != null ? `, ${duration(eta)} left` : "";
  return [
    shareBar(percent, 100, `${figure(percent)} %`),
    h("span", { class: "note" }, `${whole(step)} of ${whole(total)} steps${left}`),
  ];
}

/** Fetches the loss of rows that are in sight, a few at once; of ended jobs once. */
class Curves {
  #wanted = [];
  #busy = 0;
  #seen;

  constructor(signal) {
    this.signal = signal;
    this.#seen = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        target.known.isSeen = isIntersecting;
        this.#want(target.known);
      }
    });
    signal.addEventListener("abort", () => this.#seen.disconnect());
  }

  watch(rows) {
    for (const known of rows) {
      if (known.element.known) this.#want(known);
      else {
        known.element.known = known;
        this.#seen.observe(known.element);
      }
    }
  }

  #want(known) {
    const isFresh = known.curveAt && (hasEnded(known.curveOf) || Date.now() - known.curveAt < CURVE_SECONDS * 1000);
    if (!known.isSeen || isFresh || !known.job.progress.step) return;
    [known.curveAt, known.curveOf] = [Date.now(), known.job];
    this.#wanted.push(known);
    this.#next();
  }

  async #next() {
    if (this.#busy >= CURVES_AT_ONCE || this.#wanted.length === 0) return;
    this.#busy += 1;
    const known = this.#wanted.shift();
    try {
      const metrics = await get(`/jobs/${known.job.id}/metrics`, { signal: this.signal });
      known.curve.replaceChildren(sparkline(pointsOf(metrics, "loss")));
    } catch (error) {
      if (!this.signal.aborted) console.warn(error);
    }
    this.#busy -= 1;
    this.#next();
  }
}
