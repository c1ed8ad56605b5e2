"use strict";
// Where a run's time goes: the phases of its steps, each in the same colour in every run's chart.

const TIMED = ["timing_s/step", "timing_s/testing", "timing_s/save", "timing_s/save_checkpoint"];
const PHASES = {
  gen: "sampling answers", tools: "waiting for tools", reward: "waiting for scores",
  loop: "between the sampler's steps",
  old_log_prob: "log-probabilities before", ref: "reference's log-probabilities", adv: "advantages",
  update_actor: "update", sync_weights: "weights to the sampler",
  forward_backward: "forward and backward",
  testing: "validation", save: "saving", save_checkpoint: "saving",
};
const MOST_BARS = 400; // of a run's chart: of longer runs neighbouring steps share one

/** The seconds of a run's phases: {rows, parts: [{name, key, seconds}], ends: whether a phase is outside a step}. */
function phasesOf(run) {
  const names = Object.keys(run.metrics).filter((n) => n.startsWith("timing_s/") && n !== "timing_s/step" && series(run, n));
  const given = (name, i) => run.metrics[name]?.[i] || 0;
  const rows = run.steps.map((_, i) => i).filter((i) => given("timing_s/step", i));
  if (!names.length || !rows.length) return null;
  // Parts of sampling: shown apart
  const apart = (i) => given("timing_s/tools", i) + given("timing_s/reward", i) + given("timing_s/loop", i);
  const value = (name, i) => (name === "timing_s/gen" ? Math.max(0, given(name, i) - apart(i)) : given(name, i));
  const parts = names.map((key) => {
    const name = PHASES[key.slice(9)] || key.slice(9).replace(/_/g, " ");
    return { name, key, seconds: rows.map((i) => value(key, i)), outside: TIMED.includes(key) };
  });
  const inside = parts.filter((p) => !p.outside);
  const rest = rows.map((i, k) => Math.max(0, given("timing_s/step", i) - total(inside.map((p) => p.seconds[k]))));
  if (rest.some((v) => v > 0)) parts.push({ name: "other", key: "timing_s/step", seconds: rest, outside: false });
  const all = total(parts.flatMap((p) => total(p.seconds)));
  for (const part of parts) {
    part.total = total(part.seconds);
    part.share = part.total / all;
  }
  return { rows, parts };
}

function total(values) {
  return values.reduce((sum, v) => sum + v, 0);
}

function time() {
  const found = DATA.runs.map(phasesOf), known = found.filter(Boolean);
  if (!known.length) return;
  const sums = new Map();
  for (const { parts } of known) for (const p of parts) sums.set(p.name, (sums.get(p.name) || 0) + p.total);
  const names = [...sums.keys()].sort((a, b) => sums.get(b) - sums.get(a));
  const colours = new Map(names.map((name, k) => [name, Math.min(k, COLOURS - 1)]));
  for (const { parts } of known) parts.sort((a, b) => names.indexOf(a.name) - names.indexOf(b.name));
  const node = section("time", "Where the time goes",
    "Seconds of each step, a colour for each phase. Validation and saving come on top, where they happened." +
    (DATA.runs.length > 1 ? " All runs are drawn on the same axes." : ""));
  node.append(el("div", "charts", found.map((f, r) => (f ? phaseChart(r, found, colours) : null))));
  node.append(phaseTable(names, found, colours));
}

/** Neighbouring steps put together where there are too many to tell apart: their mean seconds. */
function barsOf(found, where, each) {
  const starts = [];
  for (let k = 0; k < found.rows.length; k += each) starts.push(k);
  const mean = (values) => total(values) / values.length;
  const last = found.rows.length - 1, step = last ? where[found.rows[last]] - where[found.rows[last - 1]] : 1;
  return {
    x: [...starts.map((k) => where[found.rows[k]]), where[found.rows[last]] + step], // the last is as wide as the one before
    seconds: found.parts.map((p) => starts.map((k) => mean(p.seconds.slice(k, k + each)))),
  };
}

/** One run's phases stacked, on axes that fit the bars of every run. */
function phaseChart(index, everyone, colours) {
  const found = everyone[index], many = DATA.runs.length > 1;
  const reads = el("div", "reads"), place = el("div", "plot");
  const title = many ? runName(index) : "Seconds by phase";
  const each = Math.ceil(Math.max(...everyone.map((f) => (f ? f.rows.length : 0))) / MOST_BARS); // the same for all
  drawnLater(place, () => {
    const all = everyone.map((f, r) => f && barsOf(f, positions(DATA.runs[r]), each)).filter(Boolean);
    const height = (bars) => Math.max(...bars.x.slice(1).map((_, i) => total(bars.seconds.map((s) => s[i]))));
    const top = Math.max(...all.map(height)) * 1.05 || 1;
    const sides = [Math.min(...all.map((bars) => bars.x[0])), Math.max(...all.map((bars) => bars.x.at(-1)))];
    drawPhases(place, reads, found, barsOf(found, positions(DATA.runs[index]), each), colours, { top, sides, each });
  });
  return el("div", "chart wide", el("h3", null, title), reads, place);
}

function drawPhases(place, reads, found, bars, colours, { top, sides, each }) {
  const tops = [], specs = [{}], bands = [], end = bars.x.length - 2;
  bars.seconds.forEach((values, k) => {
    const sums = values.map((v, i) => v + (k ? tops[k - 1][i] : 0));
    tops.push([...sums, sums[end]]);
    const fill = inked("--p" + colours.get(found.parts[k].name));
    specs.push({ fill, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } });
    if (k) bands.push({ series: [k + 1, k] });
  });
  const say = (plot) => {
    const given = plot.cursor.idx !== null && plot.cursor.idx !== undefined, at = Math.min(plot.cursor.idx, end);
    const worth = (p, k) => (given ? bars.seconds[k][at] > 0 : p.share >= 0.005);
    const text = (p, k) => (given ? duration(bars.seconds[k][at]) : percent(p.share));
    const shown = found.parts.map((p, k) => worth(p, k) && el("i", null,
      el("span", "dot p" + colours.get(p.name)), p.name + " ", el("b", null, text(p, k))));
    const several = each > 1 ? ", mean of " + each + " steps" : "";
    reads.replaceChildren(...shown.filter(Boolean),
      el("span", null, given ? "at " + AXES[VIEW.by] + " " + show(bars.x[at]) + several : "of the run's time" + (each > 1 ? "; a bar is the mean of " + each + " steps" : "")));
    place.setAttribute("aria-label", "chart: " + reads.textContent);
  };
  const scales = { x: () => sides, y: { range: () => [0, top] } };
  plotInto(place, [bars.x, ...tops], specs, scales, say, { bands, label: "seconds" });
}

/** How long each phase took: in all, in a step that had it, and as a share of the run's time. */
function phaseTable(names, found, colours) {
  const many = DATA.runs.length > 1, known = found.filter(Boolean);
  const often = (p) => p.seconds.filter((v) => v > 0).length;
  const parts = known.flatMap((f) => f.parts), totals = parts.map((p) => p.total);
  const unit = timeUnit(Math.max(...totals)), decimals = columnDecimals(totals.map((t) => t / unit.size));
  const places = columnDecimals(parts.map((p) => p.total / (often(p) || 1)));
  const heads = ["in all, " + unit.name, "a step, s", "share"];
  const cells = (p) => [
    el("td", "n", p ? grouped(p.total / unit.size, decimals) : "–"),
    el("td", "n", p && often(p) ? grouped(p.total / often(p), places) : "–"),
    el("td", "n", p ? percent(p.share) : "–")];
  return tableOf(
    [many ? [el("th"), DATA.runs.map((_, r) => el("th", { class: "group-head", colspan: 3 }, runName(r)))] : null,
      [el("th", null, "phase"), DATA.runs.map(() => heads.map((h) => el("th", "n", h)))]].filter(Boolean),
    names.map((name) => el("tr", null,
      el("th", { scope: "row", title: known.map((f) => f.parts.find((p) => p.name === name)?.key).find(Boolean) },
        el("span", "run", el("span", "dot p" + colours.get(name)), name)),
      found.map((f) => cells(f && f.parts.find((p) => p.name === name))))));
}
