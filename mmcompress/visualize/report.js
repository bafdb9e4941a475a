// SPDX-License-Identifier: Apache-2.0
// Headings sort their tables: numbers by size, the largest first, what has none last; everything else as text.
"use strict";
document.querySelectorAll("table.grid").forEach((table) => {
  const headings = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
    const text = (row) => row.cells[column].textContent, value = (row) => parseFloat(text(row));
    const rows = [...body.rows], numbers = rows.some((row) => !isNaN(value(row)));
    const [first, other] = numbers ? ["descending", "ascending"] : ["ascending", "descending"];
    const now = heading.getAttribute("aria-sort") === first ? other : first, sign = now === "ascending" ? 1 : -1;
    const size = (row) => (isNaN(value(row)) ? Infinity : sign * value(row));
    rows.sort(numbers ? (a, b) => (size(a) === size(b) ? 0 : size(a) - size(b)) : (a, b) => sign * text(a).localeCompare(text(b)));
    headings.forEach((one) => one.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", now);
    body.append(...rows);
  }));
});
