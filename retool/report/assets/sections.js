"use strict";
// The page from the top: what the runs are, curves, time, validation, configuration.

const KIND = DATA.runs.map((run) =>
  Object.keys(run.metrics).some((n) => n.startsWith("critic/") || n.startsWith("actor/")) || Object.keys(run.config).some((k) => k.startsWith("actor_rollout_ref."))
    ? "rl" : run.steps.length || Object.keys(run.config).length ? "sft" : "");
const WORDS = {
  sft: "Supervised fine-tuning: the model learns to write what the example conversations say, one token after another.",
  rl: "Reinforcement learning: the model answers questions, tools in hand; answers that score above their group are made more likely.",
};

function sum(run, name) {
  return (run.metrics[name] || []).reduce((total, v) => total + (v || 0), 0);
}
function ends(run, name) {
  const found = series(run, name);
  return found && { first: found.values[0], last: found.values[found.values.length - 1], low: Math.min(...found.values.slice(-5000)), high: Math.max(...found.values.slice(-5000)), count: found.values.length };
}

/** [label, value, remark] of a run, in the order of what one asks first. */
function facts(run) {
  const out = [], add = (label, value, remark) => { if (value !== null && value !== undefined) out.push([label, value, remark || ""]); };
  const change = (name, digits) => { const e = ends(run, name); return e && [show(e.last, digits), e.count > 1 ? "from " + show(e.first, digits) : ""]; };
  const steps = Object.keys(run.metrics).some((n) => n === "timing_s/step") ? series(run, "timing_s/step").steps.length : run.steps.length;
  add("steps", run.steps.length ? String(run.steps[run.steps.length - 1]) : "0", steps !== run.steps[run.steps.length - 1] && steps ? steps + " in this file" : "");
  for (const [label, name] of [["training loss", "train/loss"], ["score", "critic/score/mean"], ["answer length", "response_length/mean"]]) {
    const found = change(name);
    if (found) add(label, ...found);
  }
  const loss = ends(run, "val/loss");
  if (loss) add("best validation loss", show(loss.low), loss.count + (loss.count === 1 ? " validation" : " validations"));
  for (const name of Object.keys(run.metrics).filter((n) => /^val-core\/.+\/acc\/mean@\d+$/.test(n)).slice(0, 3)) {
    const e = ends(run, name);
    add(about(name).title.toLowerCase(), (100 * e.last).toFixed(1) + " %", "best " + (100 * e.high).toFixed(1) + " %");
  }
  const tokens = sum(run, "train/global_tokens") || sum(run, "perf/total_num_tokens"), time = ["step", "testing", "save", "save_checkpoint"].reduce((t, n) => t + sum(run, "timing_s/" + n), 0);
  if (tokens) add("tokens trained on", short(tokens), sum(run, "train/trained_tokens") ? short(sum(run, "train/trained_tokens")) + " in the loss" : "");
  if (time) add("time", duration(time), "validation and saving included");
  for (const [label, name] of [["tokens/s per GPU", "perf/tokens_per_second_per_gpu"], ["tokens/s per GPU", "perf/throughput"]]) {
    const found = series(run, name);
    if (found) add(label, short(median(found.values)), "median of the steps");
  }
  const mfu = series(run, "train/mfu") || series(run, "perf/mfu/actor"), memory = ends(run, "perf/max_memory_allocated_gb");
  if (mfu) add("of the GPUs' peak", (100 * median(mfu.values)).toFixed(1) + " %", "model FLOPs utilisation");
  if (memory) add("peak memory", show(memory.high, 3) + " GiB", "of one GPU (CPU: process)");
  const skipped = ends(run, "train/skipped_steps");
  if (skipped && skipped.last) add("skipped steps", String(skipped.last), "gradient not finite");
  return out;
}

function overview() {
  const many = DATA.runs.length > 1, main = document.getElementById("main");
  const name = many ? DATA.runs.length + " runs compared" : DATA.runs[0].name;
  document.title = name + " – run report";
  main.append(el("h1", null, name));
  const kinds = [...new Set(KIND.filter(Boolean))];
  for (const kind of kinds) main.append(el("p", "says", WORDS[kind]));
  for (const run of DATA.runs) {
    for (const note of run.notes) main.append(el("p", "says note", (many ? run.name + ": " : "") + note + "."));
  }
  if (!many) {
    main.append(el("div", "cards", facts(DATA.runs[0]).map(([label, value, remark]) => el("div", "card", el("span", null, label), el("b", null, value), remark ? el("small", null, remark) : null))));
  } else {
    const all = DATA.runs.map(facts), labels = [...new Set(all.flatMap((f) => f.map((x) => x[0])))];
    main.append(tableOf([el("th", null, ""), DATA.runs.map((run, r) => el("th", "n", el("span", "dot c" + (r % 8)), " ", run.name))],
      labels.map((label) => el("tr", null, el("td", null, label), all.map((f) => {
        const found = f.find((x) => x[0] === label);
        return el("td", { class: "n", title: found ? found[2] : null }, found ? found[1] : "–");
      })))));
  }
}

/** How curves are drawn: smoothing, the axes, which runs. */
function controls() {
  const press = (key, value, label) => el("button", { type: "button", "aria-pressed": String(VIEW[key] === value), onclick: (event) => {
    VIEW[key] = value;
    for (const b of event.currentTarget.parentNode.children) b.setAttribute("aria-pressed", String(b === event.currentTarget));
    redraw();
  } }, label);
  const has = (name) => DATA.runs.some((run) => series(run, name));
  const by = Object.keys(AXES).filter((k) => k === "step" || (k === "tokens" && (has("train/global_tokens") || has("perf/total_num_tokens"))) || (k === "hours" && has("timing_s/step")));
  const reads = el("span", null, VIEW.smooth.toFixed(2));
  return el("div", "bar",
    el("label", null, "smoothing", el("input", { type: "range", id: "smooth", min: 0, max: 0.98, step: 0.02, value: VIEW.smooth, oninput: (event) => {
      VIEW.smooth = Number(event.target.value);
      reads.textContent = VIEW.smooth.toFixed(2);
      redraw();
    } }), reads),
    el("label", null, "by", el("span", "group", by.map((k) => press("by", k, k)))),
    el("label", null, el("input", { type: "checkbox", id: "log", onchange: (event) => { VIEW.log = event.target.checked; redraw(); } }), "logarithmic"),
    DATA.runs.length > 1 ? DATA.runs.map((run, r) => el("label", null, el("input", { type: "checkbox", checked: true, "data-run": r, onchange: (event) => {
      event.target.checked ? VIEW.hidden.delete(r) : VIEW.hidden.add(r);
      redraw();
    } }), el("span", "dot c" + (r % 8)), run.name)) : null);
}

function curves() {
  const names = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.metrics)))].filter((n) => DATA.runs.some((run) => series(run, n)));
  if (!names.length) return;
  const node = section("curves", "Curves", "Pale is what was measured, strong is smoothed. Drag over a chart to zoom in, double-click to zoom out.");
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

function time() {
  const found = DATA.runs.map(stack);
  if (!found.some(Boolean)) return;
  const node = section("time", "Where the time goes", "Seconds of each step, one band a phase. Phases are timed on the device; validation and saving stand where they happened.");
  node.append(el("div", "charts", DATA.runs.map(stackChart)));
  const phases = [...new Set(found.flatMap((f) => (f ? f.parts.map((p) => p.name) : [])))];
  node.append(tableOf([el("th", null, "phase"), DATA.runs.map((run) => [el("th", "n", DATA.runs.length > 1 ? run.name : "in all"), el("th", "n", "a step"), el("th", "n", "share")])],
    phases.map((phase) => el("tr", null, el("td", { title: found.map((f) => f && f.parts.find((p) => p.name === phase)?.key).find(Boolean) }, phase), found.map((f) => {
      const p = f && f.parts.find((part) => part.name === phase), often = p && p.seconds.filter((v) => v > 0).length;
      return [el("td", "n", p ? duration(p.total) : "–"), el("td", "n", p && often ? duration(p.total / often) : "–"), el("td", "n", p ? (100 * p.share).toFixed(1) + " %" : "–")];
    })))));
}

function memory() {
  const names = ["perf/max_memory_allocated_gb", "perf/max_memory_reserved_gb"];
  if (!DATA.runs.some((run) => series(run, names[0]))) return;
  const node = section("memory", "Memory", "Of one GPU; without one, of the process. What is in use decides whether a run fits; what is reserved is what others can't have.");
  node.append(el("div", "charts", chart(names, { title: "Largest so far", wide: true, says: "", exact: true })));
}

/** Tables of every validation: a row a step, a column a number; the best of each column stands out. */
function validation() {
  const tables = [];
  DATA.runs.forEach((run, r) => {
    const names = Object.keys(run.metrics).filter((n) => /^val(-core|-aux)?\//.test(n) && series(run, n));
    const groups = new Map();
    const sources = [...new Set(names.map((n) => n.match(/^val-(?:core|aux)\/(.+)\/[^/]+\/(?:mean|best|worst|maj|std)@.*$/)?.[1]).filter(Boolean))];
    for (const name of names) {
      const source = sources.find((s) => name.replace(/^val-(core|aux)\//, "").startsWith(s + "/")) || "";
      groups.set(source, [...(groups.get(source) || []), name]);
    }
    for (const [source, members] of groups) tables.push({ run, r, source, members });
  });
  if (!tables.length) return;
  const node = section("validation", "Validation", "On data that isn't trained on, every row counted once. The best of each column is in green." +
    (tables.some((t) => t.source) ? " Each question is tried N times: mean@N is the share of right answers, best@N of questions with a right one among them, maj@N of those where most answers are right." : ""));
  for (const { run, r, source, members } of tables) {
    const core = members.filter((n) => !n.startsWith("val-aux/")), rest = members.filter((n) => n.startsWith("val-aux/"));
    const title = [DATA.runs.length > 1 ? run.name : "", source || (core.length ? "" : "all questions")].filter(Boolean).join(": ");
    if (title) node.append(el("h3", null, DATA.runs.length > 1 ? el("span", "dot c" + (r % 8)) : null, " ", title));
    if (core.length) node.append(validationTable(run, core, source));
    if (rest.length) node.append(el("details", null, el("summary", null, "More ", el("small", null, rest.map((n) => label(n, source)).slice(0, 4).join(", ") + (rest.length > 4 ? " …" : ""))), validationTable(run, rest, source)));
  }
}

/** A validation metric's column, without the data set that stands above the table. */
function label(name, source) {
  return source ? name.slice(name.indexOf(source) + source.length + 1) : name.startsWith("val-") ? name.slice(8) : about(name).title;
}

function validationTable(run, names, source) {
  const found = names.map((n) => series(run, n)), steps = [...new Set(found.flatMap((f) => f.steps))].sort((a, b) => a - b);
  const best = names.map((n, k) => ({ down: Math.min, up: Math.max }[about(n).better] || (() => NaN))(...found[k].values));
  const digits = found.map((f) => { const high = Math.max(...f.values.map(Math.abs)); return high < 10 ? 4 : high < 1000 ? 2 : 0; });
  const wide = names.map((n, k) => found[k].values.some((v) => Math.abs(v) >= 1e6 || (v !== 0 && Math.abs(v) < 1e-3)));
  return tableOf([el("th", "n", "step"), names.map((n) => el("th", { class: "n", title: about(n).says }, label(n, source)))],
    steps.map((step) => el("tr", null, el("td", "n", String(step)), names.map((_, k) => {
      const i = found[k].steps.indexOf(step), value = i < 0 ? null : found[k].values[i];
      return el("td", value !== null && value === best[k] && steps.length > 1 ? "n best" : "n", value === null || wide[k] ? show(value) : about(names[k]).unit === "share" ? withUnit(value, "share") : value.toFixed(digits[k]));
    }))));
}

/** Every key, what it was and what it is by default; only what differs, if one asks. */
function configuration() {
  if (!DATA.runs.some((run) => Object.keys(run.config).length)) return;
  const many = DATA.runs.length > 1, keys = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.config)))];
  const node = section("configuration", "Configuration", many ? "Keys whose values differ between the runs stand out." : "Keys that were changed from their defaults stand out.");
  const standard = (key) => DATA.defaults.map((d) => d[key]).find((v) => v !== undefined);
  const rows = keys.map((key) => {
    const values = DATA.runs.map((run) => run.config[key]), usual = standard(key);
    const differs = many && new Set(values).size > 1, changed = usual !== undefined && values.some((v) => v !== undefined && v !== usual);
    return { key, differs, changed, node: el("tr", { class: (many ? differs : changed) ? "differs" : null }, el("td", "key", key),
      values.map((v) => el("td", "value", v === undefined ? "–" : v)), el("td", "value usual", usual === undefined ? "" : usual)) };
  });
  const find = el("input", { type: "search", placeholder: "find a key or a value", "aria-label": "find a key or a value", oninput: () => filter() });
  const only = el("input", { type: "checkbox", id: "only", checked: true, onchange: () => filter() });
  const count = el("span");
  const filter = () => {
    let shown = 0;
    for (const row of rows) {
      row.node.hidden = (only.checked && !(many ? row.differs : row.changed)) || !row.node.textContent.toLowerCase().includes(find.value.trim().toLowerCase());
      shown += row.node.hidden ? 0 : 1;
    }
    count.textContent = shown + " of " + rows.length + " keys";
  };
  node.append(el("div", "bar", el("label", null, only, many ? "only differences" : "only what was changed"), find, count),
    tableOf([el("th", null, "key"), DATA.runs.map((run) => el("th", null, many ? run.name : "value")), el("th", null, "default")], rows.map((row) => row.node)));
  if (!rows.some((row) => (many ? row.differs : row.changed))) only.checked = false;
  filter();
}
