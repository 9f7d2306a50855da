// Parts that several pages show.

import { h, newId } from "./dom.js";
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

/** Ask before what cannot be undone, and return whether it is wanted; Escape, and what is focused first, keep. */
export function confirmed(question, consequence, verb) {
  const [title, more] = [newId("question"), newId("consequence")];
  const answer = (value, text, kind = "") =>
    h("button", { type: "button", class: kind, onclick: () => dialog.close(value) }, text);
  const dialog = h(
    "dialog",
    { "aria-labelledby": title, "aria-describedby": more },
    h("h2", { id: title }, question),
    h("p", { id: more }, consequence),
    h("div", { class: "actions" }, answer("keep", "Keep"), answer("go", verb, "danger")),
  );
  document.querySelector(".page").append(dialog); // it goes with its page, and the question with it
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "go");
    });
  });
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
