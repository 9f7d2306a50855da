// The shell: which page an address means, whose key is shown, and which theme.

import { h } from "./dom.js";
import { forget, key } from "./key.js";
import { failure } from "./parts.js";
import { comparePage } from "./pages/compare.js";
import { fleetPage } from "./pages/fleet.js";
import { jobPage } from "./pages/job.js";
import { jobsPage } from "./pages/jobs.js";
import { signInPage } from "./pages/signin.js";
import { submitPage } from "./pages/submit.js";

const PAGES = [
  [/^\/$/, jobsPage],
  [/^\/jobs\/([A-Za-z0-9-]+)$/, jobPage],
  [/^\/new$/, submitPage],
  [/^\/fleet$/, fleetPage],
  [/^\/compare\/([A-Za-z0-9-]*)\/([A-Za-z0-9-]*)$/, comparePage],
];
const THEMES = { auto: "light", light: "dark", dark: "auto" }; // and which comes next

const main = document.getElementById("main");
let shown = new AbortController();
let isAsking = false; // for a key: what else is answered 401 meanwhile says nothing new

function go() {
  isAsking = false;
  const address = location.hash.slice(1) || "/";
  const [pattern, page] = PAGES.find(([known]) => known.test(address)) ?? [/^/, nowhere];
  show(page, pattern.exec(address).slice(1));
  for (const link of document.querySelectorAll("nav a")) {
    const isHere = link.hash.slice(1) === address;
    isHere ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
}

async function show(page, parameters = []) {
  shown.abort();
  shown = new AbortController();
  const { signal } = shown;
  const root = h("div", { class: "page" });
  main.replaceChildren(root);
  scrollTo(0, 0);
  document.getElementById("leave").hidden = key() === null;
  try {
    await page(root, signal, ...parameters);
  } catch (error) {
    if (!signal.aborted && error.status !== 401) root.replaceChildren(h("h1", {}, "That did not work"), failure(error));
  }
  if (!signal.aborted) document.title = `${root.querySelector("h1")?.textContent ?? "Graft"} · Graft`;
}

async function nowhere(root) {
  root.append(h("h1", {}, "There is no such page"), h("p", {}, h("a", { href: "#/" }, "All jobs")));
}

function nextTheme() {
  const next = THEMES[document.documentElement.dataset.theme] ?? "auto";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("graft-theme", next);
  nameTheme();
}

function nameTheme() {
  document.getElementById("theme").textContent = `Theme: ${document.documentElement.dataset.theme}`;
}

addEventListener("hashchange", () => {
  go();
  main.focus({ preventScroll: true });
});
addEventListener("key-wanted", ({ detail }) => {
  if (isAsking) return;
  isAsking = true;
  const wasRefused = key() !== null;
  forget();
  show((root) => signInPage(root, wasRefused ? detail : null, go));
});
document.getElementById("theme").addEventListener("click", nextTheme);
document.getElementById("leave").addEventListener("click", () => {
  forget();
  go();
});
nameTheme();
go();
