// One latent: its file is loaded by a script tag, drawn with textContent, SVG and canvas.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const WIDE = 296; // canvas pixels of an image, so that outlines are equally thin on any grid
const KEPT = 40; // latents kept in memory
const latents = new Map();

function latentPath(latent) {
  return `data/latents/${String(Math.floor(latent / 256)).padStart(3, "0")}/${String(latent).padStart(5, "0")}.js`;
}

function loadLatent(latent) {
  if (latents.has(latent)) { drawLatent(latents.get(latent)); return; }
  const missing = () => $("latent").replaceChildren(element("p", { text: `Latent ${latent} is not part of this page.` }));
  if (!page.place.has(latent)) { missing(); return; }
  const script = element("script", { src: latentPath(latent) });
  script.addEventListener("error", missing);
  script.addEventListener("load", () => script.remove());
  document.head.append(script);
}

function saeLatent(data) {
  latents.set(data.latent, data);
  if (latents.size > KEPT) latents.delete(latents.keys().next().value);
  if (location.hash === `#/latent/${data.latent}`) drawLatent(data);
}

function section(title, ...children) { return element("section", {}, element("h2", { text: title }), ...children); }

function table(heads, rows, caption) {
  return element("table", {}, element("caption", { text: caption }),
    element("thead", {}, element("tr", {}, ...heads.map((text) => element("th", { scope: "col", text })))),
    element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map((cell) => (cell instanceof Node ? element("td", {}, cell) : element("td", { text: cell, ...(typeof cell === "number" ? { className: "number" } : {}) })))))));
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function drawLatent(data) {
  const at = page.place.get(data.latent), { columns, tables } = page;
  const scale = Object.fromEntries(data.firing.map((f) => [f.modality, f.max]));
  const hits = (modality) => data.top.filter((context) => context.modality === modality);
  const list = (contexts) => element("div", { className: "contexts" }, ...contexts.map((context) => drawContext(context, data, scale)));
  const name = columns.name[at];
  const heading = element("h1", { tabindex: "-1" }, element("span", { className: "id", text: `#${data.latent} ` }), name || "unnamed");
  const facts = [`level ${data.level}`, data.status, `density ${number(data.density)}`, `max ${number(data.max)}`, tables.category[columns.category[at]]].filter(Boolean);
  $("latent").replaceChildren(...[
    element("nav", { "aria-label": "Latents" }, element("a", { href: "#/", text: "← index" }), element("span", { className: "faint", text: `${page.at + 1} of ${page.rows.length}` })),
    heading,
    element("p", { className: "facts" }, ...facts.map((text) => element("span", { className: "chip", text }))),
    drawScores(data),
    element("div", { className: "columns" }, drawHistogram(data), drawFiring(data), drawTokens("Raises", data.top_tokens), drawTokens("Lowers", data.bottom_tokens)),
    element("div", { className: "columns two" }, drawAgreement(data), drawNeighbours(data)),
    ...drawSpace(data),
    data.maps.length ? section("Mean maps", element("div", { className: "radiographs" }, ...data.maps.map((map) => drawMap(data, map, { map: true, scale: map.max }, `mean over ${map.studies} studies, max ${number(map.max)}`)))) : null,
    section(`Hits in images (${hits("image").length})`, hits("image").length ? list(hits("image")) : element("p", { className: "faint", text: "None among the largest activations." })),
    section(`Hits in text (${hits("text").length})`, hits("text").length ? list(hits("text")) : element("p", { className: "faint", text: "None among the largest activations." })),
    section("Contexts per interval", data.intervals.length ? null : element("p", { className: "faint", text: "None." }), ...data.intervals.map((interval) => folded(`${number(interval.low)} to ${number(interval.high)} · ${number(100 * interval.fraction)} % of rows · ${interval.contexts.length} contexts`, () => list(interval.contexts)))),
    section("Zero contexts", folded(`${data.zero.length} studies in which it never fires`, () => list(data.zero))),
    data.left_out ? element("p", { className: "faint", text: `${data.left_out} contexts left out to keep this page small; the record set has them.` }) : null,
  ].filter(Boolean));
  heading.focus({ preventScroll: true });
}

function folded(title, make) {
  const body = element("div");
  const details = element("details", {}, element("summary", { text: title }), body);
  details.addEventListener("toggle", () => { if (details.open && !body.firstChild) body.append(make()); });
  return details;
}

function drawScores(data) {
  if (!data.interpretations.length) return element("p", { className: "faint", text: "No interpretation of this latent." });
  const verdict = (score) => (score ? `${number(score.balanced_accuracy)} [${number(score.low)}, ${number(score.high)}]` : "–");
  return section("Interpretation", ...data.interpretations.map((one) => element("div", { className: "interpretation" },
    element("p", { className: "explanation", text: one.explanation || `no explanation: ${words(one.status)}` }),
    element("p", { className: "faint", text: `${one.explainer} · shown ${one.n_train}, asked about ${one.n_test} examples, no patient in both` }),
    one.scores.length ? table(["Scorer", "Judge", "Balanced accuracy [95 %]", one.control_latent === null ? "Control" : `Control: explanation of #${one.control_latent}`, "Answered"],
      one.scores.map((score) => [score.method, score.judge, verdict(score), verdict(one.control.find((c) => c.method === score.method && c.judge === score.judge)), `${score.answered} of ${score.asked}`]), "Scores and their controls") : null)));
}

function drawHistogram({ histogram }) {
  if (!histogram.counts.length) return section("Activations", element("p", { className: "faint", text: "It never fires." }));
  const { counts, edges } = histogram, top = Math.max(...counts, 1), wide = 300, high = 110, bar = wide / Math.max(counts.length, 1);
  // Logarithmic, since the tail is what a latent is about.
  const height = (count) => (count ? 4 + (high - 4) * Math.log1p(count) / Math.log1p(top) : 0);
  const picture = svg("svg", { viewBox: `0 0 ${wide} ${high + 2}`, role: "img", "aria-label": `Histogram of activations above zero, ${number(edges[0])} to ${number(edges[edges.length - 1])}`, class: "histogram", preserveAspectRatio: "none" },
    ...counts.map((count, i) => {
      const title = svg("title", {});
      title.textContent = `${number(edges[i])} to ${number(edges[i + 1])}: ${count}`;
      return svg("rect", { x: i * bar + 0.5, y: high - height(count), width: Math.max(bar - 1, 0.5), height: height(count) }, title);
    }));
  return section("Activations", picture, element("p", { className: "axis faint" }, element("span", { text: number(edges[0]) }), element("span", { text: "counts on a log scale" }), element("span", { text: number(edges[edges.length - 1]) })));
}

function drawFiring({ firing }) {
  return section("Density", table(["", ...firing.map((f) => f.modality)], [
    ["density", ...firing.map((f) => (f.rows ? number(f.density) : "not read"))], ["rows fired", ...firing.map((f) => f.fired.toLocaleString("en"))], ["of rows", ...firing.map((f) => f.rows.toLocaleString("en"))],
    ["studies fired", ...firing.map((f) => `${f.studies_fired} of ${f.studies}`)], ["mean", ...firing.map((f) => number(f.mean))], ["p99", ...firing.map((f) => number(f.p99))], ["max", ...firing.map((f) => number(f.max))],
  ], "Text and image positions apart"));
}

function drawTokens(title, tokens) {
  return section(title, table(["Token", "Logit"], tokens.slice(0, 10).map(([token, , weight]) => [element("code", { text: token.replaceAll("\n", "↵") || "∅" }), number(weight)]), `Output tokens it ${title.toLowerCase()}`));
}

function drawAgreement({ agreement }) {
  const bar = (a) => {
    const x = (value) => 2 + 116 * value;
    return svg("svg", { viewBox: "0 0 120 14", class: "forest", role: "img", "aria-label": `F1 ${number(a.f1)}, 95 % interval ${number(a.low)} to ${number(a.high)}` },
      svg("line", { x1: x(0), x2: x(1), y1: 7, y2: 7, class: "rail" }), svg("line", { x1: x(a.low), x2: x(a.high), y1: 7, y2: 7, class: "span" }), svg("circle", { cx: x(a.f1), cy: 7, r: 3.5 }));
  };
  return section("Agreement with findings", agreement.length ? table(["Finding", "At", "F1 [95 %]", "", "Precision", "Recall", "n"],
    agreement.slice(0, 12).map((a) => [words(a.finding), a.modality, `${number(a.f1)} [${number(a.low)}, ${number(a.high)}]`, bar(a), number(a.precision), number(a.recall), `${a.positives} of ${a.studies}`]), "F1 between firing in a study and the finding") : element("p", { className: "faint", text: "Not measured." }));
}

function drawSpace({ space }) {
  if (!(space || []).length) return [];
  const cell = (row, name) => `${number(row[name])} [${number(row[`${name}_low`])}, ${number(row[`${name}_high`])}]`;
  return [section("Place of findings", table(["Finding", "Strongest patch in box [95 %]", "other study", "Energy in box [95 %]", "other study", "IoU [95 %]", "other study", "n"],
    space.map((row) => [words(row.finding), cell(row, "pointing"), number(row.elsewhere_pointing), cell(row, "energy"), number(row.elsewhere_energy), cell(row, "iou"), number(row.elsewhere_iou), row.n]),
    "This latent's map against the finding's boxes, and the same with its map from another study that has the finding"))];
}

function drawNeighbours({ latent: own, neighbours }) {
  const says = { refines: "refines", "co-fires": "co-fires with", similar: "decodes like" }, most = 12;
  const finer = [...(page.refinedBy.get(own) || [])].sort((a, b) => b[1] - a[1]);
  const rank = { refines: 0, "refined by": 1, "co-fires": 2, similar: 3 };
  const rows = [...neighbours, ...finer.slice(0, most).map(([latent, value]) => [latent, "refined by", value])].sort((a, b) => rank[a[1]] - rank[b[1]]);
  const line = ([latent, relation, value]) => {
    const at = page.place.get(latent);
    // A page of some latents names others that it does not hold.
    const link = at === undefined ? element("span", { className: "faint", text: `#${latent}` }) : element("a", { href: `#/latent/${latent}`, text: `#${latent}` });
    return [says[relation] || relation, link, at === undefined ? "" : page.columns.name[at] || page.columns.words[at], at === undefined ? "" : page.columns.level[at], number(value)];
  };
  return section("Neighbours", rows.length ? table(["", "Latent", "Name", "Level", "Value"], rows.map(line), "Coarser latents it refines, finer ones that refine it, latents it fires with, latents of similar direction") : element("p", { className: "faint", text: "None recorded." }),
    finer.length > most ? element("p", { className: "faint", text: `${finer.length - most} more refine it.` }) : null);
}

function drawContext(context, data, scale) {
  const study = data.studies[context.study] || { findings: [], images: {}, boxes: [] };
  const hit = context.patch ? `patch ${context.patch[1]}, ${context.patch[2]} of the ${context.patch[0]} image` : context.peak >= 0 ? `token ${context.peak}` : "no firing";
  const read = data.firing.some((f) => f.modality === "image" && f.rows > 0);
  return element("figure", { className: "context" },
    element("figcaption", {}, element("strong", { text: number(context.value) }), ` ${hit} · study ${context.study}`,
      ...study.findings.map((finding) => element("span", { className: "chip", text: words(finding) })),
      study.labelled_by === "rule_labels" ? element("span", { className: "faint", text: " labels by rule" }) : null,
      study.licence && shareable(study.licence) ? element("span", { className: "faint", text: ` ${study.licence} study` }) : null),
    shareable(study.licence) ? null : element("p", { className: "licence", role: "note", text: `${study.licence === "credentialed" ? "Credentialed study" : "Study of an unknown licence"}: its text and images stay on this machine.` }),
    context.maps.length ? element("div", { className: "radiographs" }, ...context.maps.map((activation) => drawMap(data, activation, { scale: scale.image || activation.max, image: study.images[activation.view], boxes: activation.view === "frontal" ? study.boxes : [], patch: context.patch && context.patch[0] === activation.view ? context.patch : null }, activation.max > 0 ? `max ${number(activation.max)}` : read ? "silent" : "patches not read"))) : null,
    drawText(context, scale.text || context.value));
}

function drawText(context, top) {
  const box = element("div", { className: "text" });
  let i = 0;
  for (const [role, count] of context.roles) {
    const part = element("p", {}, element("span", { className: "role", text: words(role) }));
    for (const end = i + count; i < end; i++) {
      const value = context.values[i];
      const token = element("span", { text: context.tokens[i], title: value === null ? "not harvested" : number(value), className: i === context.peak ? "token peak" : "token" });
      if (value === null) token.classList.add("unread");
      else if (value > 0 && top > 0) token.style.setProperty("--activation", `${Math.round(10 + 75 * Math.min(1, value / top))}%`), token.classList.add("fires");
      part.append(token);
    }
    box.append(part);
  }
  return box;
}

function activationLevels(activation, alphabet) {
  const last = alphabet.length - 1, grid = new Float32Array(activation.rows * activation.cols);
  const read = (letter) => alphabet.indexOf(letter) / last * activation.max;
  if (activation.dense !== undefined) for (let i = 0; i < grid.length; i++) grid[i] = read(activation.dense[i]);
  else activation.patches.forEach((patch, i) => { grid[patch] = read(activation.sparse[i]); });
  return grid;
}

function drawMap(data, activation, { scale, image, boxes = [], patch = null, map = false }, caption) {
  const at = page.place.get(data.latent), best = page.tables.finding[page.columns.finding[at]];
  const cell = Math.max(1, Math.round(WIDE / activation.cols));
  const canvas = element("canvas", { width: activation.cols * cell, height: activation.rows * cell, role: "img", "aria-label": `${map ? "Mean heatmap" : "Heatmap"} of the ${activation.view} image, ${caption}` });
  const paint = canvas.getContext("2d"), grid = activationLevels(activation, data.alphabet);
  grid.forEach((value, i) => {
    if (value <= 0) return;
    const part = Math.min(1, value / (scale || 1));
    // Amber over grey, opaque enough to see where it is faint and clear enough to see the image where it is strong.
    paint.fillStyle = `hsla(${44 - 32 * part}, 100%, 55%, ${0.18 + 0.52 * part})`;
    paint.fillRect((i % activation.cols) * cell, Math.floor(i / activation.cols) * cell, cell, cell);
  });
  if (patch) {
    paint.strokeStyle = "#7df";
    paint.lineWidth = 2;
    paint.strokeRect(patch[2] * cell - 1, patch[1] * cell - 1, cell + 2, cell + 2);
  }
  const radiograph = () => element("img", { src: image, alt: `${activation.view} radiograph`, loading: "lazy" });
  const frame = element("div", { className: image ? "frame" : "frame bare" }, image ? radiograph() : null, canvas,
    ...boxes.map(([finding, left, top, right, bottom]) => {
      const box = element("div", { className: finding === best ? "box best" : "box", role: "img", "aria-label": `Box of ${words(finding)}` }, element("span", { text: words(finding) }));
      Object.assign(box.style, { left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * (right - left)}%`, height: `${100 * (bottom - top)}%` });
      return box;
    }));
  // Where the latent fires: the radiograph alone, and next to it the one with the map.
  const pair = image && activation.max > 0 ? element("div", { className: "pair" }, element("div", { className: "frame" }, radiograph()), frame) : frame;
  return element("div", { className: activation.max > 0 ? "radiograph" : "radiograph quiet" }, pair, element("p", { className: "faint", text: `${activation.view} · ${caption}` }));
}
