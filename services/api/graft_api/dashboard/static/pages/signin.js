// Asks for an API key where the service wants one.

import { h } from "../dom.js";
import { keep } from "../key.js";
import { failure } from "../parts.js";

/** Show the form; `done` is called once there is a key to try. */
export async function signInPage(root, refusal, done) {
  const input = h("input", { id: "key", type: "password", autocomplete: "off", required: true, spellcheck: "false" });
  const enter = (event) => {
    event.preventDefault();
    keep(input.value.trim());
    done();
  };
  root.append(
    h(
      "form",
      { class: "card sign-in", onsubmit: enter },
      h("h1", {}, "Sign in"),
      h("p", { class: "muted" }, "This service wants an API key. It is kept in this tab and nowhere else."),
      refusal && failure(refusal),
      h("label", { for: "key" }, "API key"),
      input,
      h("button", { class: "primary" }, "Sign in"),
      h("p", { class: "muted" }, "An operator makes one with ", h("code", {}, "graft keys create TENANT"), "."),
    ),
  );
  input.focus();
}
