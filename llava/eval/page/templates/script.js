"use strict";

function valueOf(row, column) {
  const cell = row.cells[column];
  const number = cell.dataset.value;
  return number === undefined ? cell.textContent.trim() : Number(number);
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === "number") return -1;
  if (typeof b === "number") return 1;
  return a.localeCompare(b, "en", { numeric: true });
}

function sortBy(table, heading) {
  const column = heading.cellIndex;
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows).sort((a, b) => compare(valueOf(a, column), valueOf(b, column)));
  body.append(...(down ? rows.reverse() : rows));
}

for (const table of document.querySelectorAll("table.sortable")) {
  if (table.tBodies[0].rows.length < 2) continue;
  for (const heading of table.tHead.querySelectorAll("th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sortBy(table, heading));
  }
}

const metric = document.getElementById("metric");
if (metric) {
  const show = () => {
    for (const panel of document.querySelectorAll(".panel")) panel.hidden = panel.dataset.metric !== metric.value;
  };
  metric.closest(".switch").hidden = false;
  metric.addEventListener("change", show);
  show();
}

const filters = document.querySelector(".filters");
if (filters) {
  const examples = Array.from(document.querySelectorAll(".example"));
  const show = () => {
    const wanted = Array.from(filters.querySelectorAll("select")).filter((choice) => choice.value);
    for (const example of examples) {
      example.hidden = !wanted.every((choice) => example.dataset[choice.name] === choice.value);
    }
    const shown = examples.filter((example) => !example.hidden).length;
    filters.querySelector("output").textContent = `${shown} of ${examples.length} shown`;
  };
  filters.hidden = false;
  filters.addEventListener("change", show);
  show();
}
