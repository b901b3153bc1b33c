// How numbers, sizes and times are written. Pure functions; knows no page and no data source.

export const NONE = "–";

// JSON cannot carry NaN or infinity as numbers; a sender that wants to show them writes these words.
const NOT_FINITE = new Set(["NaN", "Infinity", "-Infinity", "+Inf", "-Inf", "inf", "-inf", "nan"]);

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** Wraps a formatter: null becomes a dash, a non-finite word stays as it is. */
const guarded = (write) => (value, ...rest) => {
  if (typeof value === "number" && Number.isFinite(value)) return write(value, ...rest);
  return NOT_FINITE.has(value) ? value : NONE;
};

export const integer = guarded((value) => whole.format(value));

/** About four significant digits; powers of ten outside 0.001 … 100,000. */
export const number = guarded((value, digits = 4) => {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) {
    return value.toExponential(Math.min(digits - 1, 2)).replace("e+", "e");
  }
  if (size >= 1000) return whole.format(value);
  return value.toPrecision(digits);
});

/** For axes: no trailing zeros. */
export const short = guarded((value) => {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  if (size >= 1000) return whole.format(value);
  return String(Number(value.toPrecision(3)));
});

export const percent = guarded((ratio, digits = 1) => `${(ratio * 100).toFixed(digits)} %`);

const SIZES = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

export const bytes = guarded((value) => {
  let power = 0;
  while (Math.abs(value) >= 1024 && power < SIZES.length - 1) {
    value /= 1024;
    power += 1;
  }
  return `${power === 0 ? value : value.toPrecision(value >= 1000 ? 4 : 3)} ${SIZES[power]}`;
});

/** Seconds as µs, ms, s, then `4 m 05 s`, `2 h 10 m`, `3 d 4 h`. */
export const duration = guarded((seconds) => {
  const size = Math.abs(seconds);
  if (size === 0) return "0 s";
  if (size < 9.995e-4) return `${Number((seconds * 1e6).toPrecision(3))} µs`;
  if (size < 0.9995) return `${Number((seconds * 1e3).toPrecision(3))} ms`;
  if (size < 59.5) return `${seconds.toPrecision(3)} s`;
  const total = Math.round(seconds);
  const two = (value) => String(value).padStart(2, "0");
  if (total < 3600) return `${Math.floor(total / 60)} m ${two(total % 60)} s`;
  if (total < 86400) return `${Math.floor(total / 3600)} h ${two(Math.floor((total % 3600) / 60))} m`;
  return `${Math.floor(total / 86400)} d ${Math.floor((total % 86400) / 3600)} h`;
});

/** Like `duration` without fractions: for ages that tick. */
export const age = guarded((seconds) => (seconds < 59.5 ? `${Math.max(0, Math.round(seconds))} s` : duration(seconds)));

const two = (value) => String(value).padStart(2, "0");
const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/** Epoch seconds as local `14:05:09`. */
export const clock = guarded((at) => {
  const date = new Date(at * 1000);
  return `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
});

/** Epoch seconds as local `24 Nov 14:05:09`, the day left out when it is the day of `now`. */
export const moment = guarded((at, now) => {
  const date = new Date(at * 1000);
  const today = new Date((now ?? Date.now() / 1000) * 1000);
  if (date.toDateString() === today.toDateString()) return clock(at);
  return `${date.getDate()} ${MONTHS[date.getMonth()]} ${clock(at)}`;
});

/** Tick of a time axis whose ticks are `step` seconds apart. */
export function tick(at, step) {
  const date = new Date(at * 1000);
  if (step >= 86400) return `${date.getDate()} ${MONTHS[date.getMonth()]}`;
  const minutes = `${two(date.getHours())}:${two(date.getMinutes())}`;
  return step >= 60 ? minutes : `${minutes}:${two(date.getSeconds())}`;
}
