// A new job: what it would need is told while one types, and what would fit where it does not.

import { get, list, post, send } from "../api.js";
import { h, newId } from "../dom.js";
import { failure, section, snippet, waiting } from "../parts.js";
import { GROUPS, described, parsed, specOf } from "../submit/fields.js";
import { unanswered, verdict } from "../submit/estimate.js";
import { dataPart } from "../submit/report.js";
import { bytes, whole } from "../words.js";

const PAUSE_MILLISECONDS = 350; // of typing, before an estimate is asked for
const REST_MILLISECONDS = 2000; // of the whole form, before a worker is asked to read the rows for it
const NO_DATA = { hub: "none/yet" }; // what a spec needs to be estimated: memory does not depend on the rows
const FILES = 100;

export async function submitPage(root, signal) {
  const [openapi, models, capacity, files] = await Promise.all([
    get("/openapi.json", { signal }),
    get("/models", { signal }),
    get("/capacity", { signal }),
    list("/files", {}, FILES, { signal }),
  ]);
  const lists = {
    models: models.data.map(({ id }) => id),
    classes: ["auto", ...capacity.data.map(({ name }) => name)],
    files: files.data,
  };
  const fields = new Map(
    GROUPS.flatMap(({ fields }) => fields).map((field) => [field.name, made(field, openapi.components.schemas, lists)]),
  );
  const panel = h("div", { class: "estimate" }, waiting("Name a base model: the estimate appears here."));
  const data = dataPart(signal);
  const said = h("p", { class: "said", role: "status" });
  const request = h("div", {});
  const errors = h("div", { role: "alert" });
  const submit = h("button", { class: "primary" }, "Submit job");
  let sendKey = newSendKey();

  const take = ({ param, to }) => {
    const { input } = fields.get(param);
    input.value = String(to);
    input.closest("details")?.setAttribute("open", "");
    changed();
    input.focus();
  };
  const estimate = debounced(signal, async (spec, stale) => {
    try {
      const answer = await post("/jobs/estimate", { ...spec, dataset: spec.dataset ?? NO_DATA }, { signal: stale });
      const usable = capacity.data.find(({ name }) => name === answer.gpu_class)?.usable_bytes;
      panel.replaceChildren(...verdict(answer, usable, take).filter(Boolean));
      said.textContent = answer.fits ? `Fits ${answer.gpu_class}.` : "Does not fit: see what would.";
      mark(fields, null);
      await new Promise((resolve) => setTimeout(resolve, REST_MILLISECONDS));
      if (!stale.aborted) data.show(answer.spec);
    } catch (error) {
      if (stale.aborted) return;
      panel.replaceChildren(...unanswered(error));
      said.textContent = "";
      mark(fields, error);
      data.show(null);
    }
  });
  const changed = () => {
    sendKey = newSendKey();
    const spec = specFrom(fields);
    request.replaceChildren(snippet("POST /jobs", JSON.stringify(spec, null, 2)));
    if (spec.base_model) estimate(spec);
    else {
      panel.replaceChildren(waiting("Name a base model: the estimate appears here."));
      data.show(null);
    }
  };
  const onSubmit = async (event) => {
    event.preventDefault();
    submit.disabled = true;
    errors.replaceChildren();
    try {
      const job = await post("/jobs", specFrom(fields), { headers: { "idempotency-key": sendKey } });
      location.hash = `#/jobs/${job.id}`;
    } catch (error) {
      errors.replaceChildren(failure(error));
      mark(fields, error);
      submit.disabled = false;
    }
  };

  const upload = uploader(fields.get("dataset.file").input, changed);
  root.append(
    h("div", { class: "head" }, h("h1", {}, "New job")),
    h(
      "div",
      { class: "split" },
      h(
        "form",
        { class: "job-form", oninput: changed, onsubmit: onSubmit },
        GROUPS.map((group) => groupOf(group, fields, upload)),
        data.element,
        errors,
        h("div", { class: "actions last" }, submit, said),
      ),
      h(
        "aside",
        { "aria-label": "Estimate" },
        h(
          "div",
          { class: "sticky" },
          section("Estimate", panel),
          h("details", {}, h("summary", {}, "The request"), request),
        ),
      ),
    ),
    datalist("models", lists.models),
    datalist("classes", lists.classes),
  );
  changed();
}

function groupOf({ title, more, fields }, made, upload) {
  const shown = fields.map(({ name }) => made.get(name).element);
  const body = h("div", { class: "fields" }, shown);
  if (more) return h("details", { class: "card" }, h("summary", {}, "More settings"), body);
  return h(
    "fieldset",
    { class: "card" },
    h("legend", {}, title),
    body,
    fields.some(({ kind }) => kind === "file") && upload,
  );
}

/** A field with its label, its hint and what the service says of it. */
function made({ name, label, hint, kind, list: from, placeholder }, schemas, lists) {
  const about = described(schemas, name);
  const [id, note] = [newId("field"), newId("note")];
  const usual = about.usual == null ? "" : String(about.usual);
  const shared = { id, name, "aria-describedby": note };
  const options =
    kind === "file"
      ? lists.files.map((file) => [file.id, fileLabel(file)])
      : about.choices?.map((choice) => [choice, choice]);
  const input = options
    ? h(
        "select",
        shared,
        h("option", { value: "" }, kind === "file" ? (options.length ? "choose one" : "none yet") : `default (${usual})`),
        options.map(([value, text]) => h("option", { value }, text)),
      )
    : h("input", {
        ...shared,
        list: from && `list-${from}`,
        placeholder: placeholder ?? usual,
        autocomplete: "off",
        spellcheck: "false",
        inputmode: about.types.has("string") || about.types.has("array") ? null : "decimal",
      });
  const said = h("span", { id: note, class: "note" }, hint ?? "");
  return {
    name,
    about,
    input,
    said,
    hint: hint ?? "",
    element: h("div", { class: "field" }, h("label", { for: id }, label), input, said),
  };
}

const fileLabel = ({ filename, bytes: size, report }) => `${filename} · ${whole(report.rows)} rows, ${bytes(size)}`;

function specFrom(fields) {
  const filled = [...fields.values()].filter(({ input }) => input.value.trim() !== "");
  return specOf(Object.fromEntries(filled.map(({ name, about, input }) => [name, parsed(input.value.trim(), about)])));
}

/** Show an error at the field that it names, and clear those of before. */
function mark(fields, error) {
  for (const { name, input, said, hint } of fields.values()) {
    const isMeant = error?.facts?.param === name;
    if (isMeant) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
    said.textContent = isMeant ? error.message : hint;
    said.classList.toggle("wrong", isMeant);
  }
}

function uploader(select, changed) {
  const input = h("input", { type: "file", id: "upload", accept: ".jsonl,.json,application/jsonl" });
  const said = h("div", { role: "status", class: "note" });
  input.addEventListener("change", async () => {
    const [file] = input.files;
    if (!file) return;
    said.textContent = `Uploading and checking ${file.name}, ${bytes(file.size)} …`;
    try {
      const form = new FormData();
      form.append("file", file);
      const made = await (await send("/files", { method: "POST", body: form })).json();
      select.append(h("option", { value: made.id }, fileLabel(made)));
      select.value = made.id;
      said.textContent = `${whole(made.report.rows)} rows of the kind ${made.report.kind}, every line checked.`;
      changed();
    } catch (error) {
      said.replaceChildren(failure(error));
    }
  });
  return h("div", { class: "field upload" }, h("label", { for: "upload" }, "Upload JSONL"), input, said);
}

function debounced(signal, task) {
  let timer;
  let running = new AbortController();
  signal.addEventListener("abort", () => {
    clearTimeout(timer);
    running.abort();
  });
  return (...given) => {
    clearTimeout(timer);
    running.abort();
    running = new AbortController();
    timer = setTimeout(task, PAUSE_MILLISECONDS, ...given, running.signal);
  };
}

/** Names one submission, so that a click or a try that comes twice is one job. */
function newSendKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const datalist = (name, values) =>
  h(
    "datalist",
    { id: `list-${name}` },
    values.map((value) => h("option", { value })),
  );
