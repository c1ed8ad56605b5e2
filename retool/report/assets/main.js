"use strict";
overview();
curves();
time();
memory();
validation();
transcripts();
configuration();

document.getElementById("foot").append(
  el("div", null, "Made by retool " + DATA.version + " on " + date(DATA.made) + "."),
  ...DATA.runs.map((run) => el("div", null, run.folder + (run.written ? ", last written " + date(run.written) : ""))));
finishPage(redraw, drawAll);
