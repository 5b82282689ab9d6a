// The page as a whole: its head, its views, and which of them an address means.
//
// #/overview · #/latents · #/latents/RUN · #RUN/LATENT · #/routing/RUN/PASSAGE

const started = new Set();
const STARTERS = {
  overview: startOverview,
  latents: startBrowser,
  routing: startRouting,
};

function startOverview() {
  startTable();
  startPlots();
  const { missing } = data("overview");
  if (!missing.length) return;
  document.getElementById("missing").append(
    el("div", { class: "block-head" }, el("h2", {}, "Not on this page")),
    el("ul", { class: "missing" }, [...bySentence(missing)].map(([sentence, titles]) =>
      el("li", {}, el("strong", {}, `${sentenceCase(titles.join("; "))}. `), commands(sentence)))));
}

/** What is missing for one reason, together. */
function bySentence(missing) {
  const found = new Map();
  for (const [title, sentence] of missing) found.set(sentence, [...(found.get(sentence) ?? []), title]);
  return found;
}

function sentenceCase(text) {
  return text[0].toUpperCase() + text.slice(1);
}

/** A sentence with its `commands` as code. */
function commands(sentence) {
  return sentence.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

function emptyView(title, missing) {
  const found = data("overview").missing.filter(([name]) => name === missing);
  return el("div", { class: "empty" }, el("h2", {}, title), found.map(([, sentence]) => el("p", {}, commands(sentence))));
}

function startHead() {
  const { store, runs, folder } = data("overview");
  document.getElementById("model").textContent = store ? store.model : folder;
  document.title = `Sparse autoencoders on ${store ? store.model : folder}`;
  const saes = runs === 1 ? "One sparse autoencoder" : `${runs} sparse autoencoders`;
  document.getElementById("headline").textContent = store ? `${saes} on ${store.model}` : saes;
  if (!store) return;
  document.getElementById("facts").append(
    fact("Text", store.text, `${brief(store.train_tokens)} tokens to train, ${brief(store.eval_tokens)} held out`),
    fact("Residuals", `layers ${span(store.layers)}`, `of ${store.blocks} blocks, width ${store.width}`),
    fact("Store", bytes(store.bytes), `${store.bits.toFixed(2)} bits a value, ${store.codec}`));
}

function show(name) {
  for (const view of document.querySelectorAll(".view")) view.hidden = view.id !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.view = name;
  document.getElementById("tip").hidden = true;
  if (!started.has(name)) {
    started.add(name);
    STARTERS[name]();
  }
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch { // an address that somebody cut short
    return text;
  }
}

function route() {
  const parts = location.hash.slice(1).split("/");
  if (parts[0] === "" && parts[1] === "routing") openRouting(decoded(parts[2] ?? ""), Number(parts[3]) || 1);
  else if (parts[0] === "" && parts[1] === "latents") openLatents(decoded(parts[2] ?? ""), null);
  else if (parts.length === 2 && parts[0]) openLatents(decoded(parts[0]), Number(parts[1]));
  else show("overview");
}

function openLatents(run, latent) {
  show("latents");
  const runs = data("latents").map((one) => one.run);
  if (!runs.length) return;
  const known = runs.includes(run);
  browser.open(known ? run : browser.run ?? runs[0], known ? latent : null);
}

function openRouting(run, passage) {
  show("routing");
  const routing = data("routing");
  if (!routing) return;
  const found = routing.runs.findIndex((one) => one.run === run);
  const last = routing.passages.length;
  document.getElementById("routing").open(Math.max(0, found), Math.min(last, Math.max(1, passage)) - 1);
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address says which view it is
  document.querySelector(".view:not([hidden])").focus();
});

startTheme();
startHead();
addEventListener("hashchange", route);
route();
