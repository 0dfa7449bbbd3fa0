"use strict";
// Click on a head to sort its table; numbers sort by the value behind the text.
function sortBy(head) {
  const table = head.closest("table"), body = table.tBodies[0];
  const index = [...head.parentNode.children].indexOf(head);
  const down = head.getAttribute("aria-sort") === "ascending";
  // A row without any number is one wide cell.
  const cell = (row) => row.children[index] ?? row.lastElementChild;
  const key = (row) => cell(row).dataset.v ?? cell(row).textContent.trim();
  const order = (a, b) => {
    const x = key(a), y = key(b);
    // What is not available stays at the end in both directions.
    if (x === "" || y === "") return (x === "") - (y === "");
    const both = Number(x) - Number(y);
    return (Number.isNaN(both) ? x.localeCompare(y) : both) * (down ? -1 : 1);
  };
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...[...body.rows].sort(order));
}
for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => sortBy(button.closest("th")));

// The cell of the file behind the number the pointer rests on, or why there is none.
function origin(cell, pattern) {
  const row = cell.parentNode, why = cell.dataset.why ?? row.dataset.why;
  const names = { layer: row.cells[0].firstChild.data.trim(), approximator: row.querySelector("code")?.textContent };
  const where = pattern.replace(/\{(layer|approximator)\}/g, (_, what) => names[what]);
  if (cell.dataset.v === "") return `${where}: not available${why ? `: ${why}` : ""}`;
  return `${where} = ${cell.dataset.v}${cell.classList.contains("best") ? " (the closest of this layer)" : ""}`;
}
addEventListener("mouseover", (event) => {
  const cell = event.target.closest?.("td[data-v]");
  const pattern = cell?.closest("table").tHead.rows[0].cells[cell.cellIndex].dataset.origin;
  if (pattern && cell.colSpan === 1) cell.title = origin(cell, pattern);
});

// Type to keep the rows that hold every word.
function keepRows(field) {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...document.getElementById(field.dataset.table).tBodies[0].rows];
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
  const kept = rows.filter((row) => !row.hidden).length;
  field.parentNode.querySelector("output").value = words.length ? `${kept} of ${rows.length} rows` : "";
}
for (const field of document.querySelectorAll("input[type=search]"))
  field.addEventListener("input", () => keepRows(field));

// Say of what is wider than its place that it scrolls.
function markWide() {
  for (const each of document.querySelectorAll(".scroll"))
    each.classList.toggle("sideways", each.scrollWidth > each.clientWidth + 1);
}
for (const event of ["load", "resize"]) addEventListener(event, markWide);
document.addEventListener("toggle", markWide, true);

// Sections fold; a link opens its section, and printing opens them all.
const sections = [...document.querySelectorAll("section > details")];
const fold = document.getElementById("fold");
const setAll = (open) => { for (const each of sections) each.open = open; };
const rename = () => { fold.textContent = sections.some((each) => each.open) ? "Fold all" : "Unfold all"; };
fold.hidden = false;
fold.addEventListener("click", () => setAll(!sections.some((each) => each.open)));
for (const each of sections) each.addEventListener("toggle", rename);
for (const link of document.querySelectorAll("nav a")) link.addEventListener("click", () => {
  const section = document.getElementById(link.hash.slice(1));
  section.querySelector("details").open = true;
});
addEventListener("beforeprint", () => {
  setAll(true);
  for (const each of document.querySelectorAll(".verdict details")) each.open = true;
});

// Click on a picture without vectors to enlarge it there, to the pixels of the file.
function zoom(picture, event) {
  const box = picture.parentNode, before = picture.getBoundingClientRect();
  const [x, y] = [(event.clientX - before.left) / before.width, (event.clientY - before.top) / before.height];
  const scale = Number(picture.dataset.scale ?? 1) >= 4 ? 1 : 2 * Number(picture.dataset.scale ?? 1);
  picture.dataset.scale = scale;
  picture.style.width = scale === 1 ? "" : `${100 * scale}%`;
  box.classList.toggle("zoomed", scale > 1);
  box.scrollLeft = x * picture.clientWidth - box.clientWidth / 2;
  box.scrollTop = y * picture.clientHeight - box.clientHeight / 2;
}
for (const picture of document.querySelectorAll("img.wide"))
  picture.addEventListener("click", (event) => zoom(picture, event));

// The value of the mark next to the pointer.
const tip = document.body.appendChild(document.createElement("div"));
tip.className = "tip";
tip.hidden = true;
function showNearest(picture, marks, event) {
  const box = picture.getBoundingClientRect();
  let nearest = null, least = 20;
  for (const [x, y, text] of marks) {
    const away = Math.hypot(box.left + x * box.width - event.clientX, box.top + y * box.height - event.clientY);
    if (away < least) [nearest, least] = [[x, y, text], away];
  }
  tip.hidden = nearest === null;
  if (nearest === null) return;
  tip.textContent = nearest[2];
  const left = box.left + nearest[0] * box.width + 12, top = box.top + nearest[1] * box.height - 34;
  tip.style.left = `${Math.max(4, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}
for (const picture of document.querySelectorAll("img[data-marks]")) {
  const marks = JSON.parse(picture.dataset.marks);
  for (const kind of ["pointermove", "pointerdown"])
    picture.addEventListener(kind, (event) => showNearest(picture, marks, event));
  picture.addEventListener("pointerleave", () => { tip.hidden = true; });
}
