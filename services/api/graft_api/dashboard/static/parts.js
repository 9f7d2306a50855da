// Parts that several pages show.

import { h } from "./dom.js";
import { spaced } from "./words.js";

const ENDED = new Set(["succeeded", "failed", "cancelled"]);

/** Whether nothing more will happen to a job. */
export const hasEnded = (job) => ENDED.has(job.status);

/** A job's status, and what it is busy with. */
export function badge(job) {
  const busy = job.status === "running" && job.phase ? ` · ${job.phase}` : "";
  return h("span", { class: `badge ${job.status}` }, `${spaced(job.status)}${busy}`);
}

/** A section with a heading of its own. */
export function section(title, ...children) {
  return h("section", { class: "card" }, h("h2", {}, title), ...children);
}

/** Something that should be noticed: `kind` is "bad", "warn" or "good". */
export function callout(kind, title, ...children) {
  return h(
    "div",
    { class: `callout ${kind}` },
    h("strong", {}, title),
    ...children.map((child) => (typeof child === "string" ? h("p", {}, child) : child)),
  );
}

/** An error of the API, in its own words. */
export function failure(error) {
  return callout("bad", error.status ? `${error.status} ${error.code}` : "The service does not answer", error.message);
}

/** Names and what they are, as a list of two columns. */
export function facts(pairs) {
  const given = pairs.filter(([, value]) => value != null && value !== "");
  return h(
    "dl",
    { class: "facts" },
    given.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
  );
}

/** Figures side by side, each under its name. */
export function tiles(pairs) {
  const given = pairs.filter(([, value]) => value != null && value !== "");
  return h(
    "dl",
    { class: "tiles" },
    given.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

/** A table; roles are said outright, since a narrow screen lays it out as blocks. */
export function table(label, heads, rows) {
  return h(
    "table",
    { role: "table", "aria-label": label },
    h(
      "thead",
      { role: "rowgroup" },
      h(
        "tr",
        { role: "row" },
        heads.map((head) => h("th", { role: "columnheader", scope: "col" }, head)),
      ),
    ),
    h("tbody", { role: "rowgroup" }, rows),
  );
}

/** A row of a table; each cell knows its column's name, for narrow screens. */
export function row(heads, cells, attributes = {}) {
  return h(
    "tr",
    { role: "row", ...attributes },
    cells.map((cell, index) => h("td", { role: "cell", "data-head": heads[index] || null }, cell ?? [])),
  );
}

/** Text to be copied as it stands. */
export function snippet(label, text) {
  const button = h("button", { type: "button", class: "quiet copy", "aria-label": `Copy: ${label}` }, "Copy");
  button.addEventListener("click", async () => {
    await navigator.clipboard?.writeText(text);
    button.textContent = navigator.clipboard ? "Copied" : "Select and copy";
  });
  return h(
    "div",
    { class: "snippet" },
    h("div", { class: "snippet-head" }, h("span", { class: "muted" }, label), button),
    h("pre", { tabindex: 0, "aria-label": label }, h("code", {}, text)),
  );
}

/** What is shown until there is something. */
export const waiting = (text = "Loading…") => h("p", { class: "muted" }, text);
