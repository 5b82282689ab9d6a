// What every part uses: elements, data, numbers, downloads, the theme.
// Text goes into the page as text nodes alone: nothing here or elsewhere parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element; `on…` are listeners, `style` sets properties, null attributes are left out. */
function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, to] of Object.entries(value)) node.style.setProperty(key, to);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const parsed = new Map();

/** The data of one part, parsed when it is first asked for. */
function data(name) {
  if (!parsed.has(name)) {
    const holder = document.getElementById(`data-${name}`);
    parsed.set(name, JSON.parse(holder.textContent));
    holder.remove();
  }
  return parsed.get(name);
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const missingValue = "–";

/** A table's value, as its column's form says. */
function written(value, form) {
  if (value === null || value === undefined) return missingValue;
  if (form === "text") return String(value);
  if (form === "integer") return whole.format(value);
  if (form === "share") return `${(100 * value).toFixed(1)}%`;
  if (form === "seconds") return duration(value);
  return value.toFixed(Number(form));
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; count >= 999.5 && unit < units.length - 1; unit += 1) count /= 1000;
  return `${unit ? count.toPrecision(3) : count} ${units[unit]}`;
}

/** A large number in few characters. */
function brief(count) {
  for (const [size, letter] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (count >= size) return `${Number((count / size).toPrecision(3))}${letter}`;
  }
  return String(count);
}

/** `7–22`, or `22` where there is one. */
function span(layers) {
  const [first, last] = [layers[0], layers[layers.length - 1]];
  return first === last ? `${first}` : `${first}–${last}`;
}

/** What a layer is, for people who count blocks. */
function layerName(layer) {
  return layer === 0 ? "layer 0, the embedding" : `layer ${layer}, after block ${layer - 1}`;
}

function save(name, content, type) {
  const url = typeof content === "string" && content.startsWith("data:")
    ? content
    : URL.createObjectURL(new Blob([content], { type }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  if (url.startsWith("blob:")) setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Rows as CSV; what a spreadsheet would take for a formula is marked as text. */
function csv(rows) {
  const keys = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [keys, ...rows.map((row) => keys.map((key) => row[key]))]
    .map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

/** A labelled control. */
function field(label, control, className = "") {
  return el("label", { class: `field ${className}` }, el("span", {}, label), control);
}

function choice(options, onchange) {
  const select = el("select", { onchange: () => onchange(select.value) });
  for (const [value, label] of options) select.append(el("option", { value }, label));
  return select;
}

function toggle(label, pressed, onchange, title) {
  const button = el("button", { type: "button", class: "toggle", "aria-pressed": String(pressed), title }, label);
  button.addEventListener("click", () => {
    const now = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(now));
    onchange(now);
  });
  return button;
}

// The theme: the system's until the reader chooses, and then the choice is remembered.

const systemDark = matchMedia("(prefers-color-scheme: dark)");
const themeListeners = [];

function theme() {
  return document.documentElement.dataset.theme || (systemDark.matches ? "dark" : "light");
}

function remembered(key, value) {
  try { // pages from disk may have no storage
    if (value !== undefined) localStorage.setItem(key, value);
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

function onTheme(listener) {
  themeListeners.push(listener);
}

function startTheme() {
  const button = document.getElementById("theme");
  const show = () => {
    const other = theme() === "dark" ? "light" : "dark";
    button.replaceChildren(themeIcon(other));
    button.setAttribute("aria-label", `Switch to the ${other} theme`);
    button.title = `Switch to the ${other} theme`;
    const colours = data("themes")[theme()].range.category;
    colours.forEach((colour, i) => document.documentElement.style.setProperty(`--series-${i}`, colour));
    themeListeners.forEach((listener) => listener());
  };
  const chosen = remembered("routesae-theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
  button.addEventListener("click", () => {
    const other = theme() === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = other;
    remembered("routesae-theme", other);
    show();
  });
  systemDark.addEventListener("change", show);
  show();
}

function themeIcon(name) {
  const shape = name === "dark"
    ? [svg("path", { d: "M20 14.5A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.5Z" })]
    : [svg("circle", { cx: 12, cy: 12, r: 4.2 }), svg("path", {
      d: "M12 2.5v2.2M12 19.3v2.2M2.5 12h2.2M19.3 12h2.2M5.3 5.3l1.5 1.5M17.2 17.2l1.5 1.5M18.7 5.3l-1.5 1.5M6.8 17.2l-1.5 1.5",
    })];
  return svg("svg", { viewBox: "0 0 24 24", width: 20, height: 20, class: "icon", "aria-hidden": "true" }, shape);
}
