"use strict";
// Values under the pointer: the points of each line, read back from pixels by the chart's scales.
for (const svg of document.querySelectorAll("svg[data-x]")) {
  const scale = (name) => svg.dataset[name].split(" ").map(Number);
  const [x, y] = [scale("x"), scale("y")];
  const value = ([low, high, start, end], at) => low + ((at - start) / (end - start)) * (high - low);
  const short = (number) => Math.abs(number) >= 1000 ? Math.round(number).toLocaleString("en") : String(Number(number.toPrecision(4)));
  const lines = [...svg.querySelectorAll("polyline")].map((line) => ({
    name: line.dataset.name,
    points: line.getAttribute("points").trim().split(" ").map((point) => point.split(",").map(Number)),
  }));
  const cursor = svg.querySelector(".cursor");
  const output = svg.parentElement.querySelector("output");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const nearest = lines.map(({name, points}) => ({
      name, point: points.reduce((best, point) => Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best),
    }));
    const place = nearest[0].point[0];
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.removeAttribute("hidden");
    const said = nearest.map(({name, point}) => `${name} ${short(value(y, point[1]))}`);
    output.textContent = [`step ${Math.round(value(x, place))}`, ...said].join(" · ");
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("hidden", ""); output.textContent = ""; });
}
// Tables sorted by a click on a column's name.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.tHead.querySelectorAll("th").forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      table.tHead.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
      const rows = [...body.rows].sort((a, b) => {
        const [one, two] = [key(a), key(b)];
        const order = one !== "" && two !== "" && !isNaN(one) && !isNaN(two) ? one - two : one.localeCompare(two);
        return up ? order : -order;
      });
      body.append(...rows);
    });
  });
}
// Paper shows everything.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
