// Looks again and again while a page is shown; a hidden tab asks for nothing. Looks that get no answer are told of.

import { clock } from "./words.js";

const FAILED_LOOKS = 2; // in a row, before it is said: one may be lost on the way

const unanswered = new Map(); // looks that fail, and when each had its last answer, in Unix seconds

/** Do a task again every so many seconds, one at a time, until the signal. */
export async function every(seconds, task, signal) {
  let last = Date.now() / 1000;
  let failures = 0;
  signal.addEventListener("abort", () => say(task, null));
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
    if (signal.aborted) return;
    if (document.hidden) continue;
    try {
      await task();
      [last, failures] = [Date.now() / 1000, 0];
    } catch (error) {
      if (signal.aborted || error.status === 401) return;
      console.warn(error);
      failures = error.status < 500 ? 0 : failures + 1; // a refusal is an answer
    }
    say(task, failures < FAILED_LOOKS ? null : last);
  }
}

/** Keep the line above the page that says since when what it shows has not changed. */
function say(task, since) {
  since === null ? unanswered.delete(task) : unanswered.set(task, since);
  const hour = unanswered.size && clock(Math.min(...unanswered.values())).slice(-8, -3);
  const line = hour ? `No answer since ${hour}; what is shown is from then.` : "";
  const shown = document.getElementById("unanswered");
  if (shown.textContent !== line) shown.textContent = line; // or it would be read out at every look
}
