// The end of the log that the latest run has written.

import { send } from "../api.js";
import { h, redraw } from "../dom.js";
import { every } from "../every.js";
import { failure, hasEnded, section } from "../parts.js";

const LOOK_SECONDS = 10;
const TAIL = 32_768; // characters

export function logPart(view) {
  const text = h("pre", { class: "log scroll", tabindex: 0, "aria-label": "Log" }, "…");
  const errors = h("div", { role: "alert" });
  let isWhole = false; // it was read after the job's end
  const read = async () => {
    if (isWhole) return;
    const ended = hasEnded(view.job);
    const isAtEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 4;
    text.textContent = await tail(view);
    if (isAtEnd) text.scrollTop = text.scrollHeight;
    isWhole = ended;
  };
  const look = async () => {
    try {
      await read();
      redraw(errors, null, () => []);
    } catch (error) {
      if (!view.signal.aborted) redraw(errors, error.message, () => failure(error));
    }
  };
  look();
  every(LOOK_SECONDS, look, view.signal);
  return { element: section("Log", text, errors) };
}

async function tail({ job, signal }) {
  try {
    const response = await send(`/jobs/${job.id}/logs`, { signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let kept = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return kept || "The log is empty.";
      kept = (kept + value).slice(-TAIL);
    }
  } catch (error) {
    if (error.status === 404) return "No run has written a log yet.";
    throw error;
  }
}
