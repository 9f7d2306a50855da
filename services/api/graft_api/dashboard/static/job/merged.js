// A job's merged model: asked for, watched while it is made, downloaded, deleted.

import { get, post, remove } from "../api.js";
import { h, redraw } from "../dom.js";
import { every } from "../every.js";
import { fileLink, linksEndSoon } from "./adapter.js";
import { key } from "../key.js";
import { badge, callout, confirmed, facts, failure, hasEnded, section, snippet } from "../parts.js";
import { bytes, whole } from "../words.js";

const LOOK_SECONDS = 3;

/** The base with the adapter in its weights; hidden until there is an adapter. */
export function mergedPart(view) {
  const path = `/jobs/${view.job.id}/merged`;
  const [status, body, errors] = [h("div", { role: "status" }), h("div", {}), h("div", { role: "alert" })];
  const element = h("div", { class: "wide", hidden: true }, section("Merged model", status, body, errors));
  let merged; // undefined until it is known, null where nobody has asked for it

  const draw = () => {
    redraw(status, [merged?.status, merged?.phase], () => [merged && badge(merged)]);
    redraw(body, [merged], () => (merged ? contents(merged, path, act) : absent(path, act)));
  };
  const look = async () => {
    const answer = await found(path, view.signal);
    if (merged === undefined) errors.replaceChildren(); // of looks before
    merged = answer;
    draw();
  };
  const act = async (request) => {
    errors.replaceChildren();
    try {
      merged = await request();
    } catch (error) {
      errors.replaceChildren(failure(error));
    }
    draw();
  };
  return {
    element,
    update() {
      if (!view.job.adapter || !element.hidden) return;
      element.hidden = false;
      look().catch((error) => view.signal.aborted || errors.replaceChildren(failure(error)));
      every(LOOK_SECONDS, async () => (merged === undefined || changesByItself(merged)) && look(), view.signal);
    },
  };
}

const changesByItself = (merged) => merged && (!hasEnded(merged) || linksEndSoon(merged));

async function found(path, signal) {
  try {
    return await get(path, { signal });
  } catch (error) {
    if (error.code === "merged_model_not_found") return null;
    throw error;
  }
}

function absent(path, act) {
  return [
    h("p", {}, "The base in full precision with this adapter in its weights: safetensors that load without PEFT."),
    h("div", { class: "actions after" }, makeButton("Merge into the base", path, act)),
  ];
}

function contents(merged, path, act) {
  if (merged.status === "succeeded") return made(merged, path, act);
  if (hasEnded(merged))
    return [
      merged.error && callout("bad", `Failed: ${merged.error.code}`, merged.error.message),
      h("div", { class: "actions after" }, makeButton("Merge again", path, act)),
    ];
  if (!merged.queue) return [h("p", { class: "muted" }, "A worker merges it, and proves what it has stored.")];
  return [h("p", {}, merged.queue.reason), h("div", { class: "actions after" }, deleteButton(path, act))];
}

function made({ job_id: id, base_model: base, base_revision: revision, files }, path, act) {
  const size = files.reduce((sum, file) => sum + file.size, 0);
  const archive = { class: "button primary", href: `${path}/archive`, download: `${id}-merged.tar` };
  return [
    facts([
      ["Base", `${base}, ${revision}`],
      ["Size", `${bytes(size)} in ${whole(files.length)} files`],
    ]),
    h("div", { class: "actions after" }, !key() && h("a", archive, "Download merged model"), deleteButton(path, act)),
    // A page that has to show a key would hold the whole archive itself; a file's own link needs none.
    h(
      "details",
      { class: "files", open: key() !== null },
      h("summary", {}, "File by file"),
      h("ul", { class: "key" }, files.map(fileLink)),
    ),
    snippet("from a terminal", `graft merge ${id} --to merged/`),
  ];
}

const makeButton = (text, path, act) =>
  h("button", { type: "button", class: "primary", onclick: () => act(() => post(path)) }, text);

function deleteButton(path, act) {
  const ask = async () => {
    const consequence = "Its files go for good. The adapter stays, and can be merged again.";
    if (!(await confirmed("Delete the merged model?", consequence, "Delete"))) return;
    await act(async () => {
      await remove(path);
      return null;
    });
  };
  return h("button", { type: "button", class: "danger", onclick: ask }, "Delete merged model");
}
