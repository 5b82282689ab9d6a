// One latent: what it is said to be, where it is active, what it writes.

const shading = { numbers: false };

function showLatent(place, run, latent) {
  place.scrollTop = 0;
  if (latent === null) {
    place.replaceChildren(el("p", { class: "hint" }, "Choose a latent from the list, or go through it with the arrow keys."));
    return;
  }
  const set = latentSet(run);
  const one = set.byIndex.get(latent);
  const back = el("a", { class: "back", href: latentHash(run) }, "← All latents");
  if (!one) {
    place.replaceChildren(back, el("h2", {}, `Latent ${latent}`), el("p", { class: "hint" },
      "This page does not have it: it is not interpretable at the threshold, or was left out to keep the page small."));
    return;
  }
  place.replaceChildren(
    back,
    ...latentHead(set, one),
    el("div", { class: "columns" },
      el("div", { class: "contexts" }, contextsOf(set, one)),
      el("div", { class: "about" }, aboutLatent(set, one))));
}

function latentHead(set, one) {
  const copy = el("button", { type: "button", class: "quiet", title: "Copy a link to this latent" }, "Copy link");
  copy.addEventListener("click", async () => {
    const url = location.href.split("#")[0] + latentHash(set.run, one.latent);
    try {
      await navigator.clipboard.writeText(url);
      copy.textContent = "Copied";
    } catch { // not every browser allows it for pages from disk
      copy.replaceWith(el("input", { class: "url", readonly: true, value: url, "aria-label": "Link to this latent" }));
    }
  });
  const step = (by, label, sign) => el("button", {
    type: "button", class: "quiet", title: label, "aria-label": label, onclick: () => browser.step(by),
  }, sign);
  const head = el("header", {},
    el("h2", {}, el("small", {}, "Latent "), String(one.latent)),
    el("span", { class: "head-tools" }, step(-1, "Previous in the list", "←"), step(1, "Next in the list", "→"), copy));
  const { explained } = one;
  if (!explained) return [head];
  const facts = [explained.category, explained.subcategory].filter(Boolean).join(", ");
  return [head, el("p", { class: "explanation" }, explained.text),
    el("p", { class: "judged" }, dots(explained.score), ` ${explained.score} of 5 · ${facts}`,
      typeof explained.detection === "number" ? ` · detection ${(100 * explained.detection).toFixed(0)}%` : null,
      set.model ? el("span", { class: "muted" }, ` · by ${set.model}`) : null)];
}

function contextsOf(set, one) {
  const list = el("ol", { class: shading.numbers ? "context-list numbers" : "context-list" },
    one.contexts.map((context) => contextItem(set, one, context)));
  const numbers = toggle("Values", shading.numbers, (on) => {
    shading.numbers = on;
    list.classList.toggle("numbers", on);
  }, "Write each activation beside its token");
  return [el("div", { class: "part-head" }, el("h3", {}, "Contexts"), numbers), list];
}

function contextItem(set, one, context) {
  const [segment, start, length, marked, layer, activation, offsets, values] = context;
  const { strings, segments, loose } = data("text");
  const tokens = segment < 0 ? loose[-segment - 1] : segments[segment].slice(start, start + length);
  const active = new Map(offsets.map((offset, i) => [offset, values[i]]));
  const text = el("p", { class: "passage" });
  let plain = "";
  const flush = () => {
    if (plain) text.append(plain);
    plain = "";
  };
  tokens.forEach((token, i) => {
    const piece = i ? broken(strings[token]) : broken(strings[token]).trimStart();
    if (!active.has(i) && i !== marked) {
      plain += piece;
      return;
    }
    flush();
    const value = active.get(i) ?? activation;
    const rest = piece.trimStart();
    if (rest) text.append(piece.slice(0, -rest.length)); // the space before a word is not shaded
    text.append(el(i === marked ? "mark" : "span", {
      class: "on", title: `activation ${value}`, "data-value": value,
      style: { "--a": Math.min(1, value / one.max).toFixed(3) },
    }, rest || visible(piece)));
  });
  flush();
  const facts = layer === null || set.layers.length === 1 ? `${activation}` : `${activation} · layer ${layer}`;
  return el("li", {}, el("span", { class: "activation" }, facts), text);
}

/** Line ends as signs, so that a context stays a paragraph. */
function broken(text) {
  return text.replace(/\r?\n/g, "↵ ");
}

function aboutLatent(set, one) {
  const share = one.count / set.tokens;
  const facts = el("dl", { class: "facts small" },
    fact("Active", `${whole.format(one.count)} ×`, `above ${Number(set.threshold.toPrecision(3))}, on ${sharePercent(share)} of tokens`),
    fact("Strongest", String(one.max)), fact("Mean", String(one.mean)));
  return [
    facts,
    part("Activations", histogram(one.histogram)),
    set.layers.length > 1 && one.layers !== null ? part("Read from layer", layerBars(set.layers, one.layers)) : null,
    one.promoted ? part("Raises the logits of", tokenBars(one.promoted, "up")) : null,
    one.suppressed ? part("Lowers the logits of", tokenBars(one.suppressed, "down")) : null,
    one.near?.length ? part("Nearest by decoder cosine", nearest(set, one.near)) : null,
  ];
}

function sharePercent(share) {
  const percent = 100 * share;
  return `${percent >= 0.1 ? percent.toFixed(1) : Number(percent.toPrecision(1))}%`;
}

function fact(name, value, note) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value, note ? el("small", {}, ` ${note}`) : null));
}

function part(title, ...content) {
  return el("section", { class: "part" }, el("h3", {}, title), content);
}

/** Small bars side by side, each with its own words. */
function columns(values, labels, describe) {
  const [width, height] = [280, 64];
  const most = Math.max(...values, 1e-9);
  const band = width / values.length;
  const rects = values.map((value, i) => svg("rect", {
    x: (i * band + band * 0.12).toFixed(1), width: (band * 0.76).toFixed(1), rx: 1.5,
    y: (height - Math.max(value ? 1.5 : 0, height * value / most)).toFixed(1), height: Math.max(value ? 1.5 : 0, height * value / most).toFixed(1),
  }, svg("title", {}, describe(i))));
  const ticks = labels.map(([at, text, anchor]) => svg("text", { x: (at * width).toFixed(1), y: height + 14, "text-anchor": anchor }, text));
  const sentence = values.map((_, i) => describe(i)).join("; ");
  return svg("svg", { viewBox: `0 0 ${width} ${height + 18}`, class: "columns-chart", role: "img", "aria-label": sentence },
    svg("path", { d: `M0 ${height}h${width}`, class: "axis" }), rects, ticks);
}

function histogram({ edges, counts }) {
  const last = edges.length - 1;
  return columns(counts, [[0, edges[0], "start"], [1, edges[last], "end"]],
    (i) => `${edges[i]} to ${edges[i + 1]}: ${counts[i]}`);
}

function layerBars(layers, counts) {
  const labels = layers.map((layer, i) => [(i + 0.5) / layers.length, layer, "middle"])
    .filter((_, i) => layers.length <= 12 || i % 2 === 0);
  return columns(counts, labels, (i) => `layer ${layers[i]}: ${counts[i]} ×`);
}

function tokenBars(pairs, way) {
  const { strings } = data("text");
  const most = Math.max(...pairs.map(([, value]) => Math.abs(value)), 1e-9);
  return el("ol", { class: `bars ${way}` }, pairs.map(([token, value]) => el("li", {},
    el("code", {}, visible(strings[token])),
    el("span", { class: "bar", "aria-hidden": "true" }, el("i", { style: { width: `${100 * Math.abs(value) / most}%` } })),
    el("span", { class: "value" }, value.toFixed(1)))));
}

function nearest(set, near) {
  return el("ol", { class: "near" }, near.map(([latent, cosine]) => {
    const other = set.byIndex.get(latent);
    const label = el("span", { class: "index" }, String(latent));
    const words = el("span", { class: "says" }, other ? other.explained?.text ?? other.words.slice(0, 5).map(visible).join(" · ") : "not in the browser");
    const value = el("span", { class: "value" }, cosine.toFixed(2));
    return el("li", { class: other ? null : "absent" },
      other ? el("a", { href: latentHash(set.run, latent) }, label, words, value) : el("span", { class: "no-link" }, label, words, value));
  }));
}
