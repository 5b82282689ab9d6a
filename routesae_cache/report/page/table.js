// The table of all SAEs.

/** How a run is drawn in plots: its colour, shape and dash. */
function swatch(run) {
  const look = data("overview").legend.find((one) => one.run === run);
  const colour = `var(--series-${look.colour})`;
  const paths = {
    circle: "M12 3.6a4.4 4.4 0 1 1 0 8.8a4.4 4.4 0 0 1 0-8.8Z",
    square: "M8 4h8v8h-8Z",
    "triangle-up": "M12 3l5 9.4h-10Z",
    diamond: "M12 2.6l4.4 5.4l-4.4 5.4l-4.4-5.4Z",
    cross: "M10.4 3.2h3.2v3.2h3.2v3.2h-3.2v3.2h-3.2v-3.2h-3.2v-3.2h3.2Z",
    "triangle-down": "M12 13l5-9.4h-10Z",
  };
  const dash = look.dash[1] ? look.dash.join(" ") : null;
  const line = svg("path", { d: "M0 8h24", fill: "none", "stroke-width": 2, "stroke-dasharray": dash, style: { stroke: colour } });
  const mark = svg("path", { d: paths[look.shape], style: { fill: colour } });
  return svg("svg", { viewBox: "0 0 24 16", width: 24, height: 16, class: "swatch", "aria-hidden": "true" }, line, mark);
}

function startTable() {
  const { table } = data("overview");
  const body = el("tbody");
  let sorted = { key: null, down: false };
  const heads = new Map();

  const order = () => {
    if (sorted.key === null) return table.rows;
    const value = (row) => row[sorted.key][0];
    const empty = (row) => value(row) === null;
    return [...table.rows].sort((a, b) => {
      if (empty(a) || empty(b)) return empty(a) - empty(b); // last, whichever way
      const less = typeof value(a) === "number"
        ? value(a) - value(b)
        : value(a).localeCompare(value(b), "en", { numeric: true });
      return sorted.down ? -less : less;
    });
  };

  const show = () => {
    for (const [key, head] of heads) {
      const state = key !== sorted.key ? "none" : sorted.down ? "descending" : "ascending";
      head.setAttribute("aria-sort", state);
    }
    body.replaceChildren(...order().map((row) => el("tr", {}, table.columns.map((column) => cell(table, row, column)))));
  };

  const sortBy = (column) => {
    const first = column.better === "high"; // the best on top first
    sorted = sorted.key === column.key ? { key: column.key, down: !sorted.down } : { key: column.key, down: first };
    show();
  };

  for (const column of table.columns) {
    const button = el("button", { type: "button", title: column.hint, onclick: () => sortBy(column) },
      el("span", {}, column.title), el("span", { class: "arrow", "aria-hidden": "true" }));
    heads.set(column.key, el("th", { scope: "col", class: isText(column) ? "text" : "number", "aria-sort": "none" }, button));
  }
  show();

  const head = el("div", { class: "block-head" },
    el("h2", {}, data("overview").runs === 1 ? "The SAE" : "All SAEs"),
    el("button", { type: "button", class: "quiet", onclick: () => save("saes.csv", data("overview").csv, "text/csv") }, "CSV"));
  const scroller = el("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Table of all SAEs" },
    el("table", { class: "saes" }, el("thead", {}, el("tr", {}, [...heads.values()])), body));
  const compared = Object.values(table.best).some((ids) => ids.length);
  document.getElementById("saes").append(head, scroller, ...(compared
    ? [el("p", { class: "note" }, el("span", { class: "best" }, "Marked"), " is the best of a column. A column’s head sorts by it.")]
    : []));
}

function isText(column) {
  return column.form === "text";
}

function cell(table, row, column) {
  const [value, error] = row[column.key];
  const text = written(value, column.form);
  if (column.key === "name") {
    return el("th", { scope: "row" }, el("span", { class: "run" }, swatch(row.id), breakable(text)));
  }
  const best = (table.best[column.key] || []).includes(row.id);
  const shown = [best ? el("strong", { class: "best" }, text, el("span", { class: "unseen" }, " (best)")) : text];
  if (error !== null && error > 0) shown.push(el("small", {}, ` ±${written(error, column.form)}`));
  return el("td", { class: isText(column) ? "text" : "number" }, shown);
}

/** A run's name that may break after an underscore or a slash. */
function breakable(name) {
  const parts = name.split(/(?<=[_/])/);
  return el("span", { class: "name" }, parts.flatMap((part) => [part, el("wbr")]));
}
