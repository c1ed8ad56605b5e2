"use strict";
// Curves: one line a run (or a phase), smoothed over its pale original; all charts share their cursor.

const VIEW = { smooth: 0.6, log: false, by: "step", hidden: new Set() };
const DRAWN = new Map(); // chart's place → how to draw it again
const AXES = { step: "step", tokens: "tokens trained", hours: "hours of training" };

/** A colour as the theme has it now: a canvas knows no variables. */
function inked(variable) {
  const node = el("i");
  node.style.color = "var(" + variable + ")";
  document.body.append(node);
  const value = getComputedStyle(node).color;
  node.remove();
  return value;
}
function colour(index) {
  return inked("--s" + (index % 8));
}
function pale(rgb) {
  return rgb.replace(/^rgb\((.*)\)$/, "rgba($1, 0.28)");
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

/** Where each step of a run stands on the shared axis. */
function positions(run) {
  if (VIEW.by === "step") return run.steps;
  let total = 0;
  const add = VIEW.by === "tokens"
    ? (i) => (run.metrics["train/global_tokens"]?.[i] ?? run.metrics["perf/total_num_tokens"]?.[i] ?? 0)
    : (i) => ["timing_s/step", "timing_s/testing", "timing_s/save", "timing_s/save_checkpoint"].reduce((t, n) => t + (run.metrics[n]?.[i] || 0), 0) / 3600;
  return run.steps.map((_, i) => (total += add(i)));
}

/** Lines of one metric, one for each run that has it and isn't hidden. */
function linesOf(names) {
  const lines = [];
  DATA.runs.forEach((run, r) => names.forEach((name, n) => {
    const found = series(run, name);
    if (!found || VIEW.hidden.has(r)) return;
    const at = new Map(run.steps.map((step, i) => [step, i])), where = positions(run);
    const label = [DATA.runs.length > 1 ? run.name : "", names.length > 1 ? about(name).title : ""].filter(Boolean).join(", ");
    lines.push({ label, colour: names.length > 1 ? r * names.length + n : r, x: found.steps.map((s) => where[at.get(s)]), y: found.values });
  }));
  return lines;
}

/** A card with a chart of metrics; drawn when it comes into view, and again when the view changes. */
function chart(names, options = {}) {
  const said = about(names[0]), reads = el("div", "reads"), place = el("div", "plot");
  const title = options.title || said.title, better = { down: " Lower is better.", up: " Higher is better." }[said.better] || "";
  const card = el("div", { class: options.wide ? "chart wide" : "chart", "data-metric": names[0] },
    el("h3", { title: names.join(", ") }, title, " ", el("span", "unit", said.unit)),
    el("p", "says", options.says ?? said.says + better), reads, place);
  const draw = () => {
    place.replaceChildren();
    const lines = linesOf(names);
    if (!lines.length) return place.append(el("p", "says", "nothing to show"));
    drawLines(place, reads, lines, said.noisy && !options.exact, said.unit);
  };
  DRAWN.set(place, draw);
  SEEN.observe(place);
  return card;
}

/** Draw lines into `place`; `reads` says the values under the cursor, or the last ones. */
function drawLines(place, reads, lines, smooth, unit) {
  const weight = smooth && VIEW.smooth > 0 && lines.some((l) => l.y.length > 8) ? VIEW.smooth : 0;
  const tables = lines.map((l) => (weight ? [l.x, l.y, smoothed(l.y, weight)] : [l.x, l.y]));
  const joined = tables.length > 1 ? uPlot.join(tables) : tables[0];
  const specs = [{}], own = [];
  for (const l of lines) {
    const ink = colour(l.colour);
    if (weight) specs.push({ stroke: pale(ink), width: 1, spanGaps: true, points: { show: false } });
    own.push(specs.length);
    specs.push({ stroke: ink, width: 2, spanGaps: true, points: { show: l.y.length < 40, size: 5, fill: ink } });
  }
  const positive = lines.every((l) => l.y.every((v) => v > 0));
  const say = (plot) => {
    const at = plot.cursor.idx;
    reads.replaceChildren(...lines.map((l, i) => {
      const value = at === null || at === undefined ? l.y[l.y.length - 1] : near(joined[own[i]], at);
      return el("i", null, lines.length > 1 || l.label ? el("span", "dot c" + (l.colour % 8)) : null, l.label ? l.label + " " : "", el("b", null, withUnit(value, unit)));
    }), at === null || at === undefined ? el("span", null, "at the end") : el("span", null, "at " + AXES[VIEW.by] + " " + show(joined[0][at])));
  };
  plotInto(place, joined, specs, { y: VIEW.log && positive ? { distr: 3 } : { distr: 1, range: (_, low, high) => roomy(low, high, unit) } }, say, { unit });
}

/** The axis around what is drawn; a constant stands in the middle, zero on the ground. */
function roomy(low, high, unit) {
  if (low === null || high === null) return [0, 1];
  if (low !== high) return uPlot.rangeNum(low, high, 0.1, true);
  return low === 0 ? [0, unit === "share" ? 0.1 : 1] : [low - Math.abs(low) / 10, high + Math.abs(high) / 10];
}
const WHOLE = [1, 2, 5].flatMap((n) => Array.from({ length: 14 }, (_, power) => n * 10 ** power)).sort((a, b) => a - b);

/** The value at an index, or the last one before it: runs don't log at the same places. */
function near(values, index) {
  for (let i = index; i >= 0; i--) if (values[i] !== null && values[i] !== undefined) return values[i];
  return null;
}

function plotInto(place, data, specs, scales, say, { bands, unit } = {}) {
  const axis = { stroke: inked("--soft"), grid: { stroke: inked("--grid"), width: 1 }, ticks: { stroke: inked("--grid"), width: 1 } };
  const ticks = (_, values) => values.map((v) => (v === null ? "" : Math.abs(v) >= 1e4 ? short(Math.abs(v)) : show(v, 3)));
  const shares = (_, values) => values.map((v) => (v === null ? "" : Number((100 * v).toPrecision(4)) + " %"));
  const log = scales.y.distr === 3;
  const plot = new uPlot({
    width: Math.max(place.clientWidth, 200), height: 210, legend: { show: false }, bands,
    cursor: { sync: { key: "all" }, points: { size: 6 }, drag: { x: true, y: false } },
    scales: { x: { time: false }, y: scales.y },
    axes: [{ ...axis, size: 32, values: ticks, ...(VIEW.by === "hours" ? {} : { incrs: WHOLE }) }, { ...axis, size: 58, values: unit === "share" ? shares : log ? undefined : ticks }],
    series: specs, hooks: { setCursor: [say], ready: [say] },
  }, data, place);
  place.uplot = plot;
}

const PHASES = {
  gen: "sampling answers", tools: "waiting for tools", reward: "waiting for scores", old_log_prob: "log-probabilities before", ref: "reference's log-probabilities", adv: "advantages",
  update_actor: "update", sync_weights: "weights to the sampler", testing: "validation", save: "saving", save_checkpoint: "saving",
  forward_backward: "forward and backward",
};

/** Phases of a step stacked: each band is a phase's seconds. */
function stack(run) {
  const outside = ["testing", "save", "save_checkpoint"];
  const names = Object.keys(run.metrics).filter((n) => n.startsWith("timing_s/") && n !== "timing_s/step" && series(run, n));
  if (!names.length) return null;
  const given = (name, i) => run.metrics[name]?.[i] || 0; // waiting for tools and scores is part of sampling: shown apart
  const value = (name, i) => (name === "timing_s/gen" ? Math.max(0, given(name, i) - given("timing_s/tools", i) - given("timing_s/reward", i)) : given(name, i));
  const rows = run.steps.map((_, i) => i).filter((i) => run.metrics["timing_s/step"]?.[i]);
  if (!rows.length) return null;
  const parts = names.map((name) => ({ name: PHASES[name.slice(9)] || name.slice(9).replace(/_/g, " "), key: name, seconds: rows.map((i) => value(name, i)), outside: outside.includes(name.slice(9)) }));
  const other = rows.map((i, k) => Math.max(0, value("timing_s/step", i) - parts.filter((p) => !p.outside).reduce((t, p) => t + p.seconds[k], 0)));
  if (other.some((v) => v > 0)) parts.push({ name: "other", seconds: other, outside: false });
  const total = (p) => p.seconds.reduce((a, b) => a + b, 0);
  parts.sort((a, b) => total(b) - total(a));
  const all = parts.reduce((t, p) => t + total(p), 0);
  return { rows, parts: parts.map((p, k) => ({ ...p, total: total(p), share: total(p) / all, colour: Math.min(k, 7) })) };
}

function stackChart(run) {
  const found = stack(run);
  if (!found) return null;
  const reads = el("div", "reads"), place = el("div", "plot");
  const card = el("div", "chart wide", el("h3", null, DATA.runs.length > 1 ? run.name : "Seconds by phase"), reads, place);
  DRAWN.set(place, () => {
    place.replaceChildren();
    const where = positions(run), tops = [];
    found.parts.forEach((p, k) => tops.push(p.seconds.map((v, i) => v + (k ? tops[k - 1][i] : 0))));
    const specs = [{}], bands = [];
    tops.forEach((_, k) => {
      const ink = colour(found.parts[k].colour);
      specs.push({ fill: pale(ink).replace("0.28", "0.75"), paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } });
      if (k) bands.push({ series: [k + 1, k] });
    });
    const x = found.rows.map((i) => where[i]), end = x.length - 1;
    x.push(x[end] + (end ? x[end] - x[end - 1] : 1)); // the last step is as wide as the one before
    for (const top of tops) top.push(top[end]);
    const say = (plot) => {
      const given = plot.cursor.idx !== null && plot.cursor.idx !== undefined, at = Math.min(plot.cursor.idx, end);
      reads.replaceChildren(...found.parts.map((p) => el("i", null, el("span", "dot c" + p.colour), p.name + " ",
        el("b", null, given ? duration(p.seconds[at]) : (100 * p.share).toFixed(p.share < 0.1 ? 1 : 0) + " %"))),
        el("span", null, given ? "at " + AXES[VIEW.by] + " " + show(where[found.rows[at]]) : "of the run's time"));
    };
    plotInto(place, [x, ...tops], specs, { y: { range: (_, low, high) => [0, high * 1.05 || 1] } }, say, { bands });
  });
  SEEN.observe(place);
  return card;
}

function redraw() {
  for (const [place, draw] of DRAWN) if (place.firstChild && place.isConnected && place.clientWidth) draw();
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
addEventListener("beforeprint", () => { for (const [place, draw] of DRAWN) if (!place.firstChild && place.clientWidth) draw(); });
