// The latent browser: search, filters, order, and a list of which only what is seen exists.

const ROW = 60; // pixels, as in the style

const browser = { sets: new Map(), shown: [], at: -1 };

/** A run's latents, with what is searched and sorted by. */
function latentSet(run) {
  if (!browser.sets.has(run)) {
    const place = data("latents").findIndex((one) => one.run === run);
    if (place < 0) return null;
    const set = data(`latents-${place}`);
    const { strings } = data("text");
    set.byIndex = new Map();
    for (const one of set.latents) {
      one.words = one.tokens.map((token) => strings[token]);
      one.layer = mostUsed(one.layers, set.layers);
      one.meanLayer = meanLayer(one.layers, set.layers);
      one.haystack = [one.words.join(" "), one.explained?.text ?? "", one.explained?.subcategory ?? ""].join(" ").toLowerCase();
      set.byIndex.set(one.latent, one);
    }
    browser.sets.set(run, set);
  }
  return browser.sets.get(run);
}

function mostUsed(counts, layers) {
  if (layers.length === 1) return layers[0];
  return counts === null ? null : layers[counts.indexOf(Math.max(...counts))];
}

function meanLayer(counts, layers) {
  if (counts === null) return layers[0];
  const total = counts.reduce((sum, count) => sum + count, 0) || 1;
  return counts.reduce((sum, count, i) => sum + count * layers[i], 0) / total;
}

const ORDERS = {
  strength: ["Strongest", (a, b) => b.max - a.max],
  count: ["Most active", (a, b) => b.count - a.count],
  rare: ["Least active", (a, b) => a.count - b.count],
  layer: ["Layer", (a, b) => a.meanLayer - b.meanLayer],
  score: ["Score", (a, b) => (b.explained?.score ?? -1) - (a.explained?.score ?? -1)],
  index: ["Index", (a, b) => a.latent - b.latent],
};

function startBrowser() {
  const view = document.getElementById("latents");
  const available = data("latents");
  if (!available.length) {
    view.append(emptyView("No latents to browse", "The latent browser"));
    return;
  }
  const filters = { query: "", category: "", score: "", layer: "", order: "strength" };
  const change = (key) => (value) => {
    filters[key] = value;
    refresh();
  };
  const search = el("input", {
    type: "search", placeholder: "Index, token or explanation", autocomplete: "off", spellcheck: "false", id: "search",
    oninput: () => change("query")(search.value),
  });
  const runs = choice(available.map((one) => [one.run, one.run]), (run) => { location.hash = latentHash(run); });
  const controls = {
    category: choice([], change("category")),
    score: choice([], change("score")),
    layer: choice([], change("layer")),
    order: choice(Object.entries(ORDERS).map(([key, [label]]) => [key, label]), change("order")),
  };
  const count = el("p", { class: "count", role: "status" });
  const rows = el("div", { class: "rows" });
  const list = el("div", { class: "list", id: "list", tabindex: 0, role: "listbox", "aria-label": "Latents" }, rows);
  const detail = el("article", { class: "detail", id: "detail", "aria-live": "off" });
  const more = el("div", { class: "filters" },
    field("Category", controls.category), field("Score", controls.score), field("Layer", controls.layer), field("Order", controls.order));
  view.append(
    el("div", { class: "side" },
      el("div", { class: "finder" }, available.length > 1 ? field("SAE", runs, "wide") : null, field("Search", search, "wide"), more, count),
      list),
    detail);

  function refresh() {
    const set = latentSet(browser.run);
    browser.shown = filtered(set, filters).sort(ORDERS[filters.order][1]);
    const all = set.latents.length === set.total ? "" : ` (of ${whole.format(set.total)} interpretable)`;
    count.textContent = `${whole.format(browser.shown.length)} of ${whole.format(set.latents.length)} latents${all}`;
    rows.style.height = `${browser.shown.length * ROW}px`;
    browser.at = browser.shown.findIndex((one) => one.latent === browser.latent);
    list.scrollTop = 0;
    paint();
  }

  function paint() {
    if (!browser.run) return;
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6);
    const last = Math.min(browser.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 6);
    const strongest = browser.strongest;
    rows.replaceChildren(...browser.shown.slice(first, last).map((one, i) => latentRow(one, first + i, strongest)));
    const active = rows.querySelector("[aria-selected=true]");
    if (active) list.setAttribute("aria-activedescendant", active.id);
    else list.removeAttribute("aria-activedescendant");
  }

  function reveal() {
    if (browser.at < 0) return;
    const top = browser.at * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
    paint();
  }

  browser.step = (by) => {
    if (!browser.shown.length) return;
    const last = browser.shown.length - 1;
    const from = browser.at >= 0 ? browser.at : by > 0 ? -1 : last + 1; // none is chosen yet
    const one = browser.shown[Math.max(0, Math.min(last, from + by))];
    history.replaceState(null, "", latentHash(browser.run, one.latent));
    route();
  };

  let waiting = 0;
  list.addEventListener("scroll", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(paint);
  }, { passive: true });
  new ResizeObserver(paint).observe(list);
  list.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    browser.step(steps[event.key]);
  });

  /** Show a run's list, and one of its latents where one is given. */
  browser.open = (run, latent) => {
    const changed = run !== browser.run;
    browser.run = run;
    browser.latent = latent;
    if (changed) {
      runs.value = run;
      fillFilters(controls, filters, latentSet(run));
      browser.strongest = Math.max(...latentSet(run).latents.map((one) => one.max));
      refresh();
    }
    browser.at = browser.shown.findIndex((one) => one.latent === latent);
    paint();
    reveal();
    view.classList.toggle("opened", latent !== null);
    showLatent(detail, run, latent);
  };
}

/** The filters' choices are those of the run that is shown. */
function fillFilters(controls, filters, set) {
  const explained = set.latents.filter((one) => one.explained);
  const tally = (key, of) => {
    const counts = new Map();
    for (const one of set.latents) {
      const value = of(one);
      if (value !== null && value !== undefined) counts.set(value, (counts.get(value) ?? 0) + 1);
    }
    const options = [...counts.keys()].sort((a, b) => (typeof a === "number" ? a - b : a.localeCompare(b)));
    controls[key].replaceChildren(el("option", { value: "" }, "all"),
      ...options.map((value) => el("option", { value }, `${value} (${counts.get(value)})`)));
    controls[key].closest(".field").hidden = options.length < 2;
    filters[key] = "";
  };
  tally("category", (one) => one.explained?.category);
  tally("score", (one) => one.explained?.score);
  tally("layer", (one) => one.layer);
  controls.order.querySelector('[value="score"]').hidden = !explained.length;
}

function filtered(set, filters) {
  const query = filters.query.trim().toLowerCase();
  const exact = /^#?\d+$/.test(query) ? Number(query.replace("#", "")) : null;
  return set.latents.filter((one) =>
    (!filters.category || one.explained?.category === filters.category)
    && (!filters.score || one.explained?.score === Number(filters.score))
    && (!filters.layer || one.layer === Number(filters.layer))
    && (!query || one.latent === exact || one.haystack.includes(query)));
}

function latentRow(one, at, strongest) {
  const { explained } = one;
  const text = explained ? explained.text : one.words.filter(Boolean).slice(0, 6).map(visible).join("  ·  ");
  const facts = [one.layer === null ? null : `layer ${one.layer}`, `${whole.format(one.count)} ×`];
  return el("a", {
    class: explained ? "row explained" : "row", role: "option", id: `latent-${one.latent}`, tabindex: -1,
    href: latentHash(browser.run, one.latent), "aria-selected": String(at === browser.at),
    "aria-posinset": at + 1, "aria-setsize": browser.shown.length, style: { transform: `translateY(${at * ROW}px)` },
  },
  el("span", { class: "index" }, String(one.latent)),
  el("span", { class: "says" }, text),
  el("span", { class: "row-facts" }, explained ? dots(explained.score) : null, facts.filter(Boolean).join(" · ")),
  el("span", { class: "strength", "aria-hidden": "true" }, el("i", { style: { width: `${100 * one.max / strongest}%` } })));
}

/** A score of 1 to 5. */
function dots(score) {
  return el("span", { class: "dots", role: "img", "aria-label": `score ${score} of 5` },
    "●".repeat(score), el("span", { class: "off" }, "●".repeat(Math.max(0, 5 - score))));
}

/** A token as it can be seen: spaces at its ends, line ends and nothing at all included. */
function visible(text) {
  if (text === "") return "·";
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

function latentHash(run, latent) {
  const name = encodeURIComponent(run);
  return latent === undefined || latent === null ? `#/latents/${name}` : `#${name}/${latent}`;
}
