// One job from its first event to its adapter, live.

import { get, history, post, remove } from "../api.js";
import { h, redraw } from "../dom.js";
import { every } from "../every.js";
import { adapterPart } from "../job/adapter.js";
import { curvesPart } from "../job/curves.js";
import { attemptsPart, eventsPart } from "../job/history.js";
import { logPart } from "../job/log.js";
import { memoryPart } from "../job/memory.js";
import { mergedPart } from "../job/merged.js";
import { reportPart } from "../job/report.js";
import { shareBar } from "../bars.js";
import { badge, callout, confirmed, failure, hasEnded, section, snippet, tiles } from "../parts.js";
import { follow } from "../stream.js";
import { ago, clock, duration, figure, money, titleOf, whole } from "../words.js";

const LOOK_SECONDS = 5; // beside the events: places in line and times left change without one

export async function jobPage(root, signal, jobId) {
  const [job, events] = await Promise.all([get(`/jobs/${jobId}`, { signal }), history(jobId, { signal })]);
  const view = { job, events, signal };
  const parts = [
    head(view),
    curvesPart(view),
    memoryPart(view),
    adapterPart(view),
    mergedPart(view),
    reportPart(view),
    attemptsPart(view),
    eventsPart(view),
    logPart(view),
    settingsPart(view),
  ];
  root.classList.add("job");
  root.append(...parts.map(({ element }) => element));
  const update = () => parts.forEach(({ update }) => update?.());

  let isDue = false;
  const soon = () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => {
      isDue = false;
      update();
    });
  };
  const look = async () => {
    if (hasEnded(view.job)) return;
    view.job = await get(`/jobs/${jobId}`, { signal });
    soon();
  };
  view.changed = soon;
  update();
  if (hasEnded(job)) return;
  const onEvent = (event) => {
    view.events.push(event);
    soon();
    if (event.type !== "metrics") look().catch((error) => signal.aborted || console.warn(error));
  };
  follow(jobId, events.at(-1)?.id ?? 0, onEvent, signal);
  every(LOOK_SECONDS, look, signal);
}

function head(view) {
  const [status, progress, notes, summary] = [h("span", { role: "status" }), h("div", {}), h("div", {}), h("div", {})];
  const [actions, errors] = [h("div", { class: "actions" }), h("div", { role: "alert" })];
  const element = h(
    "div",
    { class: "wide" },
    h(
      "div",
      { class: "head" },
      h(
        "div",
        {},
        h("div", { class: "title" }, h("h1", {}, titleOf(view.job)), status),
        view.job.spec.name && h("code", { class: "muted" }, view.job.id),
      ),
      actions,
    ),
    errors,
    notes,
    h("section", { class: "card", "aria-label": "Summary" }, progress, summary),
  );
  return {
    element,
    update() {
      const { job } = view;
      redraw(status, [job.status, job.phase], () => [badge(job)]);
      redraw(progress, [job.progress, job.status], () => progressOf(job));
      redraw(notes, [job.error, waitOf(job.queue), job.warnings], () => notesOf(job));
      redraw(summary, [job, Math.floor(Date.now() / 60_000)], () => [summaryOf(job)]);
      redraw(actions, job.status, () => actionsOf(view, errors));
    },
  };
}

function progressOf({ progress, status }) {
  const { step, total_steps: total, percent, eta_seconds: eta } = progress;
  if (!total) return [];
  const left = status === "running" && eta != null ? ` · ${duration(eta)} left` : "";
  return [
    shareBar(percent, 100, `${figure(percent)} % of its steps are done`),
    h(
      "p",
      { class: "note" },
      `${figure(percent)} % · step ${whole(step)} of ${whole(total)} · epoch ${figure(progress.epoch, 3)}${left}`,
    ),
  ];
}

/** What a job waits for, and until about when: to the minute, so that it changes as seldom. */
function waitOf(queue) {
  if (!queue) return null;
  const start = queue.predicted_start && Math.ceil(queue.predicted_start / 60) * 60;
  const likely = start ? ` It is likely to start by ${clock(start).slice(0, -3)}.` : "";
  return { title: queue.position ? `Number ${queue.position} in line` : "Waiting", words: queue.reason + likely };
}

function notesOf({ error, queue, warnings }) {
  const wait = waitOf(queue);
  return [
    error && callout("bad", `Failed: ${error.code}`, error.message),
    wait && callout("plain", wait.title, wait.words),
    warnings.length > 0 &&
      callout(
        "warn",
        warnings.length === 1 ? "A warning" : `${warnings.length} warnings`,
        h(
          "ul",
          {},
          warnings.map(({ message }) => h("li", {}, message)),
        ),
      ),
  ];
}

function summaryOf(job) {
  const { progress, metrics } = job;
  const end = job.finished_at ?? (job.started_at ? Date.now() / 1000 : null);
  return tiles([
    ["Base model", job.base_model],
    ["GPU class", job.gpu_class],
    ["Training loss", metrics.train_loss == null ? null : figure(metrics.train_loss)],
    ["Held-out loss", metrics.eval_loss == null ? null : figure(metrics.eval_loss)],
    ["Tokens seen", progress.tokens_seen ? whole(progress.tokens_seen) : null],
    ["Speed", progress.tokens_per_second ? `${whole(progress.tokens_per_second)} tokens/s` : null],
    ["Submitted", h("span", { title: clock(job.created_at) }, ago(job.created_at))],
    ["Time", job.started_at ? duration(end - job.started_at) : null],
    ["Attempt", job.attempt ? `${job.attempt} of ${job.max_attempts}` : null],
    ["Cost", job.cost == null ? null : money(job.cost)],
    ...Object.entries(job.metadata),
  ]);
}

function actionsOf(view, errors) {
  const { status, id } = view.job;
  const act = (request) => async (event) => {
    const button = event.currentTarget;
    button.disabled = true;
    errors.replaceChildren();
    try {
      await request();
    } catch (error) {
      errors.replaceChildren(failure(error));
    }
    button.disabled = false;
    button.focus(); // which being disabled has taken
    view.changed();
  };
  const button = (text, request, kind = "") =>
    h("button", { type: "button", class: kind, onclick: act(request) }, text);
  const turn = (verb) => async () => {
    view.job = await post(`/jobs/${id}/${verb}`);
  };
  if (hasEnded(view.job))
    return [
      h("a", { class: "button", href: `#/compare/${id}/` }, "Compare"),
      button("Delete", () => deleted(view.job), "danger"),
    ];
  if (status === "cancelling") return [];
  const isPausing = ["paused", "pausing"].includes(status);
  return [
    isPausing ? button("Resume", turn("resume")) : button("Pause", turn("pause")),
    button("Cancel", turn("cancel"), "danger"),
  ];
}

async function deleted(job) {
  const consequence = "Its history, its log, its adapter and its merged model go with it, for good.";
  if (!(await confirmed(`Delete ${titleOf(job)}?`, consequence, "Delete"))) return;
  await remove(`/jobs/${job.id}`);
  location.hash = "#/";
}

function settingsPart(view) {
  const body = h("div", { class: "columns" });
  return {
    element: h("div", { class: "wide" }, section("Settings", body)),
    update() {
      const { spec, plan } = view.job;
      redraw(body, [spec, plan], () => [
        snippet("spec, as it is trained", JSON.stringify(spec, null, 2)),
        snippet("plan", JSON.stringify(plan, null, 2)),
      ]);
    },
  };
}
