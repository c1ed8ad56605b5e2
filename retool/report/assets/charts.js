"use strict";
// Curves: one line a run (or a quantity), smoothed over its pale original; all charts share their cursor.

const VIEW = { smooth: 0.6, log: false, by: "step", hidden: new Set() };
const DRAWN = new Map(); // chart's place → how to draw it again
const AXES = { step: "step", tokens: "tokens trained", hours: "hours of training" };
const COLOURS = 8;
const SOLID = 4; // runs with lines of their own colour alone; those of later ones are dashed, too
const HEIGHT = 215;
const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';

/** A colour as the theme has it now: a canvas knows no variables. */
function inked(variable) {
  const node = el("i");
  node.style.color = "var(" + variable + ")";
  document.body.append(node);
  const value = getComputedStyle(node).color;
  node.remove();
  return value;
}
function pale(rgb, opacity = 0.28) {
  return rgb.replace(/^rgb\((.*)\)$/, "rgba($1, " + opacity + ")");
}

/** A run's mark: the colour, and from the fifth run on the dashes, that it has in every chart. */
function runMark(index, dashed = index >= SOLID) {
  return el("span", "dot c" + (index % COLOURS) + (dashed ? " dashed" : ""));
}
function runName(index) {
  return el("span", "run", runMark(index), DATA.runs[index].name);
}

/** Exponential moving average without the start's bias; `weight` of the past, between 0 and 1. */
function smoothed(values, weight) {
  let sum = 0, mass = 0;
  return values.map((v) => {
    if (v === null) return null;
    sum = weight * sum + (1 - weight) * v;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

/** The weight that smooths over the same part of the chart's width, however many values it has. */
function weightFor(count) {
  return VIEW.smooth ** (100 / Math.max(100, count));
}

/** Where each step of a run stands on the shared axis. */
function positions(run) {
  if (VIEW.by === "step") return run.steps;
  const value = (name, i) => run.metrics[name]?.[i] || 0;
  const tokens = (i) => value("train/global_tokens", i) || value("perf/total_num_tokens", i);
  const hours = (i) => TIMED.reduce((sum, name) => sum + value(name, i), 0) / 3600;
  const add = VIEW.by === "tokens" ? tokens : hours;
  let total = 0;
  return run.steps.map((_, i) => (total += add(i)));
}

/** Lines of some metrics, of each run that has them and isn't hidden: the run's colour, a second metric dotted. */
function linesOf(names, titles) {
  const lines = [];
  DATA.runs.forEach((run, r) => names.forEach((name, n) => {
    const found = series(run, name);
    if (!found || VIEW.hidden.has(r)) return;
    const at = new Map(run.steps.map((step, i) => [step, i])), where = positions(run);
    const parts = [DATA.runs.length > 1 ? run.name : "", names.length > 1 ? titles?.[n] ?? about(name).title : ""];
    lines.push({
      label: parts.filter(Boolean).join(", "),
      run: r,
      dash: n ? [2, 4] : r >= SOLID ? [7, 4] : undefined,
      x: found.steps.map((step) => where[at.get(step)]),
      y: found.values,
    });
  }));
  return lines;
}

/** A card with a chart of metrics; drawn when it comes into view, and again when the view changes. */
function chart(names, options = {}) {
  const said = about(names[0]), reads = el("div", "reads"), place = el("div", "plot");
  const better = { down: " Lower is better.", up: " Higher is better." }[said.better] || "";
  const says = options.says ?? said.says + better;
  const card = el("div", { class: options.wide ? "chart wide" : "chart", "data-metric": names[0] },
    el("h3", { title: names.join(", ") }, options.title || said.title, " ", el("span", "unit", unitName(said.unit))),
    says ? el("p", "says", says) : null, reads, place);
  drawnLater(place, () => {
    const lines = linesOf(names, options.parts);
    if (!lines.length) return place.append(el("p", "says", "nothing to show"));
    const smooth = said.noisy && !options.exact && VIEW.smooth > 0 && lines.some((l) => l.y.length > 8);
    drawLines(place, reads, lines, { smooth, unit: said.unit, ground: options.ground });
  });
  return card;
}

function unitName(unit) {
  return unit === "share" ? "%" : unit;
}

function drawnLater(place, draw) {
  DRAWN.set(place, () => { place.replaceChildren(); draw(); });
  SEEN.observe(place);
}

/** Draw lines into `place`; `reads` says the values under the cursor, or the last ones. */
function drawLines(place, reads, lines, { smooth, unit, ground }) {
  const tables = lines.map((l) => (smooth ? [l.x, l.y, smoothed(l.y, weightFor(l.y.length))] : [l.x, l.y]));
  const joined = tables.length > 1 ? uPlot.join(tables) : tables[0];
  const specs = [{}], own = [];
  for (const l of lines) {
    const ink = inked("--s" + (l.run % COLOURS));
    if (smooth) specs.push({ stroke: pale(ink), width: 1, spanGaps: true, points: { show: false } });
    own.push(specs.length);
    const points = { show: l.y.length < 40 && !smooth, size: l.y.length === 1 ? 9 : 5, fill: ink };
    specs.push({ stroke: ink, width: 2, dash: l.dash, spanGaps: true, points });
  }
  const say = (plot) => {
    const at = plot.cursor.idx, ended = at === null || at === undefined;
    const read = (l, i) => [
      lines.length > 1 || l.label ? runMark(l.run, Boolean(l.dash)) : null, l.label ? l.label + " " : "",
      el("b", null, withUnit(ended ? l.y[l.y.length - 1] : near(joined[own[i]], at), unit))];
    reads.replaceChildren(...lines.map((l, i) => el("i", null, read(l, i))),
      el("span", null, ended ? "at the end" : "at " + AXES[VIEW.by] + " " + show(joined[0][at])));
    place.setAttribute("aria-label", "chart: " + reads.textContent);
  };
  const positive = lines.every((l) => l.y.every((v) => v > 0));
  const range = (_, low, high) => roomy(ground ? Math.min(0, low) : low, high, unit);
  plotInto(place, joined, specs, { y: VIEW.log && positive ? { distr: 3 } : { distr: 1, range } }, say, { unit });
}

/** The axis around what is drawn; a constant stands in the middle, zero on the ground. */
function roomy(low, high, unit) {
  if (low === null || high === null) return [0, 1];
  if (low !== high) return uPlot.rangeNum(low, high, 0.1, true);
  return low === 0 ? [0, unit === "share" ? 0.1 : 1] : [low - Math.abs(low) / 10, high + Math.abs(high) / 10];
}

/** The same from left to right; around a single point stand its neighbours, not zero and its double. */
function sideways(plot, low, high) {
  const [only, ...others] = plot.data[0];
  if (only === undefined || others.length) return [low, high];
  return VIEW.by === "step" ? [only - 1, only + 1] : [only / 2, only * 1.5 || 1];
}
const WHOLE = [1, 2, 5].flatMap((n) => Array.from({ length: 14 }, (_, power) => n * 10 ** power)).sort((a, b) => a - b);

/** The value at an index, or the last one before it: runs don't log at the same places. */
function near(values, index) {
  for (let i = index; i >= 0; i--) if (values[i] !== null && values[i] !== undefined) return values[i];
  return null;
}

function plotInto(place, data, specs, scales, say, { bands, unit, label } = {}) {
  const line = { stroke: inked("--grid"), width: 1 };
  const axis = { stroke: inked("--soft"), grid: line, ticks: line, font: FONT, labelFont: FONT };
  const below = {
    ...axis, size: 28, label: AXES[VIEW.by], labelSize: 18, labelGap: 0,
    values: (_, values) => ticks(values), ...(VIEW.by === "hours" ? {} : { incrs: WHOLE }),
  };
  const aside = { ...axis, size: 64, values: (_, values) => ticks(values, unit) };
  if (label) Object.assign(aside, { label, labelSize: 18, labelGap: 0 });
  const range = scales.x || sideways;
  const plot = new uPlot({
    width: Math.max(place.clientWidth, 200), height: HEIGHT, legend: { show: false }, bands, padding: [8, 18, 0, 0],
    cursor: { sync: { key: "all" }, points: { size: 6 }, drag: { x: true, y: false } },
    scales: { x: { time: false, range }, y: scales.y },
    axes: [below, aside],
    series: specs, hooks: { setCursor: [say], ready: [say] },
  }, data, place);
  place.setAttribute("role", "img");
  place.uplot = plot;
}

function redraw() {
  for (const [place, draw] of DRAWN) if (place.firstChild && place.isConnected && place.clientWidth) draw();
}
function drawAll() {
  for (const [place, draw] of DRAWN) if (!place.firstChild && place.clientWidth) draw();
}

const SEEN = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting && !entry.target.firstChild) DRAWN.get(entry.target)();
}, { rootMargin: "400px" });
let width = 0;
addEventListener("resize", () => {
  if (document.documentElement.clientWidth === width) return; // a phone's address bar
  width = document.documentElement.clientWidth;
  requestAnimationFrame(redraw);
});
