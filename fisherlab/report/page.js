"use strict";
// Click on a head to sort its table; numbers sort by the value behind the text.
function sortBy(head) {
  const table = head.closest("table"), body = table.tBodies[0];
  const index = [...head.parentNode.children].indexOf(head);
  const down = head.getAttribute("aria-sort") === "ascending";
  const key = (row) => row.children[index].dataset.v ?? row.children[index].textContent.trim();
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
