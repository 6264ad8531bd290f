// The workbench's page. Text of studies, reports and latents is only ever inserted as text.
const token = new URLSearchParams(location.search).get("token") || "";
const $ = (id) => document.getElementById(id);
const el = (tag, text, attributes = {}) => {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
};
const state = {
  studies: [], about: null, grids: {}, view: "frontal", sliders: [], masks: {}, without: [], painting: null,
  history: [], shown: null, overlay: null, running: null, seed: 1, cursor: [0, 0], undo: [], names: {}, choosing: 0,
};
const PARTS = ["prior_image", "prior_report", "lateral", "indication"];
const number = (value, digits) => (value === null || value === undefined ? "not finite" : value.toFixed(digits));

// ---------------------------------------------------------------- talking to the server
async function call(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { "X-Token": token, ...(options.headers || {}) } });
  if (!answer.ok) {
    const text = await answer.text();
    let message = text;
    try { message = JSON.parse(text).error || text; } catch { /* plain text */ }
    throw new Error(message);
  }
  return answer;
}
const getJSON = async (path) => (await call(path)).json();
const query = (values) => new URLSearchParams(values).toString();

async function stream(path, body, signal, onEvent) {
  const answer = await call(path, { method: "POST", body: JSON.stringify(body), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server ended the run without a result.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.event === "result") return event.result;
      if (event.event === "error") throw new Error(event.message);
      if (event.event === "cancelled") throw new DOMException("cancelled", "AbortError");
      onEvent(event);
    }
  }
}

async function exclusively(work) {
  if (state.running) return;
  const controller = new AbortController();
  state.running = controller;
  problem(null);
  busy(true);
  try {
    await work(controller.signal);
    status("");
  } catch (error) {
    if (error.name === "AbortError") status("Cancelled.");
    else { status(""); problem(error.message); }
  } finally {
    state.running = null;
    busy(false);
  }
}
const busy = (on) => { for (const id of ["run", "control"]) $(id).disabled = on; $("cancel").disabled = !on; document.body.setAttribute("aria-busy", on); };
const status = (text) => { $("status").textContent = text; };
const problem = (text) => { $("problem").hidden = !text; $("problem").textContent = text || ""; };
const progress = (event) => {
  if (event.event === "queued") status(event.ahead ? `Waiting: ${event.ahead} runs before this one.` : "Waiting for the model.");
  else if (event.event === "started") status("The model is running.");
  else if (event.event === "text") $(event.side).textContent = event.text;
};

// ---------------------------------------------------------------- study and image
async function choose(id) {
  const mine = ++state.choosing;
  if (state.running && state.about && state.about.id !== id) state.running.abort();  // its report is of another study
  const about = await getJSON(`api/study?${query({ id })}`);
  if (mine !== state.choosing) return;
  state.about = about; state.grids = about.grids; state.view = "frontal"; state.masks = {}; state.overlay = null; state.without = []; state.shown = null;
  $("study").value = id;
  const uploaded = about.upload ? " It is kept in memory and treated as credentialed." : "";
  $("licence").textContent = `Licence of this study: ${about.licence}.${uploaded}`;
  $("views").replaceChildren(...about.views.map((view) => {
    const button = el("button", view, { type: "button" });
    button.onclick = () => { state.view = view; drawRadiograph(); };
    return button;
  }));
  const names = { prior_image: "prior image", prior_report: "prior report", lateral: "lateral image", indication: "indication" };
  const has = { prior_image: about.views.includes("prior"), prior_report: !!about.prior_report, lateral: about.views.includes("lateral"), indication: !!about.indication };
  $("parts").replaceChildren(...PARTS.map((part) => {
    const label = el("label"), box = el("input", null, { type: "checkbox" });
    box.disabled = !has[part];
    box.onchange = () => { remember(); state.without = box.checked ? [...state.without, part] : state.without.filter((p) => p !== part); };
    label.append(box, names[part]);
    return label;
  }));
  $("before").textContent = $("after").textContent = ""; $("facts").replaceChildren(); $("why").replaceChildren(); $("afterhead").hidden = true;
  await drawRadiograph();
}

const pictures = new Map();
async function drawRadiograph() {
  const id = state.about.id, view = state.view, key = `${id}\n${view}`;
  if (!pictures.has(key)) {
    if (pictures.size > 12) { for (const url of pictures.values()) URL.revokeObjectURL(url); pictures.clear(); }
    pictures.set(key, URL.createObjectURL(await (await call(`api/image?${query({ id, view })}`)).blob()));
  }
  if (state.about.id !== id || state.view !== view) return;
  $("image").src = pictures.get(key);
  $("image").alt = `${view} image of study ${id}`;
  [...$("views").children].forEach((button) => button.setAttribute("aria-pressed", button.textContent === view));
  drawOverlay();
}

const shape = () => state.grids[state.view] || [1, 1];
function mask() {
  const [rows, cols] = shape();
  return (state.masks[state.view] ||= new Array(rows * cols).fill(0));
}
function drawOverlay() {
  const [rows, cols] = shape(), canvas = $("overlay");
  canvas.width = cols; canvas.height = rows;
  const context = canvas.getContext("2d"), pixels = context.createImageData(cols, rows);
  const values = new Array(rows * cols).fill(0), painted = state.masks[state.view] || [];
  const map = state.overlay && state.overlay.views[state.view];
  if (map) for (const [i, v] of map) values[i] = v;
  const top = Math.max(1e-9, ...values);
  values.forEach((v, i) => {
    if (painted[i]) pixels.data.set([56, 189, 248, 120], 4 * i);
    if (v > 0) pixels.data.set([249, 115, 22, Math.round(210 * v / top)], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
  const count = painted.filter(Boolean).length;
  $("maplabel").textContent = [state.overlay ? state.overlay.label : "", count ? `${count} of ${rows * cols} patches painted.` : ""].join(" ").trim();
  const cursor = $("cursor");
  cursor.hidden = $("grid").hidden = !state.painting;
  $("grid").style.backgroundSize = `${100 / cols}% ${100 / rows}%`;
  Object.assign(cursor.style, { left: `${100 * state.cursor[1] / cols}%`, top: `${100 * state.cursor[0] / rows}%`, width: `${100 / cols}%`, height: `${100 / rows}%` });
}
function paintAt(row, col) {
  const [rows, cols] = shape(), reach = Number($("size").value), values = mask();
  for (let r = row - reach; r <= row + reach; r += 1) for (let c = col - reach; c <= col + reach; c += 1) {
    if (r >= 0 && c >= 0 && r < rows && c < cols) values[r * cols + c] = state.painting === "erase" ? 0 : 1;
  }
  state.overlay = null;
  $("place").value = "painted";
  drawOverlay();
}
function brush(kind) {
  state.painting = state.painting === kind ? null : kind;
  $("brush").setAttribute("aria-pressed", state.painting === "brush");
  $("erase").setAttribute("aria-pressed", state.painting === "erase");
  drawOverlay();
}
function pointer(event) {
  if (!state.painting || !(event.buttons & 1)) return;
  const box = $("radiograph").getBoundingClientRect(), [rows, cols] = shape();
  const at = (v, n) => Math.min(n - 1, Math.max(0, Math.floor(v * n)));
  state.cursor = [at((event.clientY - box.top) / box.height, rows), at((event.clientX - box.left) / box.width, cols)];
  paintAt(...state.cursor);
}
$("radiograph").onpointerdown = (event) => { if (state.painting) { $("radiograph").setPointerCapture(event.pointerId); remember(); pointer(event); } };
$("radiograph").onpointermove = pointer;
$("radiograph").onkeydown = (event) => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!state.painting || (!step && event.key !== " ")) return;
  event.preventDefault();
  if (!step) { remember(); paintAt(...state.cursor); return; }
  const [rows, cols] = shape();
  state.cursor = [Math.min(rows - 1, Math.max(0, state.cursor[0] + step[0])), Math.min(cols - 1, Math.max(0, state.cursor[1] + step[1]))];
  drawOverlay();
};
$("brush").onclick = () => brush("brush");
$("erase").onclick = () => brush("erase");
$("clear").onclick = () => { remember(); state.masks[state.view] = undefined; drawOverlay(); };

// ---------------------------------------------------------------- latents and sliders
let searching = 0;
async function search() {
  const mine = ++searching;
  let rows = [];
  try { rows = await getJSON(`api/latents?${query({ q: $("search").value })}`); } catch (error) { problem(error.message); return; }
  if (mine !== searching) return;
  $("found").replaceChildren(...(rows.length ? rows : [null]).map((row) => {
    const item = el("li");
    if (!row) { item.append(el("span", "No latent matches.", { class: "hint" })); return item; }
    const score = row.f1 === undefined ? "" : `${row.finding.replaceAll("_", " ")}, F1 ${row.f1.toFixed(2)}`;
    const button = el("button", null, { type: "button", title: [row.name, score, row.tokens && `raises ${row.tokens}`, row.status].filter(Boolean).join(" · ") });
    button.append(el("span", `${row.latent}  ${row.name || score || "unnamed"}`, { class: "name" }));
    button.onclick = () => { remember(); addSlider(row.latent, row.name || score); showMap(row.latent); };
    item.append(button);
    return item;
  }));
}
function addSlider(latent, name, strength = 1) {
  state.names[latent] = name;
  if (!state.sliders.some((one) => one.latent === latent)) state.sliders.push({ latent, name, strength });
  drawSliders();
}
function drawSliders() {
  $("sliders").replaceChildren(...state.sliders.map((one) => {
    const box = el("div", null, { class: "slider" }), head = el("div", null, { class: "row" });
    const label = el("span", `${one.latent} ${one.name || ""}`, { class: "name", title: one.name || "" }), value = el("output", `${one.strength.toFixed(1)} p99`);
    const remove = el("button", "Remove", { type: "button", "aria-label": `Remove latent ${one.latent}` });
    const range = el("input", null, { type: "range", min: -10, max: 10, step: 0.1, "aria-label": `Strength of latent ${one.latent} in p99` });
    range.value = one.strength;
    range.onpointerdown = range.onkeydown = () => remember();
    range.oninput = () => { one.strength = Number(range.value); value.textContent = `${one.strength.toFixed(1)} p99`; };
    remove.onclick = () => { remember(); state.sliders = state.sliders.filter((other) => other !== one); drawSliders(); };
    head.append(label, value, remove);
    box.append(head, range);
    return box;
  }));
}
async function showMap(latent) {
  let found;
  try { found = await getJSON(`api/latent?${query({ id: latent, view: state.view })}`); } catch (error) { problem(error.message); return; }
  if (!found.map) return;
  const [rows, cols] = shape();
  if (found.map.rows !== rows || found.map.cols !== cols) return;
  state.overlay = { views: { [state.view]: found.map.values.map((v, i) => [i, v]) }, label: `Mean map of latent ${latent}.` };
  drawOverlay();
}

// ---------------------------------------------------------------- runs
function spec(control) {
  const [rows, cols] = shape(), painted = state.masks[state.view] || [], place = $("place").value;
  const grid = place === "painted" ? Array.from({ length: rows }, (_, r) => painted.slice(r * cols, (r + 1) * cols)) : [];
  return {
    study: state.about.id, without: state.without, sliders: state.sliders.map((one) => [one.latent, one.strength]), place,
    view: state.view, grid: painted.length ? grid : [], control_seed: control ? state.seed++ : null, max_new_tokens: null,
  };
}
const run = (wanted) => exclusively(async (signal) => {
  $("afterhead").hidden = true; $("after").textContent = ""; $("facts").replaceChildren(); $("why").replaceChildren();
  const began = performance.now();
  const result = await stream("api/run", { spec: wanted }, signal, progress);
  result.seconds = (performance.now() - began) / 1000;
  state.history.push(result);
  drawHistory();
  if (state.about.id === wanted.study) show(result);
});
function reportInto(node, side, pieces, marked) {
  node.replaceChildren();
  // Runs of words, cut at sentence borders, so that a sentence is one button.
  const spans = side.sentences.length ? side.sentences : [[0, side.text.length]];
  const marks = [];
  let at = 0;
  for (const [text, changed] of pieces || [[side.text, false]]) { marks.push([at, at + text.length, changed]); at += text.length; }
  let end = 0;
  spans.forEach(([from, to], number) => {
    if (from > end) node.append(side.text.slice(end, from));
    const button = el("button", null, { type: "button", "aria-label": `Sentence ${number + 1}: ${side.text.slice(from, to)}` });
    for (const [a, b, changed] of marks) {
      const text = side.text.slice(Math.max(a, from), Math.min(b, to));
      if (a < to && b > from && text) button.append(changed ? el(marked === "gone" ? "del" : "ins", text, { class: marked }) : text);
    }
    button.onclick = () => explain(side, number);
    node.append(button);
    end = to;
  });
  if (end < side.text.length) node.append(side.text.slice(end));
}
function show(result) {
  state.shown = result;
  const { before, after } = result;
  reportInto($("before"), before, result.pieces && result.pieces[0], "gone");
  $("afterhead").hidden = !after;
  $("afterhead").textContent = result.spec.control_seed === null ? "Steered report" : "Report under a random direction of equal norm";
  if (after) reportInto($("after"), after, result.pieces[1], "new");
  else $("after").textContent = "";
  const labels = [...new Set([...before.labels, ...(after ? after.labels : [])])].sort();
  const table = el("table"), head = el("tr");
  for (const text of ["", "before", ...(after ? ["after"] : [])]) head.append(el("th", text, { scope: "col" }));
  table.append(head);
  const row = (name, ...cells) => { const line = el("tr"); line.append(el("th", name, { scope: "row" }), ...cells.slice(0, after ? 2 : 1).map((c) => el("td", c))); table.append(line); };
  row("perplexity under the unsteered model", number(before.perplexity, 2), after && number(after.perplexity, 2));
  for (const label of labels) row(label.replaceAll("_", " "), before.labels.includes(label) ? "present" : "–", after && after.labels.includes(label) ? "present" : "–");
  $("facts").replaceChildren(el("h2", "Findings read from the reports"), table);
  if (after && after.effect) $("facts").append(el("p", `${after.effect.changed} positions changed, by ${number(100 * after.effect.ratio, 1)} % of their norm on average. Findings by ${before.reader}.`, { class: "hint" }));
  if (result.seconds) $("facts").append(el("p", `${result.seconds.toFixed(2)} s`, { class: "hint", id: "seconds" }));
}
function drawHistory() {
  $("history").replaceChildren(...state.history.map((result, i) => {
    const item = el("li"), s = result.spec;
    const what = s.control_seed !== null ? "random direction" : s.sliders.map(([j, x]) => `${j} × ${x}`).join(", ") || "unsteered";
    const button = el("button", `${i + 1}. ${s.study}: ${what}, ${s.place}${s.without.length ? `, without ${s.without.join(", ").replaceAll("_", " ")}` : ""}`, { type: "button" });
    button.onclick = () => restore(result);
    item.append(button);
    return item;
  }));
}
async function restore(result) {
  problem(null);
  try { await apply(result.spec); } catch (error) { problem(error.message); return; }
  if (result.before && result.before.sentences) show(result);
  else showTexts(result);
}
// Texts of an opened session: without labels and numbers, which a new run gives.
function showTexts(result) {
  state.shown = null;
  $("facts").replaceChildren(); $("why").replaceChildren();
  $("before").textContent = result.before ? result.before.text : "";
  $("after").textContent = result.after ? result.after.text : "";
  $("afterhead").hidden = !result.after;
}
async function apply(s, masks) {
  if (!state.about || s.study !== state.about.id) await choose(s.study);
  state.sliders = s.sliders.map(([latent, strength]) => ({ latent, strength, name: state.names[latent] || "" }));
  state.without = [...s.without]; state.view = s.view; state.overlay = null;
  [...$("parts").querySelectorAll("input")].forEach((box, i) => { box.checked = state.without.includes(PARTS[i]); });
  state.masks = masks || (s.grid.length ? { [s.view]: s.grid.flat() } : {});
  $("place").value = s.place;
  drawSliders();
  await drawRadiograph();
}
const remember = () => { if (state.about) { state.undo.push(structuredClone({ spec: spec(false), masks: state.masks })); if (state.undo.length > 50) state.undo.shift(); } };
$("undo").onclick = () => { const last = state.undo.pop(); if (last) apply(last.spec, last.masks).catch((error) => problem(error.message)); };
$("place").onpointerdown = $("place").onkeydown = () => remember();
$("run").onclick = () => run(spec(false));
$("control").onclick = () => run(spec(true));
$("cancel").onclick = () => state.running && state.running.abort();

// ---------------------------------------------------------------- attribution
const explain = (side, which) => exclusively(async (signal) => {
  const shown = state.shown, wanted = { ...shown.spec, sliders: [], place: "everywhere", grid: [], control_seed: null };
  const found = await stream("api/explain", { spec: wanted, text: side.text, sentence: which }, signal, progress);
  if (state.about.id !== wanted.study) return;
  const views = found.map || {};
  state.overlay = { views, label: `Attribution of: ${found.text}` };
  if (!views[state.view]) { const first = Object.keys(views)[0]; if (first) { state.view = first; await drawRadiograph(); } }
  drawOverlay();
  const table = el("table"), head = el("tr");
  for (const [text, kind] of [["latent", ""], ["name", ""], ["share", "n"], ["", ""]]) head.append(el("th", text, { scope: "col", class: kind }));
  table.append(head);
  for (const one of found.latents) {
    const line = el("tr"), cell = el("td"), add = el("button", "Add", { type: "button", "aria-label": `Add latent ${one.latent}` });
    add.onclick = () => { remember(); addSlider(one.latent, one.name, -1); };
    cell.append(add);
    line.append(el("td", String(one.latent)), el("td", one.name || ""), el("td", `${number(100 * one.share, 1)} %`, { class: "n" }), cell);
    table.append(line);
  }
  const nodes = [el("h2", "Why this sentence?"), el("p", found.text), table];
  if (side !== shown.before) nodes.push(el("p", "Attribution of this text under the unsteered model.", { class: "hint" }));
  if (found.check) {
    const c = found.check, good = !c.problems.length;
    nodes.push(el("p", good ? `Check passed: without the ${c.n} strongest entries the sentence loses ${number(c.drop, 2)} nats, without ${c.n} random ones of equal norm ${number(c.random, 2)}.` : `Do not rely on this attribution: ${c.problems.join("; ")}.`, { class: good ? "ok" : "bad" }));
  }
  $("why").replaceChildren(...nodes);
});

// ---------------------------------------------------------------- files
async function add(file) {
  problem(null);
  try {
    const { id } = await (await call(`api/upload?${query({ indication: $("indication").value })}`, { method: "POST", body: file })).json();
    await refresh(id);
  } catch (error) { problem(error.message); }
}
$("file").onchange = () => { if ($("file").files[0]) add($("file").files[0]); };
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => { event.preventDefault(); if (event.dataTransfer.files[0]) add(event.dataTransfer.files[0]); });
function save(name, text) {
  const link = el("a", null, { href: URL.createObjectURL(new Blob([text])), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
$("export").onclick = async () => {
  problem(null);
  try {
    const history = state.history.map((r) => ({ spec: r.spec, before: r.before && r.before.text, after: r.after && r.after.text }));
    const wanted = state.shown ? state.shown.spec : spec(false);
    const answer = await (await call("api/export", { method: "POST", body: JSON.stringify({ spec: wanted, history }) })).json();
    for (const [name, text] of Object.entries(answer.files)) save(name, text);
    state.exported = answer.files;
    const missing = (answer.files["run.py"].match(/^# Fill in: .*$/gm) || []).map((line) => line.slice(2)).join(" ");
    status(missing ? `Exported. ${missing}` : answer.texts_left_out ? `Exported without the texts of ${answer.texts_left_out} runs, whose studies are not public.` : "Exported.");
  } catch (error) { problem(error.message); }
};
$("session").onchange = async () => {
  problem(null);
  try {
    const session = JSON.parse(await $("session").files[0].text());
    if (session.format !== "workbench-1") throw new Error("This file is not a session of the workbench.");
    const text = (value) => (value ? { text: String(value) } : null);
    state.history = session.history.map((entry) => ({ spec: entry.spec, before: text(entry.before), after: text(entry.after) }));
    drawHistory();
    await apply(session.spec);
  } catch (error) { problem(error.message); }
};

// ---------------------------------------------------------------- start
async function refresh(chosen) {
  const overview = await getJSON("api/overview");
  state.studies = overview.studies;
  $("about").textContent = `${overview.d_sae} latents at ${overview.hook}`;
  $("study").replaceChildren(...overview.studies.map((one) => el("option", one.id, { value: one.id })));
  await choose(chosen || overview.studies[0].id);
}
$("study").onchange = () => choose($("study").value).catch((error) => problem(error.message));
let typing;
$("search").oninput = () => { clearTimeout(typing); typing = setTimeout(search, 150); };
globalThis.workbench = state;  // to be looked at in the browser's console
try { await refresh(); await search(); } catch (error) { problem(error.message); }
