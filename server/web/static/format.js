/** Numbers, times and digests as people read them. Pure. */

export const UNKNOWN = "–";

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (value) => (value == null ? UNKNOWN : whole.format(value));

/** A share of 1 as per cent. @param {number|null|undefined} share */
export const percent = (share, digits = 1) =>
  share == null ? UNKNOWN : `${(100 * share).toFixed(digits)} %`;

/** A difference of two shares in points, always signed. */
export const points = (share) =>
  share == null ? UNKNOWN : `${share < 0 ? "−" : "+"}${Math.abs(100 * share).toFixed(1)} pts`;

export const decimal = (value, digits = 3) => (value == null ? UNKNOWN : value.toFixed(digits));

export const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

/** A duration in its largest sensible unit. @param {number} ms */
export function duration(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86400)} d`;
}

export const ago = (ms, now) =>
  ms == null ? "never" : now - ms < 1500 ? "now" : `${duration(now - ms)} ago`;

/** Local time of day; with seconds when the span is short. */
export function clock(ms, spanMs = 0) {
  const options = { hour: "2-digit", minute: "2-digit", hour12: false };
  if (spanMs < 1_800_000) options.second = "2-digit";
  return new Intl.DateTimeFormat("en-GB", options).format(ms);
}

export const moment = (ms) =>
  ms == null ? "" : new Date(ms).toISOString().replace("T", " ").replace(/\.\d+Z/, " UTC");

/** The first twelve digits of a digest: enough to tell models apart. */
export const short = (digest) => (digest ? digest.slice(0, 12) : UNKNOWN);

/** A model's name and version; a digest that no one registered is "unregistered". */
export const model = (found) =>
  !found ? UNKNOWN : found.name == null ? "unregistered" : `${found.name} v${found.version}`;

/** snake_case of the server as words. */
export const words = (text) => String(text).replaceAll("_", " ");

export const sentence = (text) => {
  const spoken = words(text);
  return spoken.charAt(0).toUpperCase() + spoken.slice(1);
};
