// Sorting and filtering of the index's tables of runs. Without it the tables are complete, in the grid's order.
"use strict";
(() => {
  const section = document.querySelector(".runs");
  const tables = [...section.querySelectorAll("table")];
  const runs = [...section.querySelectorAll("tbody")]; // one for each run, with its reason
  const words = section.querySelector("input");
  const status = section.querySelector("select");
  const count = section.querySelector("output");

  const value = (run, column) => run.rows[0].cells[column].dataset.value;

  // Numbers before words, what is missing last, whichever way it is sorted.
  const compare = (a, b, down) => {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    const [x, y] = [Number(a), Number(b)];
    const order = isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) || a.localeCompare(b) : x - y;
    return down ? -order : order;
  };

  for (const table of tables) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const cells = [...table.tBodies].map((run) => run.rows[0].cells[column]);
      if (cells.every((cell) => cell.dataset.value === undefined)) return;
      head.toggleAttribute("data-number", cells.some((cell) => cell.hasAttribute("data-number")));
      const button = document.createElement("button");
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.ariaSort === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        table.append(...[...table.tBodies].sort((a, b) => compare(value(a, column), value(b, column), down)));
      });
    });
  }

  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const run of runs) {
      const text = `${run.textContent} ${run.dataset.words}`.toLowerCase();
      const right = !status.value || status.value === run.dataset.status;
      run.hidden = !(right && wanted.every((word) => text.includes(word)));
      shown += !run.hidden;
    }
    for (const table of tables)
      table.closest(".batch").hidden = [...table.tBodies].every((run) => run.hidden);
    count.textContent = `${shown} of ${runs.length} runs`;
  };
  words.addEventListener("input", filter);
  status.addEventListener("input", filter);
  section.querySelector("[role=search]").hidden = false;
  filter();
})();
