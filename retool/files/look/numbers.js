"use strict";
// How numbers, times and dates read: the same on every page, in every tile, table and axis.

const LARGE = [[1e12, "T"], [1e9, "B"], [1e6, "M"]];

/** With its thousands apart, so many decimals, and a minus that isn't a hyphen. */
function grouped(value, decimals = 0) {
  const places = { minimumFractionDigits: decimals, maximumFractionDigits: decimals };
  const text = value.toLocaleString("en-US", places);
  return /^-[0.,]*$/.test(text) ? text.slice(1) : text.replace(/^-/, "−");
}

/** Decimals with which a number of this size has so many digits; small ones have no more than that. */
function decimalsOf(size, digits = 4) {
  if (!(size > 0)) return 0;
  return Math.min(digits, Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
}

/** Decimals for a column: three digits of its largest number, and at most two decimals for the first of its smallest. */
function columnDecimals(values) {
  const sizes = values.map(Math.abs).filter((v) => v > 0), least = sizes.reduce((a, b) => Math.min(a, b), Infinity);
  const most = sizes.reduce((a, b) => Math.max(a, b), 0);
  return Math.max(decimalsOf(most, 3), least < 1 ? (least < 0.1 ? 2 : 1) : 0);
}

/** 1e-5: what is too small or too large for decimals. */
function scientific(value) {
  return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e").replace(/^-/, "−");
}

/** A number: four digits, whole ones as they are, from a million on 1.20M. */
function show(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if ((size > 0 && size < 1e-3) || size >= 1e15) return scientific(value);
  for (const [least, letter] of LARGE) {
    if (size >= least) return grouped(value / least, decimalsOf(size / least, 3)) + letter;
  }
  return grouped(value, Number.isInteger(value) || size >= 1000 ? 0 : decimalsOf(size, digits));
}

/** A share as percent. */
function percent(share) {
  return typeof share === "number" ? grouped(100 * share, 1) + " %" : "–";
}

/** A value with what its unit asks for: shares are percent. */
function withUnit(value, unit) {
  return unit === "share" ? percent(value) : show(value);
}

/** All ticks of an axis alike: as many decimals as they need to differ, one letter for all. */
function ticks(values, unit) {
  const scale = unit === "share" ? 100 : 1;
  const known = values.filter((v) => v !== null).map((v) => v * scale);
  const high = Math.max(0, ...known.map(Math.abs));
  const [size, letter] = LARGE.find(([least]) => high >= least) || [1, ""];
  if ((high > 0 && high < 1e-3) || high >= 1e15) return values.map((v) => (v ? scientific(v) : v === 0 ? "0" : ""));
  const whole = (v, decimals) => Math.abs(v * 10 ** decimals - Math.round(v * 10 ** decimals)) < 1e-6;
  let decimals = 0;
  while (decimals < 6 && !known.every((v) => whole(v / size, decimals))) decimals++;
  const after = letter + (unit === "share" ? " %" : "");
  return values.map((v) => (v === null ? "" : grouped((v * scale) / size, decimals) + after));
}

const TIMES = [[2 * 86400, 86400, "days"], [2 * 3600, 3600, "h"], [100, 60, "min"], [0, 1, "s"]];

/** The unit in which a time of this many seconds reads best: how many seconds it has, its name. */
function timeUnit(seconds) {
  const [, size, name] = TIMES.find(([least]) => seconds >= least) || TIMES[TIMES.length - 1];
  return { size, name };
}

/** Seconds in the unit that suits them, three digits. */
function duration(seconds) {
  const { size, name } = timeUnit(seconds);
  return grouped(seconds / size, decimalsOf(seconds / size, 3)) + " " + name;
}

/** Seconds since 1970 as 2026-11-29 14:05, in the reader's time zone. */
function date(seconds) {
  const then = new Date(seconds * 1000), two = (n) => String(n).padStart(2, "0");
  const day = [then.getFullYear(), two(then.getMonth() + 1), two(then.getDate())].join("-");
  return day + " " + two(then.getHours()) + ":" + two(then.getMinutes());
}

function median(values) {
  const sorted = values.filter((v) => v !== null).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : null;
}
