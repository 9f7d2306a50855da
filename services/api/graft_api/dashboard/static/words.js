// Numbers, bytes and times in the words that a person reads.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(count) {
  if (count == null) return "–";
  const power = Math.min(UNITS.length - 1, Math.floor(Math.log2(Math.max(1, count)) / 10));
  const value = count / 1024 ** power;
  return `${power === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${UNITS[power]}`;
}

/** A figure with as many digits as tell something. */
export function figure(value, digits = 4) {
  if (value == null) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7))
    return Number(value.toPrecision(3)).toExponential();
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits });
}

export const whole = (value) => (value == null ? "–" : Math.round(value).toLocaleString("en"));

export function duration(seconds) {
  if (seconds == null) return "–";
  const left = Math.max(0, Math.round(seconds));
  if (left < 60) return `${left} s`;
  if (left < 3600) return `${Math.floor(left / 60)} min ${left % 60} s`;
  if (left < 86_400) return `${Math.floor(left / 3600)} h ${Math.floor((left % 3600) / 60)} min`;
  return `${Math.floor(left / 86_400)} d ${Math.floor((left % 86_400) / 3600)} h`;
}

/** How long ago a moment in Unix seconds was, in one unit. */
export function ago(moment) {
  const seconds = Math.max(0, Date.now() / 1000 - moment);
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86_400)} d ago`;
}

/** A moment in Unix seconds, by this machine's clock. */
export function clock(moment) {
  return new Date(moment * 1000).toLocaleString("en-GB", {
    day: "numeric",
    month: "short",
    hour: "2-digit",
    minute: "2-digit",
    second: "2-digit",
  });
}

export const money = (value) => (value == null ? "–" : value < 0.01 ? "< 0.01" : value.toFixed(2));

/** `base_weights` as it is read: "base weights". */
export const spaced = (name) => name.replaceAll("_", " ");

/** What a job is called: its name, or its id. */
export const titleOf = (job) => job.spec.name || job.id;
