// Asks for an API key where the service wants one.

import { h } from "../dom.js";
import { keep } from "../key.js";
import { callout, failure } from "../parts.js";

const SENDABLE = /^[ -~]*$/; // printable ASCII: `fetch` has no error of its own for what no header may carry
const NOT_SENDABLE = "The API key holds something other than printable ASCII: copy it anew.";

/** Show the form; `done` is called once there is a key to try. */
export async function signInPage(root, refusal, done) {
  const input = h("input", { id: "key", type: "password", autocomplete: "off", required: true, spellcheck: "false" });
  const refused = h("div", { role: "alert" }, refusal && failure(refusal));
  const enter = (event) => {
    event.preventDefault();
    const key = input.value.trim();
    if (SENDABLE.test(key)) {
      keep(key);
      done();
    } else refused.replaceChildren(callout("bad", "It cannot be sent", NOT_SENDABLE));
  };
  root.append(
    h(
      "form",
      { class: "card sign-in", onsubmit: enter },
      h("h1", {}, "Sign in"),
      h("p", { class: "muted" }, "This service wants an API key. It is kept in this tab and nowhere else."),
      refused,
      h("label", { for: "key" }, "API key"),
      input,
      h("button", { class: "primary" }, "Sign in"),
      h("p", { class: "muted" }, "An operator makes one with ", h("code", {}, "graft keys create TENANT"), "."),
    ),
  );
  input.focus();
}
