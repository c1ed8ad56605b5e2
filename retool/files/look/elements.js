"use strict";
// Everything on a page is made here; text is set as text, never parsed.

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
    if (child === null || child === undefined) continue;
    node.append(child instanceof Node ? child : visible(String(child)));
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

/** The page's title, what kind of thing it is about, and what one wants to know of it first: [[label, value], …]. */
function opening(title, says, facts) {
  const list = facts.map(([label, value]) => [el("dt", null, label), el("dd", null, value)]);
  document.getElementById("main").append(
    el("h1", null, title),
    ...says.map((sentence) => el("p", "says", sentence)),
    facts.length ? el("dl", "facts", list) : "");
}

/** The few numbers that are read first: [[label, value, remark], …]; a value's unit stands back. */
function tiles(all) {
  const node = el("div", "tiles", all.map(([label, value, remark]) => {
    const [number, ...unit] = value.split(" ");
    return el("div", "tile", el("span", null, label),
      el("b", null, number, unit.length ? el("i", null, " " + unit.join(" ")) : null), el("small", null, remark || ""));
  }));
  // One row, or two that are as long as each other: no tile is left over
  const half = all.length > 4 ? Math.ceil(all.length / 2) : all.length;
  node.style.setProperty("--half", half);
  node.style.setProperty("--all", all.length > 8 ? half : all.length);
  return node;
}

/** Small facts in one line: [[label, value], …]. */
function inLine(facts) {
  return facts.map(([label, value]) => [el("span", null, label), el("b", null, value), " "]);
}

/** A section of the page with its heading, and its place in the navigation. */
function section(id, title, says) {
  const node = el("section", { id }, el("h2", null, title), says ? el("p", "says", says) : null);
  document.getElementById("main").append(node);
  document.getElementById("nav").append(el("a", { href: "#" + id }, title));
  return node;
}

/** A table under its heading's rows, each a list of cells; it is only as wide as it needs to be. */
function tableOf(heads, rows) {
  const head = heads.map((cells) => el("tr", null, cells));
  return el("div", "scroll", el("table", null, el("thead", null, head), el("tbody", null, rows)));
}

/** Filters, folded where there is little room: a phone shows what they filter first. */
function folded(title, ...children) {
  const narrow = matchMedia("(max-width: 760px)");
  const node = el("details", { class: "folded", open: !narrow.matches }, el("summary", null, title), children);
  narrow.addEventListener("change", () => { node.open = !narrow.matches; });
  return node;
}
