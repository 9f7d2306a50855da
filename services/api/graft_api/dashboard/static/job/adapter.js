// A finished adapter: its files to download, and the lines that serve it.

import { get, send } from "../api.js";
import { h, redraw } from "../dom.js";
import { every } from "../every.js";
import { key } from "../key.js";
import { failure, section, snippet, waiting } from "../parts.js";
import { bytes } from "../words.js";

const LOOK_SECONDS = 3;
const EARLY_SECONDS = 60; // before its links expire a list is asked for new ones

export function adapterPart(view) {
  const body = h("div", {});
  return {
    element: section("Adapter", body),
    update() {
      const { job } = view;
      redraw(body, [job.adapter, job.status], () => (job.adapter ? contents(view) : [waiting(absent(job))]));
    },
  };
}

const absent = ({ status }) =>
  ["failed", "cancelled"].includes(status)
    ? "This job left no adapter."
    : "It is stored, read back and proven before the job succeeds.";

function contents({ job, signal }) {
  const files = h("ul", { class: "key" });
  const lines = h("div", {});
  const said = h("div", { role: "status" });
  let adapter; // undefined until it is known
  const list = async () => {
    const answer = await get(`/jobs/${job.id}/adapter`, { signal });
    if (!adapter) said.replaceChildren(); // of looks before
    adapter = answer;
    files.replaceChildren(...adapter.files.map(fileLink));
    redraw(lines, loadable(adapter), () => servings(job, loadable(adapter)));
  };
  list().catch((error) => signal.aborted || said.replaceChildren(failure(error)));
  every(LOOK_SECONDS, async () => (!adapter || linksEndSoon(adapter)) && list(), signal);
  return [
    h("p", {}, archiveLink(job, said)),
    said,
    h("details", { class: "files" }, h("summary", {}, "File by file"), files),
    h("h3", {}, "Serve it"),
    lines,
  ];
}

/** A file that was made, with a link that needs no key. */
export const fileLink = ({ name, size, sha256, url }) =>
  h(
    "li",
    {},
    h("a", { href: url, download: name, title: `sha256 ${sha256}` }, name),
    h("span", { class: "number" }, bytes(size)),
  );

/** Whether the links of a list of files are about to expire. */
export const linksEndSoon = ({ links_expire_at: end }) => (end ?? Infinity) - EARLY_SECONDS < Date.now() / 1000;

/** A link where the browser may fetch by itself; where there is a key, the page has to show it. */
function archiveLink(job, said) {
  const name = `${job.id}.tar`;
  if (!key()) return h("a", { class: "button primary", href: job.adapter.archive, download: name }, "Download adapter");
  const fetchIt = async (event) => {
    const button = event.currentTarget;
    button.disabled = true;
    try {
      const url = URL.createObjectURL(await (await send(job.adapter.archive)).blob());
      h("a", { href: url, download: name }).click();
      URL.revokeObjectURL(url);
    } catch (error) {
      said.replaceChildren(failure(error));
    }
    button.disabled = false;
  };
  return h("button", { type: "button", class: "primary", onclick: fetchIt }, "Download adapter");
}

const PLACE = "path/to/";

/** What loads the base: its name where the hub has it, else a place for the path of its folder. */
const loadable = ({ base_model: base, base_revision: revision }) =>
  revision.startsWith("sha256-") ? PLACE + base : base;

function servings({ id, spec }, base) {
  return [
    base.startsWith(PLACE) &&
      h("p", { class: "muted" }, `${base} stands for the folder that the service's operator registered as the base.`),
    snippet("from a terminal", `graft download ${id} --to adapter/`),
    snippet(
      "vLLM",
      `vllm serve ${base} --enable-lora \\\n  --max-lora-rank ${rankFor(spec.lora.r)} \\\n  --lora-modules ${id}=adapter/`,
    ),
    snippet(
      "Python",
      `from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\nbase = AutoModelForCausalLM.from_pretrained("${base}")\nmodel = PeftModel.from_pretrained(base, "adapter/")\ntokenizer = AutoTokenizer.from_pretrained("adapter/")`,
    ),
  ];
}

/** The smallest rank that vLLM takes and this adapter needs. */
const rankFor = (r) => [8, 16, 32, 64, 128, 256, 320, 512].find((rank) => rank >= r);
