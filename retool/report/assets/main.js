"use strict";
overview();
curves();
time();
memory();
validation();
transcripts();
configuration();

document.getElementById("foot").append(
  "Made by retool " + DATA.version + " on " + new Date(DATA.made * 1000).toLocaleString() + ". ",
  DATA.runs.map((run) => run.folder + (run.written ? " (last written " + new Date(run.written * 1000).toLocaleString() + ")" : "")).map(visible).join("; "));

const THEMES = ["light dark", "light", "dark"];
function setTheme(theme) {
  document.documentElement.style.colorScheme = theme;
  const dark = theme === "dark" || (theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.getElementById("theme").setAttribute("aria-label", dark ? "use light colours" : "use dark colours");
  redraw();
  return dark;
}
let dark = setTheme(THEMES[0]);
document.getElementById("theme").addEventListener("click", () => { dark = setTheme(dark ? "light" : "dark"); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { dark = setTheme(THEMES[0]); });
document.documentElement.dataset.ready = "yes";
