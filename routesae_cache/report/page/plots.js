// The plots: drawn when they come into sight, zoomed by dragging or by buttons, runs switched on
// and off for all of them together.

const hiddenRuns = new Set();
const plotViews = new Map(); // plot -> its Vega view

function startPlots() {
  const plots = data("plots");
  const place = document.getElementById("plots");
  if (!plots.length) return;
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        seen.unobserve(entry.target);
        draw(entry.target.plot);
      }
    }
  }, { rootMargin: "600px" });
  const figures = plots.map((plot) => {
    const figure = plotFigure(plot);
    plot.stage.plot = plot;
    seen.observe(plot.stage);
    return figure;
  });
  place.append(el("div", { class: "block-head" }, el("h2", {}, "Plots")), legend(), el("div", { class: "plots" }, figures));
  onTheme(() => [...plotViews.keys()].forEach(draw));
}

function legend() {
  const chips = data("overview").legend.map((look) => {
    const chip = toggle("", true, (on) => {
      if (on) hiddenRuns.delete(look.run);
      else hiddenRuns.add(look.run);
      for (const [plot, view] of plotViews) view.signal("shown", shownRuns(plot)).runAsync();
    }, "Show or hide it in all plots");
    chip.classList.add("chip");
    chip.append(swatch(look.run), breakable(look.run));
    return chip;
  });
  return el("div", { class: "legend", role: "group", "aria-label": "SAEs shown in the plots" }, chips);
}

function shownRuns(plot) {
  return data("overview").legend.map((look) => look.run)
    .filter((run) => plot.runs.has(run) && !hiddenRuns.has(run));
}

function plotFigure(plot) {
  plot.runs = new Set(plot.values.map((value) => value.run));
  plot.start = Object.fromEntries(plot.spec.params.map((param) => [param.name, param.value]));
  plot.stage = el("div", { class: "stage" });
  const table = el("div", { class: "scroller data", hidden: true, tabindex: 0, role: "region", "aria-label": `Data of ${plot.title}` });
  const button = (label, title, act) => el("button", { type: "button", class: "quiet", title, "aria-label": title, onclick: act }, label);
  const tools = el("div", { class: "tools" },
    button("+", "Zoom in", () => zoom(plot, 1 / 1.5)),
    button("−", "Zoom out", () => zoom(plot, 1.5)),
    button("Reset", "Reset the zoom", () => setDomain(plot, plot.start)),
    el("span", { class: "gap" }),
    button("PNG", "Save as PNG", () => picture(plot, "png")),
    button("SVG", "Save as SVG", () => picture(plot, "svg")),
    button("CSV", "Save the data as CSV", () => save(`${plot.key}.csv`, csv(plot.values.map(undrawn)), "text/csv")),
    toggle("Data", false, (on) => {
      table.hidden = !on;
      if (on && !table.firstChild) table.append(dataTable(plot.values));
    }, "Show the data as a table"));
  return el("figure", { class: "plot", id: `plot-${plot.key}` },
    el("h3", {}, plot.title), el("p", { class: "caption" }, plot.caption), plot.stage, tools, table);
}

/** What a point stands for, without how it is drawn. */
function undrawn({ dash, ...row }) {
  return row;
}

function dataTable(values) {
  const keys = Object.keys(undrawn(values[0])).filter((key) => values.some((row) => row[key] !== null));
  const cellText = (value) => (typeof value === "number" ? String(Number(value.toPrecision(6))) : String(value ?? missingValue));
  const row = (value) => el("tr", {}, keys.map((key) => el("td", { class: typeof value[key] === "number" ? "number" : "text" }, cellText(value[key]))));
  return el("table", {}, el("thead", {}, el("tr", {}, keys.map((key) => el("th", { scope: "col" }, key)))),
    el("tbody", {}, values.map(row)));
}

async function draw(plot) {
  const view = plotViews.get(plot);
  const kept = view ? domainOf(view) : plot.start;
  const config = { ...data("themes")[theme()], background: null, legend: { disable: true } };
  const spec = { ...plot.spec, width: "container", data: { values: plot.values }, config, autosize: { type: "fit-x", contains: "padding" } };
  plotViews.set(plot, view || null);
  const result = await vegaEmbed(plot.stage, spec, {
    ast: true, actions: false, renderer: "svg", defaultStyle: false, tooltip: showTip,
  });
  plotViews.set(plot, result.view);
  for (const [name, value] of Object.entries(kept)) result.view.signal(name, value);
  result.view.signal("shown", shownRuns(plot));
  await result.view.runAsync();
  plot.stage.dataset.drawn = "true";
  if (!plot.draggable) dragZoom(plot);
  plot.draggable = true;
}

function domainOf(view) {
  return Object.fromEntries(["x0", "x1", "y0", "y1"].map((name) => [name, view.signal(name)]));
}

function setDomain(plot, ends) {
  const view = plotViews.get(plot);
  for (const name of ["x0", "x1", "y0", "y1"]) view.signal(name, ends[name]);
  view.runAsync();
}

function scales(view) {
  return ["x", "y"].map((name) => [name, view.scale(name)]).filter(([, scale]) => scale.invert && !scale.bandwidth);
}

/** Around the middle, by a factor. */
function zoom(plot, factor) {
  const view = plotViews.get(plot);
  const ends = domainOf(view);
  for (const [name, scale] of scales(view)) {
    const [from, to] = scale.range();
    const [middle, half] = [(from + to) / 2, (factor * (to - from)) / 2];
    ends[`${name}0`] = scale.invert(middle - half);
    ends[`${name}1`] = scale.invert(middle + half);
  }
  setDomain(plot, ends);
}

/** A rectangle dragged over a plot becomes what it shows; a double click goes back. */
function dragZoom(plot) {
  const box = el("div", { class: "dragged", hidden: true });
  let from = null;
  const at = (event) => {
    const view = plotViews.get(plot);
    const frame = plot.stage.querySelector("svg").getBoundingClientRect();
    const [left, top] = view.origin();
    const clamp = (value, most) => Math.max(0, Math.min(most, value));
    return {
      x: clamp(event.clientX - frame.left - left, view.width()),
      y: clamp(event.clientY - frame.top - top, view.height()),
      left: frame.left - plot.stage.getBoundingClientRect().left + left,
      top: frame.top - plot.stage.getBoundingClientRect().top + top,
    };
  };
  const cancel = () => { from = null; box.hidden = true; };
  plot.stage.addEventListener("pointerdown", (event) => {
    if (event.button === 0 && event.pointerType === "mouse") from = at(event);
  });
  window.addEventListener("pointermove", (event) => {
    if (!from) return;
    const to = at(event);
    if (!plot.stage.contains(box)) plot.stage.append(box);
    box.hidden = Math.abs(to.x - from.x) < 5 && Math.abs(to.y - from.y) < 5;
    const px = (value) => `${value}px`;
    Object.assign(box.style, {
      left: px(from.left + Math.min(from.x, to.x)), top: px(from.top + Math.min(from.y, to.y)),
      width: px(Math.abs(to.x - from.x)), height: px(Math.abs(to.y - from.y)),
    });
    event.preventDefault();
  });
  window.addEventListener("pointerup", (event) => {
    if (!from) return;
    const to = at(event);
    const view = plotViews.get(plot);
    const ends = domainOf(view);
    const moved = Math.abs(to.x - from.x) > 5 && Math.abs(to.y - from.y) > 5;
    for (const [name, scale] of moved ? scales(view) : []) {
      const pair = [scale.invert(from[name]), scale.invert(to[name])].sort((a, b) => a - b);
      [ends[`${name}0`], ends[`${name}1`]] = pair;
    }
    cancel();
    if (moved) setDomain(plot, ends);
  });
  plot.stage.addEventListener("dblclick", () => setDomain(plot, plot.start));
}

async function picture(plot, kind) {
  const view = plotViews.get(plot);
  if (kind === "svg") save(`${plot.key}.svg`, await view.toSVG(), "image/svg+xml");
  else save(`${plot.key}.png`, await view.toImageURL("png", 2), "image/png");
}

/** Vega's tooltips, as text. */
function showTip(_, event, __, value) {
  const tip = document.getElementById("tip");
  tip.hidden = value === null || value === undefined || value === "";
  if (tip.hidden) return;
  const lines = typeof value === "object" ? Object.entries(value) : [["", value]];
  tip.replaceChildren(el("dl", {}, lines.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, String(text))])));
  placeTip(tip, event.clientX, event.clientY);
}

function placeTip(tip, x, y) {
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(x + 14, innerWidth - width - 8));
  const top = y + 18 + height > innerHeight ? y - height - 12 : y + 18;
  tip.style.left = `${left}px`;
  tip.style.top = `${Math.max(8, top)}px`;
}
