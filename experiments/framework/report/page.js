"use strict";
// Filters and sorting of the map of claims. Without this script the page shows every claim, in the order of the experiments.
(() => {
  const form = document.querySelector(".filters");
  if (!form) return;
  const map = document.querySelector(".map");
  const lines = [...map.children];
  const tiles = [...document.querySelectorAll(".tile")];
  const shown = document.querySelector(".shown");
  const empty = document.querySelector(".empty");
  const more = document.querySelector(".more");
  const first = 12; // lines that are shown until more are asked for
  let every = false;
  const value = (name) => (form.elements[name] ? form.elements[name].value : "");
  const order = {
    place: (a, b) => a.dataset.place - b.dataset.place,
    verdict: (a, b) => a.dataset.rank - b.dataset.rank || order.beyond(a, b),
    beyond: (a, b) => b.dataset.beyond - a.dataset.beyond || order.place(a, b),
    source: (a, b) => a.dataset.source.localeCompare(b.dataset.source) || order.place(a, b),
  };

  const update = () => {
    const pressed = tiles.filter((tile) => tile.getAttribute("aria-pressed") === "true").map((tile) => tile.dataset.filter);
    const fits = (name, line) => !value(name) || line.dataset[name] === value(name);
    for (const line of lines) {
      line.hidden = !(!pressed.length || pressed.includes(line.dataset.verdict)) || !fits("source", line) || !fits("theme", line);
    }
    map.append(...[...lines].sort(order[value("sort")]));
    [...map.children].filter((line) => !line.hidden).forEach((line, number) => line.classList.toggle("beyond", !every && number >= first));
    const left = lines.filter((line) => !line.hidden).length;
    more.hidden = every || left <= first;
    more.textContent = `Show all ${left}`;
    const all = `${lines.length} claim${lines.length === 1 ? "" : "s"}`;
    shown.textContent = left === lines.length ? all : `${left} of ${all}`;
    empty.hidden = left > 0;
  };

  for (const tile of tiles) {
    tile.disabled = false;
    tile.addEventListener("click", () => {
      tile.setAttribute("aria-pressed", String(tile.getAttribute("aria-pressed") !== "true"));
      update();
    });
  }
  more.addEventListener("click", () => {
    every = true;
    const next = map.querySelector(".beyond:not([hidden]) a");
    update();
    next.focus();
  });
  form.hidden = false;
  update();
  form.addEventListener("change", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault(); // the browser would reset the choices only after this
    for (const select of form.querySelectorAll("select")) select.selectedIndex = 0;
    tiles.forEach((tile) => tile.setAttribute("aria-pressed", "false"));
    update();
  });

  // On paper everything is open.
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((one) => (one.open = true));
  });
  window.addEventListener("afterprint", () => closed.forEach((one) => (one.open = false)));
})();
