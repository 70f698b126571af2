// Tables sort by a click on a heading: numbers by value, words by letter and the numbers in them by value; what is missing goes last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const isNumber = heading.classList.contains("n");
      // Numbers from the best, which is the greatest or, of an error, the lowest; words from A; then the other way.
      const isFromTop = isNumber && !("lower" in heading.dataset);
      const first = isFromTop ? "descending" : "ascending";
      const other = isFromTop ? "ascending" : "descending";
      const order = heading.getAttribute("aria-sort") === first ? other : first;
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [a.cells[column], b.cells[column]];
        if (!isNumber) return sign * x.textContent.localeCompare(y.textContent, undefined, { numeric: true });
        const [u, v] = [x.dataset.sort, y.dataset.sort].map((value) => (value === undefined ? NaN : Number(value)));
        if (Number.isNaN(u) || Number.isNaN(v)) return Number.isNaN(u) - Number.isNaN(v);
        return sign * (u - v);
      });
      body.append(...rows);
    });
  });
}
