// Requests to the service's API, and its errors.

import { shown } from "./key.js";

const PAGE = 100; // the most that a list gives at once

/** What the API answered that is not a success. */
export class ApiError extends Error {
  constructor(status, error, retryAfter) {
    super(error.message);
    this.status = status;
    this.code = error.code;
    this.facts = error;
    this.retryAfter = retryAfter;
  }
}

/** Send a request and return its successful response. A key that is missing or refused is told to the whole page. */
export async function send(path, { headers = {}, ...options } = {}) {
  const response = await fetch(path, { ...options, headers: { ...shown(), ...headers } });
  if (response.ok) return response;
  const error = await errorOf(response);
  if (response.status === 401) dispatchEvent(new CustomEvent("key-wanted", { detail: error }));
  throw error;
}

/** Read one JSON answer. */
export async function get(path, options) {
  return (await send(path, options)).json();
}

/** Post a JSON body, or none. */
export async function post(path, body, { headers = {}, ...options } = {}) {
  const sent = body === undefined ? {} : { body: JSON.stringify(body) };
  const typed = body === undefined ? headers : { "content-type": "application/json", ...headers };
  return get(path, { method: "POST", headers: typed, ...sent, ...options });
}

/** Delete what a path names. */
export async function remove(path, options) {
  return get(path, { method: "DELETE", ...options });
}

/** The first entries of a list, so many or all that there are; and whether there are more. */
export async function list(path, query, count, options) {
  const data = [];
  let after = query.after;
  let more = true;
  while (more && data.length < count) {
    const limit = Math.min(PAGE, count - data.length);
    const page = await get(`${path}?${asQuery({ ...query, after, limit })}`, options);
    data.push(...page.data);
    after = page.last_id;
    more = page.has_more;
  }
  return { data, more };
}

/** A job's whole history so far, oldest first. */
export async function history(jobId, options) {
  const events = [];
  for (let more = true; more;) {
    const after = events.at(-1)?.id ?? 0;
    const page = await get(`/jobs/${jobId}/events?after=${after}&limit=1000`, options);
    events.push(...page.data);
    more = page.has_more;
  }
  return events;
}

function asQuery(query) {
  const given = Object.entries(query).filter(([, value]) => value != null && value !== "");
  return new URLSearchParams(given).toString();
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  return new ApiError(
    response.status,
    body?.error ?? { code: "unreadable", message: `The service answered ${response.status}.` },
    Number(response.headers.get("retry-after")) || null, // in seconds
  );
}
