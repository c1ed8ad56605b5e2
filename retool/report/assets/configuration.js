"use strict";
// Every key of the configuration, what it was and what it is by default; only what differs, if one asks.

function configuration() {
  if (!DATA.runs.some((run) => Object.keys(run.config).length)) return;
  const many = DATA.runs.length > 1, keys = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.config)))];
  const node = section("configuration", "Configuration", many
    ? "Keys whose values differ between the runs stand out." : "Keys that were given, or changed from their defaults, stand out.");
  const rows = keys.map((key) => keyRow(key, many));
  const find = el("input", { type: "search", placeholder: "find a key or a value", "aria-label": "find a key or a value", oninput: () => filter() });
  const only = el("input", { type: "checkbox", id: "only", checked: rows.some((row) => row.stands), onchange: () => filter() });
  const count = el("span", { class: "count", role: "status" });
  const filter = () => {
    const words = find.value.trim().toLowerCase();
    for (const row of rows) {
      row.node.hidden = (only.checked && !row.stands) || !row.node.textContent.toLowerCase().includes(words);
    }
    count.textContent = rows.filter((row) => !row.node.hidden).length + " of " + rows.length + " keys";
  };
  const values = DATA.runs.map((_, r) => el("th", null, many ? runName(r) : "value"));
  node.append(
    el("div", "bar", el("label", null, only, many ? "only differences" : "only what was given or changed"), find, count),
    tableOf([[el("th", null, "key"), values, el("th", null, "default")]], rows.map((row) => row.node)));
  filter();
}

/** A key's row, and whether it stands out: it differs between runs, or isn't what it is by default. */
function keyRow(key, many) {
  const values = DATA.runs.map((run) => run.config[key]);
  const usual = DATA.defaults.map((d) => d[key]).find((v) => v !== undefined);
  const required = DATA.required.includes(key);
  const changed = values.some((v) => v !== undefined && (required || (usual !== undefined && v !== usual)));
  const stands = many ? new Set(values).size > 1 : changed;
  const node = el("tr", { class: stands ? "differs" : null }, el("td", "key", key),
    values.map((v) => el("td", "value", v === undefined ? "–" : v)),
    el("td", "value usual", required ? "none: must be given" : usual ?? ""));
  return { node, stands };
}
