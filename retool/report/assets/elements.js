"use strict";
// Everything on the page is made here; text is set as text, never parsed.

const DATA = JSON.parse(document.getElementById("data").textContent);

/** An element with a class, attributes or listeners, and children (strings become text). */
function el(tag, what, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(typeof what === "string" ? { class: what } : what || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined) node.append(child instanceof Node ? child : visible(String(child)));
  }
  return node;
}

/** Text with its control and direction characters made visible: they neither vanish nor turn what follows around. */
function visible(text) {
  const code = (c) => "⟨U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩";
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, code)
    .replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, code);
}

/** A number as short as it reads well. */
function show(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e15 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

/** A value with what its unit asks for: shares are percent. */
function withUnit(value, unit) {
  return unit === "share" && typeof value === "number" ? (100 * value).toFixed(1) + " %" : show(value);
}

/** Large counts: 1.2M. */
function short(value) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (value >= size) return Number((value / (unit === "k" ? 1e3 : size)).toPrecision(3)) + unit;
  }
  return show(value);
}

/** Seconds in words. */
function duration(seconds) {
  if (seconds < 100) return show(seconds, 3) + " s";
  if (seconds < 6000) return Math.round(seconds / 60) + " min";
  if (seconds < 72 * 3600) return (seconds / 3600).toFixed(1) + " h";
  return (seconds / 86400).toFixed(1) + " days";
}

function median(values) {
  const sorted = values.filter((v) => v !== null).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : null;
}

/** What the page knows of a metric. */
function about(name) {
  return DATA.about[name] || { title: name, unit: "", says: "", better: "", noisy: true, first: false };
}

/** (steps, values) of a metric of a run without its gaps, or null. */
function series(run, name) {
  const values = run.metrics[name];
  if (!values) return null;
  const kept = run.steps.map((step, i) => [step, values[i]]).filter(([, v]) => v !== null);
  return kept.length ? { steps: kept.map((p) => p[0]), values: kept.map((p) => p[1]) } : null;
}

/** A section of the page with its heading, and its place in the navigation. */
function section(id, title, says) {
  const node = el("section", { id }, el("h2", null, title), says ? el("p", "says", says) : null);
  document.getElementById("main").append(node);
  document.getElementById("nav").append(el("a", { href: "#" + id }, title));
  return node;
}

function tableOf(head, rows) {
  return el("div", "scroll", el("table", null, el("thead", null, el("tr", null, head)), el("tbody", null, rows)));
}
