"use strict";
// Around the page: its theme, and a navigation that shows where one is and that there is more.

/** Last of all. `redraw` draws again what knows no style sheet; `drawAll` also what wasn't in view yet. */
function finishPage(redraw, drawAll) {
  const dark = matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement;
  const button = document.getElementById("theme");
  let shown = "";
  const use = (theme) => {
    root.style.colorScheme = theme;
    shown = theme;
    button.setAttribute("aria-label", theme === "dark" ? "use light colours" : "use dark colours");
    redraw();
  };
  const asked = () => use(dark.matches ? "dark" : "light");
  asked();
  button.addEventListener("click", () => use(shown === "dark" ? "light" : "dark"));
  dark.addEventListener("change", asked);
  let before = "";
  addEventListener("beforeprint", () => { before = shown; use("light"); drawAll(); });
  addEventListener("afterprint", () => use(before));
  followNavigation(document.getElementById("nav"));
  root.dataset.ready = "yes";
}

/** The link of the section in view stands out; edges behind which there are more links fade. */
function followNavigation(nav) {
  const edges = () => {
    nav.classList.toggle("more-left", nav.scrollLeft > 4);
    nav.classList.toggle("more-right", nav.scrollLeft + nav.clientWidth < nav.scrollWidth - 4);
  };
  const links = [...nav.children], sections = links.map((link) => document.getElementById(link.hash.slice(1)));
  let current = -1;
  const follow = () => {
    const top = document.querySelector(".top").offsetHeight + 24;
    const ended = scrollY > 0 && scrollY + innerHeight >= document.documentElement.scrollHeight - 2;
    const passed = sections.filter((node) => node.getBoundingClientRect().top <= top).length - 1;
    const now = ended ? links.length - 1 : passed;
    if (now === current) return;
    links[current]?.removeAttribute("aria-current");
    links[now]?.setAttribute("aria-current", "true");
    current = now;
    const link = links[now];
    if (link) nav.scrollTo({ left: link.offsetLeft - nav.offsetLeft - 32 });
  };
  nav.addEventListener("scroll", edges, { passive: true });
  addEventListener("scroll", follow, { passive: true });
  addEventListener("resize", () => { edges(); follow(); });
  edges();
  follow();
}
