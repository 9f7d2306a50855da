// The fleet: what each GPU class trains, who is alive, and what waits for what.

import { get, list } from "../api.js";
import { shareBar } from "../bars.js";
import { h, redraw } from "../dom.js";
import { every } from "../every.js";
import { badge, row, section, table, waiting } from "../parts.js";
import { ago, bytes, figure, money, titleOf, whole } from "../words.js";

const LOOK_SECONDS = 10;
const MOST_WAITING = 100;
const WAITING = ["queued", "validating_files", "paused"];
const CLASS_HEADS = [
  "Class",
  "Usable memory",
  "Trains up to",
  "Workers",
  "Queue",
  "Price an hour",
  "Measured / forecast",
];
const WORKER_HEADS = ["Worker", "Class", "Device", "Does", "Seen"];
const JOB_HEADS = ["Place", "Job", "Class", "Status", "Why"];

export async function fleetPage(root, signal) {
  const [classes, workers, waits] = [h("div", {}), h("div", {}), h("div", {})];
  root.append(
    h("div", { class: "head" }, h("h1", {}, "Fleet")),
    section("GPU classes", classes),
    section("Live workers", workers),
    section("What waits, and why", waits),
  );
  const look = async () => {
    const [capacity, ...queues] = await Promise.all([
      get("/capacity", { signal }),
      ...WAITING.map((status) => list("/jobs", { status }, MOST_WAITING, { signal })),
    ]);
    const most = Math.max(...capacity.data.map((gpu) => gpu.usable_bytes));
    redraw(classes, capacity.data, () => [classTable(capacity.data, most)]);
    redraw(workers, capacity.workers, () =>
      capacity.workers.length
        ? [table("Live workers", WORKER_HEADS, capacity.workers.map(workerRow))]
        : [waiting("No worker has been heard of lately: jobs are accepted, and wait.")],
    );
    const jobs = queues
      .flatMap(({ data }) => data)
      .sort((a, b) => (a.queue?.position ?? Infinity) - (b.queue?.position ?? Infinity));
    const hasMore = queues.some(({ more }) => more);
    redraw(waits, [jobs.map(({ id, queue, status }) => [id, queue?.position, queue?.reason, status]), hasMore], () => [
      jobs.length ? table("Waiting jobs", JOB_HEADS, jobs.map(jobRow)) : waiting("Nothing waits."),
      hasMore ? waiting(`More than ${MOST_WAITING} of one kind wait; the newest are shown.`) : null,
    ]);
  };
  await look();
  every(LOOK_SECONDS, look, signal);
}

function classTable(classes, most) {
  const made = table(
    "GPU classes",
    CLASS_HEADS,
    classes.map((gpu) => classRow(gpu, most)),
  );
  made.classList.add("fleet");
  return made;
}

function classRow(gpu, most) {
  const { forecast_error: off } = gpu;
  const memory = h(
    "div",
    {},
    shareBar(gpu.usable_bytes, most, `${bytes(gpu.usable_bytes)} usable`),
    h("span", { class: "note" }, `${bytes(gpu.usable_bytes)} of ${bytes(gpu.memory_bytes)}`),
  );
  const forecast = off
    ? `${figure(off.mean_ratio, 3)}× in the mean, ${figure(off.highest_ratio, 3)}× at most, ${whole(off.jobs)} jobs`
    : "–";
  const workers = h("span", { class: gpu.live_workers ? "" : "muted" }, whole(gpu.live_workers));
  return row(CLASS_HEADS, [
    h("b", { class: "nowrap" }, gpu.name),
    memory,
    gpu.largest_base_model ?? "–",
    workers,
    whole(gpu.queue_length),
    money(gpu.price_per_hour),
    forecast,
  ]);
}

function workerRow({ name, gpu_class: gpuClass, device, stages, seen_at: seen }) {
  return row(WORKER_HEADS, [name, gpuClass, device, stages.join(", "), ago(seen)]);
}

function jobRow(job) {
  const place = job.queue?.position;
  return row(JOB_HEADS, [
    place ? whole(place) : "–",
    h("a", { href: `#/jobs/${job.id}` }, titleOf(job)),
    job.gpu_class,
    badge(job),
    job.queue?.reason ?? "",
  ]);
}
