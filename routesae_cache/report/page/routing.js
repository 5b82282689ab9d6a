// Routing on text: under every token hangs a bar, as long as the layer it was read from is deep.

const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];

/** A colour between the shallowest (0) and the deepest (1): the deeper, the further from the page. */
function depthColour(depth) {
  const at = theme() === "dark" ? 0.3 + 0.68 * depth : 0.86 - 0.84 * depth;
  const place = at * (VIRIDIS.length - 1);
  const low = Math.min(VIRIDIS.length - 2, Math.floor(place));
  const channel = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
  const mixed = [0, 1, 2].map((i) => {
    const [a, b] = [channel(VIRIDIS[low], i), channel(VIRIDIS[low + 1], i)];
    return Math.round(a + (b - a) * (place - low));
  });
  return `rgb(${mixed.join(" ")})`;
}

function startRouting() {
  const view = document.getElementById("routing");
  const routing = data("routing");
  if (!routing) {
    view.append(emptyView("No routing to show", "Routing on text"));
    return;
  }
  const state = { run: 0, passage: 0, token: 0, layer: null };
  const { strings, segments } = data("text");
  const text = el("div", { class: "tokens", role: "listbox", "aria-label": "Tokens of the passage", "aria-orientation": "horizontal" });
  const canvas = el("canvas", { class: "heat", role: "img" });
  const cursor = el("i", { class: "cursor" });
  const heat = el("div", { class: "heat-frame" }, canvas, cursor);
  const axis = el("div", { class: "heat-axis", "aria-hidden": "true" });
  const key = el("div", { class: "key", role: "group", "aria-label": "Layers" });
  const title = el("h2");
  const inspector = el("aside", { class: "inspector", "aria-live": "polite", "aria-label": "The chosen token" });
  const runs = choice(routing.runs.map((one, i) => [i, one.run]), (i) => { location.hash = routingHash(Number(i), state.passage); });
  const passages = choice(routing.passages.map((one, i) => [i, passageTitle(one, i)]), (i) => { location.hash = routingHash(state.run, Number(i)); });
  const numbers = toggle("Layer numbers", false, (on) => text.classList.toggle("numbers", on), "Write under each token the layer it was read from");
  const step = (by, label, sign) => el("button", {
    type: "button", class: "quiet", title: label, "aria-label": label,
    onclick: () => { location.hash = routingHash(state.run, (state.passage + by + routing.passages.length) % routing.passages.length); },
  }, sign);
  view.append(
    el("div", { class: "routing-head" },
      el("p", { class: "lead" }, "For each token the router picks the layer it is read from. The bar under a token shows which: the longer and the stronger its colour, the deeper the layer."),
      el("div", { class: "controls" },
        routing.runs.length > 1 ? field("SAE", runs) : null,
        field("Passage", passages), step(-1, "Previous passage", "←"), step(1, "Next passage", "→"), numbers)),
    el("div", { class: "reading" },
      el("div", { class: "page" }, title, key, text,
        el("h3", { class: "heat-title" }, "The router’s whole distribution, token by token"),
        el("div", { class: "heat-grid" }, axis, heat)),
      inspector));

  let tokens = [];
  const read = () => routing.runs[state.run].passages[state.passage];
  const depth = (layer) => (layers().length > 1 ? layer / (layers().length - 1) : 1);
  const layers = () => routing.runs[state.run].layers;
  const pieces = () => {
    const { segment, start, length } = routing.passages[state.passage];
    return segments[segment].slice(start, start + length).map((token) => strings[token]);
  };
  const probabilities = (token) => {
    const count = layers().length;
    return read().router.slice(token * count, (token + 1) * count).map((p) => p / 1000);
  };

  function show() {
    runs.value = state.run;
    passages.value = state.passage;
    title.textContent = routing.passages[state.passage].title || `Passage ${state.passage + 1}`;
    tokens = pieces().map(tokenElement);
    text.replaceChildren(...tokens.flat());
    tokens = tokens.map((parts) => parts.at(-1));
    state.layer = null;
    showKey();
    showHeat();
    choose(Math.min(state.token, read().layer.length - 1), false);
  }

  function tokenElement(piece, i) {
    const layer = read().layer[i];
    const rest = piece.trimStart(); // the space before a word has no bar
    const token = el("span", {
      class: "token", role: "option", id: `token-${i}`, tabindex: -1, "aria-selected": "false",
      "aria-label": `${visible(piece)}, ${layerName(layers()[layer])}`, "data-layer": layers()[layer],
      style: { "--c": depthColour(depth(layer)), "--h": depth(layer).toFixed(3) },
    }, piece.trim() || !piece ? broken(rest) || "·" : visible(piece));
    token.at = i;
    return rest === piece || !rest ? [token] : [piece.slice(0, -rest.length), token];
  }

  function choose(token, focus) {
    const old = tokens[state.token];
    if (old) {
      old.tabIndex = -1;
      old.setAttribute("aria-selected", "false");
    }
    state.token = token;
    const now = tokens[token];
    now.tabIndex = 0;
    now.setAttribute("aria-selected", "true");
    if (focus) now.focus();
    const width = 100 / read().layer.length;
    cursor.style.left = `${token * width}%`;
    cursor.style.width = `${width}%`;
    inspect(inspector, {
      run: routing.runs[state.run].run, soft: routing.runs[state.run].soft, piece: pieces()[token], layers: layers(),
      chosen: read().layer[token], probabilities: probabilities(token), latents: read().latents[token], depth,
    });
  }

  /** The layers, each as wide as its share of the passage; one can be held to see its tokens. */
  function showKey() {
    const counts = layers().map((_, i) => read().layer.filter((layer) => layer === i).length);
    key.replaceChildren(...layers().map((layer, i) => el("button", {
      type: "button", "aria-pressed": "false", title: `${layerName(layer)}: ${counts[i]} of ${read().layer.length} tokens`,
      "aria-label": `${layerName(layer)}: ${counts[i]} of ${read().layer.length} tokens`,
      style: { "--c": depthColour(depth(i)), "--h": depth(i).toFixed(3), "--w": counts[i] },
      onclick: () => hold(state.layer === i ? null : i),
    }, el("i"), el("span", {}, String(layer)), el("small", {}, counts[i] ? `${Math.round(100 * counts[i] / read().layer.length)}%` : ""))));
  }

  function hold(layer) {
    state.layer = layer;
    [...key.children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === layer)));
    tokens.forEach((token, i) => token.classList.toggle("faded", layer !== null && read().layer[i] !== layer));
  }

  /** A column for each token, the deepest layer on top. */
  function showHeat() {
    const [tokens, count] = [read().layer.length, layers().length];
    const [wide, high] = [6, 10];
    canvas.width = tokens * wide;
    canvas.height = count * high;
    const brush = canvas.getContext("2d");
    brush.clearRect(0, 0, canvas.width, canvas.height);
    const most = Math.max(...read().router) / 1000;
    for (let token = 0; token < tokens; token += 1) {
      probabilities(token).forEach((p, layer) => {
        brush.globalAlpha = Math.sqrt(p / most);
        brush.fillStyle = depthColour(depth(layer));
        brush.fillRect(token * wide, (count - 1 - layer) * high, wide, high - 1);
      });
    }
    canvas.setAttribute("aria-label", `Probability of each of ${count} layers for ${tokens} tokens; the same is told token by token beside the text.`);
    axis.replaceChildren(el("span", {}, `${layers()[count - 1]}`), el("span", {}, `${layers()[0]}`));
  }

  text.addEventListener("pointerover", (event) => {
    const token = event.target.closest?.(".token");
    if (token && event.pointerType === "mouse") choose(token.at, false);
  });
  text.addEventListener("click", (event) => {
    const token = event.target.closest(".token");
    if (!token) return;
    choose(token.at, true);
    inspector.classList.add("raised");
    token.scrollIntoView({ block: "nearest" });
  });
  text.addEventListener("keydown", (event) => {
    const last = tokens.length - 1;
    const next = { ArrowRight: state.token + 1, ArrowLeft: state.token - 1, ArrowDown: below(1), ArrowUp: below(-1), Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(last, next)), true);
  });

  /** The token that stands under or over the chosen one. */
  function below(way) {
    const here = tokens[state.token].getBoundingClientRect();
    let [best, least] = [state.token, Infinity];
    tokens.forEach((token, i) => {
      const box = token.getBoundingClientRect();
      const down = way * (box.top - here.top);
      const far = 4 * down + Math.abs(box.left + box.width / 2 - here.left - here.width / 2);
      if (down > 8 && far < least) [best, least] = [i, far];
    });
    return best;
  }

  const pointed = (event) => {
    const frame = heat.getBoundingClientRect();
    const token = Math.floor(read().layer.length * (event.clientX - frame.left) / frame.width);
    choose(Math.max(0, Math.min(read().layer.length - 1, token)), false);
  };
  heat.addEventListener("pointermove", pointed);
  heat.addEventListener("pointerdown", (event) => {
    pointed(event);
    inspector.classList.add("raised");
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") inspector.classList.remove("raised");
  });
  onTheme(() => { if (!view.hidden) show(); });

  view.open = (run, passage) => {
    [state.run, state.passage, state.token] = [run, passage, 0];
    inspector.classList.remove("raised");
    show();
  };
}

function passageTitle(passage, i) {
  return `${i + 1}. ${passage.title || `row ${passage.row}`}`;
}

function routingHash(run, passage) {
  return `#/routing/${encodeURIComponent(data("routing").runs[run].run)}/${passage + 1}`;
}

/** What the router made of one token, and the latents that answer to it. */
function inspect(place, { run, soft, piece, layers, chosen, probabilities, latents, depth }) {
  const most = Math.max(...probabilities);
  const rows = layers.map((layer, i) => el("li", { class: i === chosen ? "chosen" : null },
    el("span", { class: "index" }, String(layer)),
    el("span", { class: "bar" }, el("i", { style: { "--p": `${100 * probabilities[i] / most}%`, "--c": depthColour(depth(i)) } })),
    el("span", { class: "value" }, probabilities[i] < 0.0005 ? "" : `${(100 * probabilities[i]).toFixed(1)}%`))).reverse();
  const close = el("button", { type: "button", class: "quiet close", "aria-label": "Close", onclick: () => place.classList.remove("raised") }, "×");
  const set = latentSet(run);
  const strongest = latents[1] ?? 1;
  const items = [];
  for (let i = 0; i < latents.length; i += 2) items.push(activeLatent(set, run, latents[i], latents[i + 1], strongest));
  place.replaceChildren(
    close,
    el("p", { class: "chosen-token" }, el("code", {}, piece.trim() ? broken(piece.trim()) : visible(piece))),
    el("p", { class: "muted" }, soft ? "Read as a mixture, mostly of " : "Read from ", layerName(layers[chosen])),
    el("h3", {}, "The router’s distribution"),
    el("ol", { class: "distribution" }, rows),
    el("h3", {}, "Strongest latents here"),
    items.length ? el("ol", { class: "near" }, items) : el("p", { class: "muted" }, "None is active."));
}

function activeLatent(set, run, latent, activation, strongest) {
  const known = set?.byIndex.get(latent);
  const inside = [
    el("span", { class: "index" }, String(latent)),
    el("span", { class: "says" }, known ? known.explained?.text ?? known.words.slice(0, 5).map(visible).join(" · ") : "not in the browser"),
    el("span", { class: "value" }, String(activation)),
    el("span", { class: "strength", "aria-hidden": "true" }, el("i", { style: { width: `${100 * activation / strongest}%` } })),
  ];
  return el("li", { class: known ? null : "absent" },
    known ? el("a", { href: latentHash(run, latent) }, inside) : el("span", { class: "no-link" }, inside));
}
