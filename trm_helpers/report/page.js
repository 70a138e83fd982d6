"use strict";
const find = (query, within = document) => within.querySelector(query);
const all = (query, within = document) => [...within.querySelectorAll(query)];

// --- episodes: a tile opens its figure and plays its film --------------------------------------
const tiles = all(".tile");
const figureOf = (tile) => document.getElementById(tile.getAttribute("aria-controls"));

function show(tile) {
  const open = tile !== null && tile.getAttribute("aria-expanded") !== "true";
  for (const each of tiles) {
    const shown = open && each === tile;
    each.setAttribute("aria-expanded", shown);
    figureOf(each).hidden = !shown;
    const film = find("video", figureOf(each));
    if (film && !shown) film.pause();
    if (film && shown) { film.currentTime = 0; film.play().catch(() => {}); }
  }
  if (open) figureOf(tile).scrollIntoView({ block: "nearest", behavior: "auto" });
}

for (const tile of tiles) {
  tile.addEventListener("click", () => show(tile));
  tile.addEventListener("keydown", (event) => {
    const { previousElementSibling: ArrowLeft, nextElementSibling: ArrowRight } = tile;
    const next = { ArrowLeft, ArrowRight }[event.key];  // of the same task
    if (!next) return;
    for (const each of tile.parentElement.children) each.tabIndex = each === next ? 0 : -1;
    next.focus();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const open = tiles.find((tile) => tile.getAttribute("aria-expanded") === "true");
  if (open && figureOf(open).contains(document.activeElement)) open.focus();  // not lost with it
  show(null);
});

const hero = find("#hero");
if (hero) hero.src = find(`#episode-${hero.dataset.episode} video`).src;

// --- on paper, tables and lists are unfolded ---------------------------------------------------
let folded = [];
addEventListener("beforeprint", () => {
  folded = all("details:not([open]):has(table, li)");
  folded.forEach((each) => { each.open = true; });
});
addEventListener("afterprint", () => folded.forEach((each) => { each.open = false; }));

// --- recursion: moments and a slider -----------------------------------------------------------
const recursion = find("#recursion");
if (recursion) {
  const moments = JSON.parse(recursion.dataset.moments);
  const names = JSON.parse(recursion.dataset.names);
  const tabs = all(".tabs button", recursion);
  const step = find("#step");
  let now = 0;

  const percent = (value, limit) => 50 + 50 * Math.max(-1, Math.min(1, value / limit));
  function draw() {
    const moment = moments[now];
    step.max = moment.recursions.length;
    const at = moment.recursions[step.value - 1];
    find("#at").textContent = `${step.value} of ${moment.recursions.length}`;
    find("#sentence").textContent = at.sentence;
    const values = moments.flatMap((each) => [...each.demonstrated,
      ...each.recursions.flatMap((one) => one.action)]);
    const limit = Math.max(1, ...values.map(Math.abs));
    find("#actions").replaceChildren(...names.map((name, i) => {
      const row = document.createElement("div");
      row.className = "action";
      const label = document.createElement("span");
      label.textContent = name;
      const axis = document.createElement("span");
      axis.className = "axis";
      axis.setAttribute("role", "img");
      axis.setAttribute("aria-label", `predicted ${at.action[i].toFixed(2)}, demonstrated ` +
        moment.demonstrated[i].toFixed(2));
      const bar = document.createElement("i");
      const end = percent(at.action[i], limit);
      bar.style.left = `${Math.min(50, end)}%`;
      bar.style.width = `${Math.abs(end - 50)}%`;
      const mark = document.createElement("b");
      mark.style.left = `${percent(moment.demonstrated[i], limit)}%`;
      axis.append(bar, mark);
      row.append(label, axis);
      return row;
    }));
    find("#change").style.width = `${Math.min(100, 100 * at.change)}%`;
    find("#change-text").textContent = `${(100 * at.change).toFixed(1)} % of the state's norm`;
    all(".moment", recursion).forEach((image, i) => { image.hidden = i !== now; });
    tabs.forEach((tab, i) => tab.setAttribute("aria-pressed", i === now));
  }
  step.addEventListener("input", draw);
  tabs.forEach((tab, i) => tab.addEventListener("click", () => { now = i; draw(); }));
  draw();
}
