"use strict";
// A dataset before it is trained on: whether it can be, how long its samples are, what of them is trained.

function plural(count, one) {
  return grouped(count) + " " + one + (count === 1 ? "" : "s");
}

function start() {
  const { refused, rows, dropped } = DATA;
  document.title = "Audit: " + DATA.title;
  const facts = [["files", DATA.files.join(", ")], ...(DATA.model ? [["model", DATA.model]] : [])];
  opening(DATA.title, [], facts.filter(([, value]) => value !== DATA.title));
  const usable = refused
    ? grouped(refused) + " of " + plural(rows, "row") + " can't be used." : "All " + plural(rows, "row") + " can be used.";
  const left = dropped ? " " + plural(dropped, "sample") + (dropped === 1 ? " is" : " are") + " dropped." : "";
  document.getElementById("main").append(
    el("p", { class: refused || dropped ? "verdict bad" : "verdict" }, usable + left), tiles(DATA.tiles), el("dl", "facts",
      DATA.summary.map(([what, much]) => [el("dt", null, what), el("dd", null, much)])));
}

function distributions() {
  const known = DATA.histograms.filter((histogram) => histogram.bars.length);
  if (!known.length) return;
  const node = section("distributions", "How long, how much", "How many samples or rows there are of each length and kind.");
  node.append(el("div", "charts", known.map(histogramCard)));
}

/** A whole step for an axis: 1, 2, 2.5 or 5 times a power of ten, so that there are about so many. */
function niceStep(span, count) {
  const rough = Math.max(span / count, 1), power = 10 ** Math.floor(Math.log10(rough));
  const steps = [1, 2, 2.5, 5, 10].map((n) => n * power).filter(Number.isInteger);
  return steps.find((step) => step >= rough);
}

/** Multiples of a nice step from `low` to `high`. */
function niceTicks(low, high, count) {
  const step = niceStep(high - low, count), first = Math.ceil(low / step) * step;
  return Array.from({ length: Math.floor((high - first) / step) + 1 }, (_, i) => first + i * step);
}

const FEW_BARS = 8; // so many have room for their counts
const NEAR_LIMIT = 1.6; // a limit up to so many times the longest is drawn in its place

function histogramCard({ title, unit, of, bars, says, limit }) {
  const reads = el("div", { class: "reads" }, says), most = Math.max(...bars.map((bar) => bar[2]));
  const longest = bars[bars.length - 1][1], near = limit && limit <= Math.max(longest, 1) * NEAR_LIMIT;
  const low = near ? Math.min(bars[0][0], limit) : bars[0][0];
  const end = Math.max(longest, near ? limit : 0) + 1;
  const at = (value) => (100 * (value - low)) / (end - low) + "%";
  const place = (node, styles) => Object.assign(node.style, styles) && node;
  const rows = niceTicks(0, most, 4), top = Math.max(most, rows[rows.length - 1]);
  const height = (count) => (100 * count) / top + "%";
  const range = (first, last) => (first === last ? grouped(first) : grouped(first) + "–" + grouped(last));
  const tell = (bar) => { reads.textContent = bar ? range(bar[0], bar[1]) + " " + unit + ": " + plural(bar[2], of) : says; };
  const few = bars.length <= FEW_BARS;
  const drawn = bars.filter((bar) => bar[2]).map((bar) => {
    const [first, last, count] = bar;
    const node = el("i", limit && first > limit ? "bar-of over" : "bar-of", few ? el("span", null, grouped(count)) : null);
    node.addEventListener("pointerenter", () => tell(bar));
    node.addEventListener("pointerleave", () => tell(null));
    const width = "calc(" + (100 * (last + 1 - first)) / (end - low) + "% - " + (few ? 12 : 1) + "px)";
    return place(node, { left: at((first + last + 1) / 2), width: few ? "min(6rem, " + width + ")" : width, height: height(count) });
  });
  const middle = bars.every((bar) => bar[0] === bar[1]) ? 0.5 : 0; // of a single value's bar
  const plot = el("div", { class: "histogram", role: "img", "aria-label": title + ": " + says + ". The highest bar is " + plural(most, of) + "." },
    rows.map((count) => place(el("div", "row", el("span", null, grouped(count))), { bottom: height(count) })),
    drawn,
    niceTicks(low, end - 1, few ? end - low : 6).map((value) => place(el("span", "tick", grouped(value)), { left: at(value + middle) })),
    el("span", "axis-name", unit),
    limit ? limitMark(limit, near, at(limit + 1), limit - low > (end - low) / 2, place) : null);
  return el("div", "chart", el("h3", null, title, " ", el("span", "unit", of + "s")), reads, plot);
}

/** Where samples are too long: a line, or a word at the edge where all are far from it. */
function limitMark(limit, near, left, turned, place) {
  const name = "max length " + grouped(limit);
  if (!near) return el("div", "limit far", el("span", null, name + " →"));
  return place(el("div", turned ? "limit left" : "limit", el("span", null, name)), { left });
}

function refusals() {
  if (!DATA.refused) return;
  const node = section("refused", "Refused rows", "Why rows can't be used, the most frequent reason first.");
  node.append(tableOf([[el("th", "n", "rows"), el("th", null, "why")]],
    DATA.reasons.map(([why, count]) => el("tr", null, el("td", "n", grouped(count)), el("td", null, why)))));
  const list = el("ol", "refusals card"), count = el("span", { class: "count", role: "status" });
  const find = el("input", { type: "search", placeholder: "find in the refused rows", "aria-label": "find in the refused rows", oninput: () => fill() });
  const fill = () => {
    const words = find.value.toLowerCase(), found = DATA.refusals.filter((why) => why.toLowerCase().includes(words));
    list.replaceChildren(...found.map((why) => el("li", null, why)));
    const listed = DATA.refusals.length < DATA.refused ? ", the first of " + grouped(DATA.refused) : "";
    count.textContent = grouped(found.length) + " of " + grouped(DATA.refusals.length) + listed;
  };
  node.append(el("div", "bar", find, count), list);
  fill();
}

const MASKED = String(DATA.kinds.findIndex(([name]) => name === "masked"));
const PASSES = {
  "all samples": () => true,
  "with tool calls": (s) => s.calls > 0,
  "without tool calls": (s) => s.calls === 0,
  "several assistant turns": (s) => s.turns > 1,
  "less than 10 % trained": (s) => s.trained < 0.1 * s.length,
  "with turns that aren't trained": (s) => s.kinds.includes(MASKED),
};

function samples() {
  if (!DATA.samples.length) return;
  const node = section("samples", "Samples", "Token by token: what of each is trained, and whose words the rest are.");
  const cards = DATA.samples.map(sampleCard), list = el("div", null, cards.map((entry) => entry.card));
  const count = el("span", { class: "count", role: "status" });
  const find = el("input", { type: "search", placeholder: "find text", "aria-label": "find text", oninput: () => choose() });
  const which = el("select", { "aria-label": "which samples", onchange: () => choose() }, Object.keys(PASSES).map((name) => el("option", null, name)));
  const choose = () => {
    const words = find.value.toLowerCase(), pass = PASSES[which.value];
    for (const { card, sample, text } of cards) card.hidden = !(pass(sample) && text.includes(words));
    const shown = cards.filter(({ card }) => !card.hidden).length;
    count.textContent = shown + " of " + plural(cards.length, "sample") + ", chosen at random from " + plural(DATA.rows, "row");
  };
  node.append(legend(list), el("div", "bar", which, find, count), list);
  cards[0].card.open = true;
  choose();
}

/** What the colours mean; each kind of token can be hidden. */
function legend(list) {
  const buttons = DATA.kinds.map(([name, meaning]) => el("button", { type: "button", class: name, "aria-pressed": "true", title: "show or hide", onclick: (event) => {
    event.currentTarget.setAttribute("aria-pressed", String(!list.classList.toggle("off-" + name)));
  } }, meaning));
  return folded("Colours", el("div", "bar legend", buttons));
}

function sampleCard(sample) {
  const share = percent(sample.trained / Math.max(sample.length, 1)) + " trained";
  const facts = [plural(sample.length, "token"), share, plural(sample.turns, "turn"), plural(sample.calls, "tool call")];
  const card = el("details", "card sample", el("summary", null,
    el("b", null, sample.file + ", row " + sample.row), facts.map((fact) => el("span", null, fact))));
  card.addEventListener("toggle", () => { if (card.open && card.children.length === 1) card.append(tokensOf(sample)); });
  return { card, sample, text: sample.texts.join("").toLowerCase() };
}

function tokensOf(sample) {
  return el("pre", null, sample.texts.map((text, i) => {
    const [name, meaning] = DATA.kinds[sample.kinds[i]];
    return el("span", { class: name, title: "token " + i + ": " + meaning }, name === "trained" ? text.replaceAll("\n", "↵\n") : text);
  }));
}

start();
distributions();
refusals();
samples();
document.getElementById("foot").append("Made by retool " + DATA.version + " on " + date(DATA.made) + ".");
finishPage(() => {}, () => {});
