"use strict";
// The page from the top: what the runs are, their curves, their memory.

const KIND = DATA.runs.map((run) => {
  const learns = Object.keys(run.metrics).some((n) => n.startsWith("critic/") || n.startsWith("actor/"));
  const asked = Object.keys(run.config).some((k) => k.startsWith("actor_rollout_ref."));
  return learns || asked ? "rl" : run.steps.length || Object.keys(run.config).length ? "sft" : "";
});
const WORDS = {
  sft: "Supervised fine-tuning: the model learns to write what the example conversations say, one token after another.",
  rl: "Reinforcement learning: the model answers questions, tools in hand; answers that score above their group are made more likely.",
};

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

/** Metrics that any run has. */
function metricNames() {
  const names = new Set(DATA.runs.flatMap((run) => Object.keys(run.metrics)));
  return [...names].filter((n) => DATA.runs.some((run) => series(run, n)));
}

function sum(run, name) {
  return (run.metrics[name] || []).reduce((all, v) => all + (v || 0), 0);
}

/** A metric's first and last value, and its extremes. */
function ends(run, name) {
  const found = series(run, name);
  if (!found) return null;
  const { values } = found, low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  return { first: values[0], last: values[values.length - 1], low, high, count: values.length };
}

/** [label, value, remark] of a run, in the order of what one asks first. */
function numbersOf(run) {
  const out = [], add = (label, value, remark) => out.push([label, value, remark || ""]);
  const last = run.steps[run.steps.length - 1] ?? 0, trained = series(run, "timing_s/step")?.steps.length;
  add("steps", grouped(last), trained && trained < last ? grouped(trained) + " in this file" : "");
  for (const [label, name] of [["training loss", "train/loss"], ["score", "critic/score/mean"], ["answer length", "response_length/mean"]]) {
    const found = ends(run, name);
    if (found) add(label, show(found.last), found.count > 1 ? "at first " + show(found.first) : "");
  }
  const loss = ends(run, "val/loss");
  if (loss) add("best validation loss", show(loss.low), "of " + loss.count + (loss.count === 1 ? " validation" : " validations"));
  for (const name of Object.keys(run.metrics).filter((n) => /^val-core\/.+\/acc\/mean@\d+$/.test(n)).slice(0, 3)) {
    const found = ends(run, name);
    if (found) add(about(name).title.replace(/^A/, "a"), percent(found.last), found.count > 1 ? "at first " + percent(found.first) : "");
  }
  const tokens = sum(run, "train/global_tokens") || sum(run, "perf/total_num_tokens"), inLoss = sum(run, "train/trained_tokens");
  if (tokens) add("tokens trained on", show(tokens), inLoss ? show(inLoss) + " in the loss" : "");
  const seconds = TIMED.reduce((all, name) => all + sum(run, name), 0);
  if (seconds) add("time", duration(seconds), "with validation and saving");
  const speed = series(run, "perf/tokens_per_second_per_gpu") || series(run, "perf/throughput");
  const onCPU = run.config["trainer.device"] === "cpu";
  if (speed) add(onCPU ? "tokens/s per process" : "tokens/s per GPU", show(Math.round(median(speed.values))), "median of the steps");
  const mfu = series(run, "train/mfu") || series(run, "perf/mfu/actor"), memory = ends(run, "perf/max_memory_allocated_gb");
  if (mfu) add("MFU", percent(median(mfu.values)), "of the GPUs' peak FLOP/s");
  if (memory) add("peak memory", show(memory.high) + " GiB", onCPU ? "of a process" : "of a GPU");
  const skipped = ends(run, "train/skipped_steps") || ends(run, "actor/skipped_updates");
  if (skipped && skipped.last) add("skipped steps", show(skipped.last), "gradient not finite");
  return out;
}

/** Facts of each run, [[label, value], …], as those that all share and those that differ: [label, values]. */
function shared(everyone) {
  const labels = [...new Set(everyone.flatMap((facts) => facts.map(([label]) => label)))];
  const rows = labels.map((label) => [label, everyone.map((facts) => facts.find(([l]) => l === label)?.[1] ?? "–")]);
  const same = ([, values]) => new Set(values).size === 1;
  return {
    same: rows.filter(same).map(([label, values]) => [label, values[0]]),
    differing: rows.filter((row) => !same(row)),
  };
}

function overview() {
  const many = DATA.runs.length > 1, main = document.getElementById("main");
  const name = many ? DATA.runs.length + " runs compared" : DATA.runs[0].name;
  const what = shared(DATA.runs.map((run) => run.about)), how = shared(DATA.runs.map((run) => run.settings));
  document.title = name + " – run report";
  opening(name, [...new Set(KIND.filter(Boolean))].map((kind) => WORDS[kind]),
    [...what.same, ...(how.same.length ? [["settings", inLine(how.same)]] : [])]);
  for (const run of DATA.runs) {
    for (const note of run.notes) main.append(el("p", "says note", (many ? run.name + ": " : "") + note + "."));
  }
  const numbers = DATA.runs.map(numbersOf), comparable = how.differing.filter(([, values]) => !values.includes("–"));
  main.append(many ? comparison(numbers, [...what.differing, ...comparable]) : tiles(numbers[0]));
}

/** Runs side by side: what differs of what they are, and the numbers one asks for first. */
function comparison(numbers, differing) {
  const labels = [...new Set(numbers.flatMap((all) => all.map(([label]) => label)))];
  const cell = (found) => el("td", { class: "n", title: found ? found[2] : null }, found ? found[1] : "–");
  const row = (label, cells) => el("tr", null, el("th", { scope: "row" }, label), cells);
  return tableOf([[el("th"), DATA.runs.map((_, r) => el("th", "n", runName(r)))]], [
    ...differing.map(([label, values]) => row(label, values.map((v) => el("td", "value n", v)))),
    ...labels.map((label) => row(label, numbers.map((all) => cell(all.find(([l]) => l === label))))),
  ]);
}

/** How curves are drawn: smoothing, the axes, which runs. */
function controls() {
  const press = (key, value, label) => el("button", { type: "button", "aria-pressed": String(VIEW[key] === value), onclick: (event) => {
    VIEW[key] = value;
    for (const b of event.currentTarget.parentNode.children) b.setAttribute("aria-pressed", String(b === event.currentTarget));
    redraw();
  } }, label);
  const has = (name) => DATA.runs.some((run) => series(run, name));
  const known = { step: true, tokens: has("train/global_tokens") || has("perf/total_num_tokens"), hours: has("timing_s/step") };
  const reads = el("span", "count", grouped(VIEW.smooth, 2));
  const slide = (event) => {
    VIEW.smooth = Number(event.target.value);
    reads.textContent = grouped(VIEW.smooth, 2);
    redraw();
  };
  const check = (r) => (event) => {
    if (event.target.checked) VIEW.hidden.delete(r); else VIEW.hidden.add(r);
    redraw();
  };
  return el("div", "bar",
    el("label", null, "smoothing", el("input", { type: "range", id: "smooth", min: 0, max: 0.98, step: 0.02, value: VIEW.smooth, oninput: slide }), reads),
    el("label", null, "by", el("span", "group", Object.keys(AXES).filter((k) => known[k]).map((k) => press("by", k, k)))),
    el("label", null, el("input", { type: "checkbox", id: "log", onchange: (event) => { VIEW.log = event.target.checked; redraw(); } }), "logarithmic"),
    DATA.runs.length > 1 ? DATA.runs.map((_, r) =>
      el("label", null, el("input", { type: "checkbox", checked: true, "data-run": r, onchange: check(r) }), runName(r))) : null);
}

function curves() {
  const names = metricNames();
  if (!names.length) return;
  const node = section("curves", "Curves", "The pale line is what was measured, the strong one is smoothed." +
    (matchMedia("(any-pointer: fine)").matches ? " Drag over a chart to zoom in, double-click to zoom out." : " Tap a chart to read its values."));
  const order = Object.keys(DATA.about), first = names.filter((n) => about(n).first).sort((a, b) => order.indexOf(a) - order.indexOf(b));
  node.append(controls(), el("div", "charts", (first.length ? first : names.slice(0, 6)).map((n) => chart([n]))));
  const groups = new Map();
  for (const name of names) {
    const group = name.split("/")[0];
    groups.set(group, [...(groups.get(group) || []), name]);
  }
  const rest = el("details", { id: "all" }, el("summary", null, "All metrics ", el("small", null, names.length + " of them, by name")));
  const find = el("input", { type: "search", placeholder: "find a metric", "aria-label": "find a metric", oninput: () => {
    for (const card of rest.querySelectorAll(".chart")) card.hidden = !card.dataset.metric.includes(find.value.trim());
  } });
  rest.addEventListener("toggle", () => {
    if (rest.children.length > 1) return;
    rest.append(el("div", "bar", find));
    for (const [group, members] of groups) rest.append(el("h3", null, group), el("div", "charts", members.map((n) => chart([n], { title: n }))));
  });
  node.append(rest);
}

function memory() {
  const names = ["perf/max_memory_allocated_gb", "perf/max_memory_reserved_gb"];
  if (!DATA.runs.some((run) => series(run, names[0]))) return;
  const node = section("memory", "Memory", "Of one GPU; without one, of the process. What is in use decides whether a run fits; what is reserved is what others can't have.");
  const shown = names.filter((n) => DATA.runs.some((run) => series(run, n)));
  node.append(el("div", "charts", chart(shown, { title: "Largest so far", parts: ["in use", "reserved"], wide: true, says: "", exact: true, ground: true })));
}
