// A job's events as they happen: server-sent events read by `fetch`, which can show a key where EventSource cannot.

import { send } from "./api.js";

const LAST = new Set(["succeeded", "failed", "cancelled"]);

/** Hand over events behind `after`, each as soon as it is told, until the job's last one or the signal. */
export async function follow(jobId, after, onEvent, signal) {
  let pause = 2000;
  while (!signal.aborted) {
    try {
      const headers = { accept: "text/event-stream", "last-event-id": String(after) };
      const response = await send(`/jobs/${jobId}/events`, { headers, signal, cache: "no-store" });
      if (response.status === 204) return;
      for await (const message of messages(response.body)) {
        if (message.retry) pause = Number(message.retry);
        if (!message.data) continue;
        const event = JSON.parse(message.data);
        after = event.id;
        onEvent(event);
        if (LAST.has(event.type)) return;
      }
    } catch (error) {
      if (signal.aborted || (error.status >= 400 && error.status < 500 && error.status !== 429)) return;
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    yield* parts.map(fields);
  }
}

function fields(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const colon = line.indexOf(": ");
    if (colon > 0) found[line.slice(0, colon)] = line.slice(colon + 2);
  }
  return found;
}
