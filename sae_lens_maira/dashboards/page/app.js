// The index: columns, filters, sorting, a list that draws only the rows in sight, routes and keys.
// Everything that comes from data reaches the page through textContent.
"use strict";

const page = { about: null, columns: null, tables: null, rows: [], at: 0, heads: [], sort: "score", down: true, started: 0, ready: 0 };
const PRINTED = 200; // rows of the index on paper
const $ = (id) => document.getElementById(id);

// Key, title, kind of cell, width, one line of help.
const HEADS = [
  ["latent", "Latent", "number", "4.5em", "Number of the latent in the SAE."],
  ["name", "Name", "name", "minmax(12em, 1fr)", "Explanation with the best score; without one, an arrow and the output tokens that the latent raises most."],
  ["category", "Category", "word", "7em", "Category that the explainer gave, such as pathology or device."],
  ["level", "Level", "number", "3.6em", "Level of the Matryoshka SAE: 0 is the coarsest."],
  ["text", "Text density", "number", "6.5em", "Share of the text positions read at which the latent fires."],
  ["image", "Image density", "number", "7.2em", "Share of the image positions read at which the latent fires."],
  ["max", "Max", "number", "4.2em", "Largest activation in the studies read."],
  ["finding", "Best finding", "finding", "13em", "Finding with the highest F1, and the positions at which it was measured."],
  ["f1", "F1", "number", "3.6em", "Agreement between firing in a study and the best finding; 1 is perfect."],
  ["score", "Score", "number", "4.2em", "Balanced accuracy of the explanation on examples it was not made from; 0.5 is chance."],
  ["control", "Control", "number", "4.8em", "The same score with the explanation of another latent: what the examples alone give away."],
];

function element(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (key === "text") node.textContent = value;
    else if (key === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (key === "className") node.className = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(digits)));
}

function words(key) { return key.replaceAll("_", " "); }

function saeIndex(data) {
  page.started = performance.now();
  Object.assign(page, data);
  const { columns, tables } = page;
  columns.haystack = columns.latent.map((latent, i) => [
    latent, columns.name[i], columns.words[i], words(tables.finding[columns.finding[i]] || ""),
    tables.category[columns.category[i]] || ""].join(" ").toLowerCase());
  page.place = new Map(columns.latent.map((latent, i) => [latent, i]));
  page.refinedBy = new Map();
  columns.refines.forEach((coarser, i) => coarser.forEach(([latent, value]) => {
    if (!page.refinedBy.has(latent)) page.refinedBy.set(latent, []);
    page.refinedBy.get(latent).push([columns.latent[i], value]);
  }));
  // Columns without a value are empty and would take space from the names.
  const known = (value) => value !== null && value !== "" && value !== -1;
  page.heads = HEADS.filter(([key]) => key === "name" || columns[key].some(known));
  page.places = new Set(columns.at.filter(Boolean)).size;
  const sorts = ["score", "f1", "latent"].find((key) => columns[key].some(known));
  Object.assign(page, { sort: sorts, down: sorts !== "latent" });
  document.documentElement.style.setProperty("--grid", page.heads.map((head) => head[3]).join(" "));
  $("help").replaceChildren(...page.heads.flatMap(([, title, , , help]) => [element("dt", { text: title }), element("dd", { text: help })]));
  fillFilters();
  drawBanners();
  drawHead();
  refresh();
  route();
  page.ready = performance.now();
}

function shareable(licence) { return licence === "public" || licence === "synthetic"; }

function drawBanners() {
  const { about } = page;
  $("origin").textContent = `${about.model} · ${about.hook} · ${about.d_sae.toLocaleString("en")} latents · ${about.control} SAE · ${about.studies.toLocaleString("en")} studies`;
  const banner = (className, text) => $("banners").append(element("p", { className, role: "note", text }));
  if (about.phantom) banner("banner phantom", "Test bench: synthetic radiographs and a small trained phantom of the model. Nothing here says anything about medicine.");
  if (about.control !== "trained") banner("banner control", `A control, not a result: these latents are those of ${about.control === "raw" ? "raw residual dimensions" : "an " + about.control + " SAE"}.`);
  if (!shareable(about.licence)) banner("banner credentialed", `${about.licence === "credentialed" ? "Credentialed data" : `Data of an unknown licence (${about.licence})`}: this folder contains text of studies under a data use agreement${about.images ? " and their images" : "; images are left out"}. Keep it where the studies are kept.`);
}

function fillFilters() {
  const { columns, tables } = page;
  const fill = (id, entries) => $(id).replaceChildren(element("option", { value: "", text: "any" }), ...entries.map(([value, text]) => element("option", { value, text })));
  const sorted = (table) => table.map((word, i) => [i, words(word)]).sort((a, b) => a[1].localeCompare(b[1]));
  fill("finding", sorted(tables.finding));
  fill("category", sorted(tables.category));
  fill("level", [...new Set(columns.level)].sort((a, b) => a - b).map((level) => [level, String(level)]));
  for (const control of $("filters").elements) control.addEventListener("input", refresh);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
}

function drawHead() {
  $("head").replaceChildren(...page.heads.map(([key, title, kind, , help]) => element("span", {
    role: "columnheader", className: kind, "aria-sort": page.sort !== key ? "none" : page.down ? "descending" : "ascending",
  }, element("button", { type: "button", "data-sort": key, "aria-label": `Sort by ${title}`, title: help, text: title + (page.sort !== key ? "" : page.down ? " ↓" : " ↑"), on: { click: () => {
    page.down = page.sort === key ? !page.down : !["latent", "name", "category", "level", "finding"].includes(key);
    page.sort = key;
    drawHead();
    refresh();
    $("head").querySelector(`[data-sort="${key}"]`).focus();
  } } }))));
}

function refresh() {
  const { columns, tables } = page;
  const asked = (id) => ($(id).value === "" ? null : Number($(id).value));
  const terms = $("query").value.toLowerCase().split(/\s+/).filter(Boolean);
  const [finding, category, level, low, high, score] = ["finding", "category", "level", "low", "high", "score"].map(asked);
  const kind = $("kind").value, hidden = $("dead").checked;
  let dead = 0;
  const rows = [];
  for (let i = 0; i < columns.latent.length; i++) {
    if (finding !== null && columns.finding[i] !== finding) continue;
    if (category !== null && columns.category[i] !== category) continue;
    if (level !== null && columns.level[i] !== level) continue;
    const density = kind ? columns[kind][i] ?? 0 : Math.max(columns.text[i] ?? 0, columns.image[i] ?? 0);
    if (kind && density === 0) continue;
    if (low !== null && density < low) continue;
    if (high !== null && density > high) continue;
    if (score !== null && (columns.score[i] === null || columns.score[i] < score)) continue;
    if (!terms.every((term) => columns.haystack[i].includes(term))) continue;
    if (hidden && tables.status[columns.status[i]] === "dead") { dead++; continue; }
    rows.push(i);
  }
  page.rows = sortRows(rows);
  page.at = 0;
  $("scroll").scrollTop = 0;
  $("count").textContent = `${rows.length.toLocaleString("en")} of ${columns.latent.length.toLocaleString("en")} latents${dead ? `, ${dead.toLocaleString("en")} dead hidden` : ""}`;
  $("table").setAttribute("aria-rowcount", rows.length + 1);
  drawRows();
}

function sortRows(rows) {
  const { sort, down, columns, tables } = page;
  const column = columns[sort];
  const table = sort === "finding" || sort === "category" ? tables[sort] : null;
  const key = table ? (i) => table[column[i]] ?? null : (i) => (column[i] === "" ? null : column[i]);
  const sign = down ? -1 : 1;
  // What is not known comes last in both directions.
  return rows.map((i) => [key(i), i]).sort(([a, i], [b, j]) => {
    if (a === null || b === null) return a === b ? i - j : a === null ? 1 : -1;
    return a < b ? -sign : a > b ? sign : i - j;
  }).map(([, i]) => i);
}

function rowHeight() { return Math.round(2.6 * parseFloat(getComputedStyle(document.documentElement).fontSize)); }

function drawRows() {
  const { columns, tables, rows } = page, height = rowHeight(), scroll = $("scroll");
  const shown = page.printing ? Math.min(rows.length, PRINTED) : rows.length;
  $("space").style.height = `${shown * height}px`;
  const first = page.printing ? 0 : Math.max(0, Math.floor(scroll.scrollTop / height) - 6);
  const last = page.printing ? shown : Math.min(rows.length, first + Math.ceil((scroll.clientHeight || 600) / height) + 12);
  const drawn = [];
  for (let n = first; n < last; n++) {
    const i = rows[n], latent = columns.latent[i], status = tables.status[columns.status[i]];
    const cell = (kind, text, title) => element("span", { role: "gridcell", className: kind, text, ...(title ? { title } : {}) });
    const name = columns.name[i] || (status === "dead" ? "dead" : columns.words[i] ? `↑ ${columns.words[i]}` : "");
    const finding = tables.finding[columns.finding[i]];
    const cells = {
      latent: () => element("span", { role: "gridcell", className: "number" }, element("a", { href: `#/latent/${latent}`, tabindex: "-1", text: latent })),
      name: () => cell("name", name, name),
      category: () => cell("word", tables.category[columns.category[i]] || ""),
      level: () => cell("number", columns.level[i]),
      finding: () => cell("finding", finding ? words(finding) + (page.places > 1 ? ` (${columns.at[i] === "i" ? "image" : "text"})` : "") : "", finding && words(finding)),
      score: () => cell("number strong", number(columns.score[i])),
      control: () => cell("number faint", number(columns.control[i])),
    };
    const row = element("div", { role: "row", className: `row ${status}${n === page.at ? " here" : ""}${columns.name[i] ? "" : " unnamed"}`, "aria-rowindex": n + 2, "aria-selected": String(n === page.at), "data-latent": latent, on: { click: () => { page.at = n; open(latent); } } },
      ...page.heads.map(([key]) => (cells[key] || (() => cell("number", number(columns[key][i]))))()));
    row.style.top = `${n * height}px`;
    row.style.height = `${height}px`;
    drawn.push(row);
  }
  $("space").replaceChildren(...drawn);
}

function move(step) {
  if (!page.rows.length) return;
  page.at = Math.max(0, Math.min(page.rows.length - 1, page.at + step));
  const height = rowHeight(), scroll = $("scroll"), top = page.at * height;
  if (top < scroll.scrollTop) scroll.scrollTop = top;
  if (top + height > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = top + height - scroll.clientHeight;
  drawRows();
}

function open(latent) { location.hash = `#/latent/${latent}`; }

function route() {
  const found = location.hash.match(/^#\/latent\/(\d+)$/), latent = found ? Number(found[1]) : null;
  $("index").hidden = latent !== null;
  $("latent").hidden = latent === null;
  if (latent === null) {
    document.title = "Latents";
    move(0);
    $("scroll").focus({ preventScroll: true });
    return;
  }
  const place = page.rows.indexOf(page.place.get(latent));
  if (place >= 0) page.at = place;
  document.title = `Latent ${latent}`;
  scrollTo(0, 0);
  loadLatent(latent);
}

function step(by) {
  const next = page.rows[page.at + by];
  if (next !== undefined) { page.at += by; open(page.columns.latent[next]); }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  try { localStorage.setItem("theme", theme); } catch { /* a browser may refuse storage to files */ }
}

function otherTheme() { setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); }

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName), reading = !$("latent").hidden;
  if (event.key === "Escape") {
    if (reading) location.hash = "#/";
    else if (typing) $("scroll").focus();
    else if ($("query").value) { $("query").value = ""; refresh(); }
    return;
  }
  if (typing && !(event.target.id === "query" && ["ArrowDown", "Enter"].includes(event.key))) return;
  if (event.target.tagName === "BUTTON" && event.key === "Enter") return;
  const act = {
    "/": () => { if (reading) location.hash = "#/"; setTimeout(() => $("query").select(), 0); },
    t: otherTheme,
    ...(reading
      ? { j: () => step(1), k: () => step(-1), ArrowRight: () => step(1), ArrowLeft: () => step(-1) }
      : { j: () => move(1), k: () => move(-1), ArrowDown: () => { $("scroll").focus(); move(typing ? 0 : 1); }, ArrowUp: () => move(-1), PageDown: () => move(15), PageUp: () => move(-15), Home: () => move(-Infinity), End: () => move(Infinity), ArrowRight: () => openHere(), Enter: () => openHere() }),
  }[event.key];
  if (act && !(event.target.tagName === "SUMMARY" && event.key === "Enter")) { event.preventDefault(); act(); }
});

function openHere() { if (page.rows.length) open(page.columns.latent[page.rows[page.at]]); }

$("scroll").addEventListener("scroll", drawRows, { passive: true });
$("theme").addEventListener("click", otherTheme);
addEventListener("hashchange", route);
addEventListener("resize", () => { if (page.columns) drawRows(); });
// Paper shows what is open, and of the index its first rows.
for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) addEventListener(event, () => { page.printing = printing; if (page.columns) drawRows(); });
try { setTheme(localStorage.getItem("theme") || "dark"); } catch { setTheme("dark"); }
