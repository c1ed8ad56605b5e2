"use strict";
// Trajectories: a list with filters, and one of them turn by turn, or token by token.

const PAGE = 100;
const MODES = {
  read: "read",
  mask: "who wrote it",
  logp: "log-probability",
  advantage: "advantage",
};
const STOPS = {
  no_call: "gave its answer", eos: "ended the text", max_turns: "used up its turns", length: "used up its tokens",
  infrastructure: "was lost to infrastructure", aborted: "not finished",
};
const CHOSEN = { shown: PAGE, mode: "read", index: 0, list: [] };

function transcripts() {
  const all = DATA.transcripts;
  if (!all.length && !DATA.torn) return;
  const node = section("transcripts", "Transcripts",
    "What the model was asked, what it wrote, what its tools gave back, and what that was worth." +
    (DATA.left_out ? " " + grouped(DATA.left_out) + " more didn't fit into the page (--transcripts)." : "") +
    (DATA.torn ? " " + grouped(DATA.torn) + (DATA.torn === 1 ? " line was" : " lines were") + " unreadable or not finished yet." : ""));
  if (!all.length) return;
  const list = el("div", { class: "list", id: "list" }), detail = el("div", { class: "detail", id: "detail" });
  const filters = filterBar(() => { CHOSEN.shown = PAGE; CHOSEN.index = 0; fill(); });
  const fill = () => {
    CHOSEN.list = filters.pick(all);
    fillList(list, detail);
    fillDetail(detail, list);
  };
  node.append(filters.node, el("div", "browser", list, detail));
  fill();
}

/** The filters, and what they let through, in the order asked for. */
function filterBar(changed) {
  const values = (key) => [...new Set(DATA.transcripts.map((t) => t[key]))].filter((v) => v !== "" && v !== null && v !== undefined).sort();
  const choice = (id, label, options) => options.length < 2 ? null : el("label", null, label,
    el("select", { id, onchange: changed }, el("option", { value: "" }, "all"), options.map(([value, text]) => el("option", { value }, text))));
  const number = (id, label) => el("input", { type: "number", step: "any", id, placeholder: label, "aria-label": id.replace("-", " "), oninput: changed });
  const rewards = values("reward").length > 0;
  const count = el("span", { class: "count", id: "count", role: "status" });
  const filters = folded("Filters and order", el("div", "bar",
    choice("run", "run", DATA.runs.map((run, r) => [r, run.name])),
    choice("split", "from", values("split").map((v) => [v, v === "val" ? "validation" : v === "train" ? "training" : v])),
    choice("source", "data", values("data_source").map((v) => [v, v])),
    choice("stop", "ended by", values("stop").map((v) => [v, stopped(v)])),
    values("step").length > 1 ? el("label", null, "step", number("step-from", "from"), number("step-to", "to")) : null,
    rewards ? el("label", null, "reward", number("reward-from", "from"), number("reward-to", "to")) : null,
    el("label", null, "order", el("select", { id: "order", onchange: changed }, [["new", "newest first"], ["old", "oldest first"],
      ...(rewards ? [["low", "lowest reward"], ["high", "highest reward"]] : []), ["long", "longest"]].map(([v, t]) => el("option", { value: v }, t))))));
  const words = el("input", { type: "search", id: "words", placeholder: "find text", "aria-label": "find text", oninput: changed });
  const node = el("div", null, filters, el("div", "bar", words, count));
  const value = (id) => node.querySelector("#" + id)?.value ?? "";
  const within = (v, name) => {
    const from = value(name + "-from"), to = value(name + "-to");
    return (from === "" || (v !== null && v >= Number(from))) && (to === "" || (v !== null && v <= Number(to)));
  };
  const length = (t) => t.segments.reduce((n, s) => n + s.text.length, 0);
  const orders = {
    new: (a, b) => b.step - a.step, old: (a, b) => a.step - b.step, low: (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity),
    high: (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity), long: (a, b) => length(b) - length(a),
  };
  return { node, pick: (all) => {
    const words = value("words").toLowerCase();
    const kept = all.filter((t) => (value("run") === "" || t.run === Number(value("run"))) && (value("split") === "" || t.split === value("split")) &&
      (value("source") === "" || t.data_source === value("source")) && (value("stop") === "" || t.stop === value("stop")) &&
      within(t.step, "step") && within(t.reward, "reward") &&
      (!words || t.prompt.toLowerCase().includes(words) || t.segments.some((s) => s.text.toLowerCase().includes(words))));
    count.textContent = grouped(kept.length) + " of " + grouped(all.length);
    return kept.sort(orders[value("order") || "new"]);
  } };
}

function rewardOf(t) {
  return t.reward === null ? null : el("span", "reward " + (t.reward > 0 ? "up" : t.reward < 0 ? "down" : ""), (t.reward > 0 ? "+" : "") + show(t.reward, 3));
}

function stopped(reason) {
  return Object.hasOwn(STOPS, reason) ? reason + " (" + STOPS[reason] + ")" : reason;
}

/** The question: what the user said last in a rendered prompt, else its end. */
function question(prompt) {
  const turns = prompt.split(/<\|im_start\|>user\n|<\|start_header_id\|>user<\|end_header_id\|>\n\n|(?:^|\n\n)user: /);
  return turns[turns.length - 1].split(/<\|im_end\|>|<\|eot_id\|>/)[0].trim() || prompt.trim();
}

function fillList(list, detail) {
  const some = CHOSEN.list.slice(0, CHOSEN.shown);
  list.replaceChildren(...some.map((t, i) => el("button", { type: "button", "data-index": i, "aria-current": String(i === CHOSEN.index), onclick: () => {
    CHOSEN.index = i;
    fillDetail(detail, list);
    if (list.getBoundingClientRect().bottom <= detail.getBoundingClientRect().top) detail.scrollIntoView({ block: "start" });
  } },
    el("span", "first", DATA.runs.length > 1 ? runName(t.run) : null, el("span", null, "step " + grouped(t.step)),
      rewardOf(t), t.stop ? el("span", null, t.stop) : null, t.num_turns ? el("span", null, t.num_turns + " turns") : null),
    el("div", "line", question(t.prompt).slice(0, 160)))));
  if (CHOSEN.list.length > CHOSEN.shown) list.append(el("button", { type: "button", onclick: () => { CHOSEN.shown += PAGE; fillList(list, detail); } }, "show more"));
  if (!some.length) list.append(el("p", "says", "Nothing matches."));
}

function fillDetail(detail, list) {
  const t = CHOSEN.list[CHOSEN.index];
  for (const b of list.querySelectorAll("[data-index]")) b.setAttribute("aria-current", String(Number(b.dataset.index) === CHOSEN.index));
  if (!t) return detail.replaceChildren(el("p", "says", "No transcript is chosen."));
  const go = (by) => { CHOSEN.index += by; fillDetail(detail, list); };
  const tokens = t.segments.flatMap((s) => s.tokens || []).length;
  const modes = Object.entries(MODES).filter(([mode]) => mode === "read" || (tokens && (mode === "mask" || t.segments.some((s) => s[mode] !== undefined))));
  if (!modes.some(([mode]) => mode === CHOSEN.mode)) CHOSEN.mode = "read";
  const inspect = el("div", { class: "inspect" }, legend(), el("div", { id: "inspect", role: "status" }, "Point at a token, tap it, or go along with the arrow keys."));
  detail.replaceChildren(
    el("div", "bar", el("button", { type: "button", id: "previous", disabled: CHOSEN.index === 0, onclick: () => go(-1) }, "‹ previous"),
      el("button", { type: "button", id: "next", disabled: CHOSEN.index >= CHOSEN.list.length - 1, onclick: () => go(1) }, "next ›"),
      modes.length > 1 ? el("span", { class: "group", id: "modes" }, modes.map(([mode, label]) => el("button", { type: "button", "data-mode": mode,
        "aria-pressed": String(mode === CHOSEN.mode), onclick: () => { CHOSEN.mode = mode; fillDetail(detail, list); } }, label))) : null),
    el("div", "about", fact("step", t.step), t.reward === null ? null : el("span", null, "reward ", rewardOf(t)), fact("ended by", t.stop && stopped(t.stop)), fact("turns", t.num_turns),
      fact("data", t.data_source), fact("truth", t.ground_truth), tokens ? fact("tokens", grouped(tokens)) : null,
      Object.entries(t.info).map(([k, v]) => fact(k, v))),
    CHOSEN.mode === "read" ? "" : inspect,
    el("details", { class: "turn prompt", open: t.prompt.length < 1500 }, el("summary", "who", "prompt ", el("small", null, "the question, with system message and tools")), el("div", "text", dimmed(t.prompt))),
    ...t.segments.map((s) => turn(s, inspect.lastChild)));
}

function fact(name, value) {
  return value === "" || value === null || value === undefined || value === 0 ? null : el("span", null, name + " ", el("b", null, String(value)));
}

/** One segment: as text with its tool calls laid out, or as coloured tokens. */
function turn(segment, inspect) {
  const role = segment.role === "assistant" ? "assistant" : segment.role === "tool" ? "tool" : "other";
  const who = { assistant: "model", tool: "tool result and template", other: segment.role || "context" }[role];
  const body = CHOSEN.mode === "read" || !segment.tokens ? (role === "assistant" ? readable(segment.text) : el("div", "text", dimmed(segment.text))) : coloured(segment, inspect);
  return el("div", { class: "turn " + role }, el("div", "who", who), body);
}

/** Text whose template markers stand back: they are true, and in the way of reading. */
function dimmed(text) {
  const parts = text.split(/((?:<\|[a-z_]+\|>(?:(?:system|user|assistant|tool|ipython)\b)?|<\/?tool_response>|<\/?tools>)\n?)/);
  return parts.map((part, i) => (i % 2 ? el("span", "glue", part) : visible(part))).filter((part) => part !== "");
}

/** Text with each tool call as its name and arguments: code reads as code, not as a line of JSON. */
function readable(text) {
  const out = el("div", "text");
  for (const [i, part] of text.split(/<tool_call>([\s\S]*?)<\/tool_call>/).entries()) {
    if (i % 2 === 0) { out.append(...dimmed(part)); continue; }
    let call = null;
    try { call = JSON.parse(part); } catch { /* shown as it is */ }
    const given = call && typeof call === "object" && call.arguments && typeof call.arguments === "object" ? Object.entries(call.arguments) : null;
    out.append(given ? el("div", "call", el("b", null, "calls " + String(call.name)), given.map(([key, value]) =>
      el("div", null, el("small", null, key), el("pre", null, typeof value === "string" ? value : JSON.stringify(value, null, 1)))))
      : el("div", "call", el("b", null, "malformed call"), el("pre", null, part)));
  }
  return out;
}

function at(value, i) {
  return Array.isArray(value) ? value[i] : value;
}

let LARGEST; // advantage of all transcripts, by size: the strongest colour
const LOGP = [0.1, 0.7, 1.6, 3, 5]; // less likely than e^-these: 90, 50, 20, 5, 0.7 percent
function shade(segment, i) {
  if (CHOSEN.mode === "mask") return at(segment.mask, i) ? "m1" : "m0";
  if (!at(segment.mask, i)) return "m0";
  const value = at(segment[CHOSEN.mode], i);
  if (value === null || value === undefined) return "";
  if (CHOSEN.mode === "logp") { const level = LOGP.filter((limit) => -value > limit).length; return level ? "lp" + level : ""; }
  const level = Math.ceil(3 * Math.min(Math.abs(value) / LARGEST, 1));
  return level ? (value > 0 ? "ap" : "an") + level : "";
}

function coloured(segment, inspect) {
  LARGEST ??= DATA.transcripts.reduce((m, t) => t.segments.reduce((n, s) => [s.advantage].flat().reduce((k, v) => Math.max(k, Math.abs(v || 0)), n), m), 1e-9);
  const out = el("div", { class: "text tokens", tabindex: 0, role: "group", "aria-label": "tokens" });
  segment.tokens.forEach((token, i) => {
    const kind = shade(segment, i), span = el("span", { class: (kind + (/^\n+$/.test(token) ? " nl" : "")).trim() || null, "data-i": i }, token);
    out.append(span);
  });
  const tell = (span) => {
    if (!span) return;
    for (const old of document.querySelectorAll(".picked")) old.classList.remove("picked");
    span.classList.add("picked");
    const i = Number(span.dataset.i), logp = at(segment.logp, i), advantage = at(segment.advantage, i);
    inspect.replaceChildren(el("code", null, JSON.stringify(segment.tokens[i])), " ",
      at(segment.mask, i) ? "written by the model, trained" : "not the model's, not trained",
      ...(typeof logp === "number" && at(segment.mask, i) ? [` · log-probability ${show(logp)} (${percent(Math.exp(logp))})`] : []),
      ...(typeof advantage === "number" ? [` · advantage ${show(advantage)}`] : []));
  };
  out.addEventListener("pointerover", (event) => tell(event.target.closest("[data-i]")));
  out.addEventListener("click", (event) => tell(event.target.closest("[data-i]")));
  out.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const picked = out.querySelector(".picked");
    tell(picked ? out.children[[...out.children].indexOf(picked) + by] : out.firstChild);
    out.querySelector(".picked")?.scrollIntoView({ block: "nearest" });
  });
  return out;
}

/** What the colours mean. */
function legend() {
  const swatch = (kind, text) => el("span", "swatch " + kind, text);
  if (CHOSEN.mode === "mask") return el("div", "legend", swatch("m1", "written by the model: trained"), swatch("m0", "prompt, template or tool: not trained"));
  if (CHOSEN.mode === "logp") return el("div", "legend", "probability:", swatch("", "over 90 %"), ...["under 90 %", "under 50 %", "under 20 %", "under 5 %", "under 0.7 %"].map((t, i) => swatch("lp" + (i + 1), t)));
  return el("div", "legend", swatch("an3", "made less likely"), swatch("an1", ""), swatch("ap1", ""), swatch("ap3", "made more likely"));
}
