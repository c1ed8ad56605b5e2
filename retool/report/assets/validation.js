"use strict";
// Validations, a table for each data set: a row a step, and the runs side by side.

const MOST_ROWS = 100; // of a table; of more validations the last are shown, and those with a column's best

/** Metrics of validations by data set, over all runs: {source: [names]}; "" is what belongs to none. */
function validated() {
  const names = metricNames().filter((n) => /^val(-core|-aux)?\//.test(n));
  const parts = /^val-(?:core|aux)\/(.+)\/[^/]+\/(?:mean|best|worst|maj|std)@.*$/;
  const sources = [...new Set(names.map((n) => n.match(parts)?.[1]).filter(Boolean))];
  const groups = new Map();
  for (const name of names) {
    const source = sources.find((s) => name.replace(/^val-(core|aux)\//, "").startsWith(s + "/")) || "";
    groups.set(source, [...(groups.get(source) || []), name]);
  }
  return groups;
}

function validation() {
  const groups = validated();
  if (!groups.size) return;
  const tried = [...groups.keys()].some(Boolean);
  const node = section("validation", "Validation",
    "On data that isn't trained on, every row counted once. Each column's best is in green and bold." +
    (tried ? " Each question is tried N times: mean@N is the share of right answers, best@N of questions with a right " +
      "one among them, maj@N of those where most answers are right." : ""));
  for (const [source, members] of groups) {
    const core = members.filter((n) => !n.startsWith("val-aux/")), rest = members.filter((n) => n.startsWith("val-aux/"));
    const title = source || (core.length ? "" : "all questions");
    if (title) node.append(el("h3", null, title));
    if (core.length) node.append(validationTable(core, source));
    if (!rest.length) continue;
    const some = rest.map((n) => columnName(n, source)).slice(0, 4).join(", ") + (rest.length > 4 ? " …" : "");
    node.append(el("details", null, el("summary", null, "More ", el("small", null, some)), validationTable(rest, source)));
  }
}

/** A validation metric's column, without the data set that stands above the table. */
function columnName(name, source) {
  if (source) return name.slice(name.indexOf(source) + source.length + 1);
  return name.startsWith("val-") ? name.slice(8) : about(name).title;
}

/** One metric of one run, as a column shows it: the same decimals from top to bottom, its best steps apart. */
function column(name, run, decimals) {
  const { steps, values } = series(run, name) || { steps: [], values: [] };
  const pick = { down: Math.min, up: Math.max }[about(name).better];
  const best = pick && values.length > 1 ? values.reduce((a, b) => pick(a, b)) : null;
  const at = new Map(steps.map((step, i) => [step, values[i]]));
  const cell = (step) => {
    const value = at.get(step) ?? null;
    const text = decimals === null ? withUnit(value, about(name).unit) : value === null ? "–" : grouped(value, decimals);
    return el("td", value !== null && value === best ? "n best" : "n", text);
  };
  return { cell, steps, best: steps.find((step) => best !== null && at.get(step) === best) };
}

/** Decimals that suit all values of a metric in all runs; null where each is written in its own way. */
function sharedDecimals(name, runs) {
  const sizes = runs.flatMap((run) => series(run, name)?.values ?? []).map(Math.abs);
  const high = sizes.reduce((a, b) => Math.max(a, b), 0);
  const odd = about(name).unit === "share" || high >= 1e6 || sizes.some((v) => v !== 0 && v < 1e-3);
  return odd ? null : sizes.every(Number.isInteger) ? 0 : decimalsOf(high);
}

function validationTable(names, source) {
  const runs = DATA.runs.filter((run) => names.some((n) => series(run, n))), many = DATA.runs.length > 1;
  const columns = names.flatMap((n) => runs.map((run) => column(n, run, sharedDecimals(n, runs))));
  const every = [...new Set(columns.flatMap((c) => c.steps))].sort((a, b) => a - b), bests = new Set(columns.map((c) => c.best));
  const steps = every.filter((step, i) => i >= every.length - MOST_ROWS || bests.has(step));
  const titles = names.map((n) => el("th", { class: many ? "group-head" : "n", colspan: runs.length, title: about(n).says }, columnName(n, source)));
  const whose = names.flatMap(() => runs.map((run) => el("th", "n", runName(DATA.runs.indexOf(run)))));
  const table = tableOf(many ? [[el("th"), titles], [el("th", "n", "step"), whose]] : [[el("th", "n", "step"), titles]],
    steps.map((step) => el("tr", null, el("td", "n", grouped(step)), columns.map((c) => c.cell(step)))));
  if (steps.length === every.length) return table;
  const says = "The last " + MOST_ROWS + " of " + grouped(every.length) + " validations, and each column's best.";
  return el("div", null, el("p", "says", says), table);
}
