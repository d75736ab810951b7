"use strict";
const data = JSON.parse(document.getElementById("content").textContent);
const $ = (id) => document.getElementById(id);
const NAMES = {
  class: "confused class", box: "badly placed", both: "class and place", twice: "found twice", background: "background", missed: "missed",
};
const MEANING = {
  class: "IoU ≥ 0.5 with an object of another class", box: "IoU 0.1 to 0.5 with an object of its class", both: "overlaps an object, but neither class nor place is right",
  twice: "its object is found by a better prediction", background: "IoU below 0.1 with every object", missed: "no prediction finds the object, nor would without its error",
};
const SUSPECTS = { class: "another class?", box: "badly placed label?", invented: "no such object?", missing: "label missing?" };
const MARKS = { wrong: "label is wrong", right: "label is right", unsure: "unsure" };
const VIEWS = { suspects: "Suspected labels", errors: "Errors", images: "Images" };
const SORTS = {
  suspects: { rate: "most suspicious", size: "largest", name: "image name" },
  errors: { score: "highest score", size: "largest", name: "image name" },
  images: { errors: "most errors", rate: "most suspicious", name: "image name" },
};
const SMALL = 32 ** 2, LARGE = 96 ** 2, PAGE = 60, FOUND_BY = ["hit", "class", "box"];
const many = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : /[sx]$/.test(word) ? "es" : "s"}`;
const state = { view: data.suspects.length ? "suspects" : "errors", threshold: data.threshold, kind: "", class: "", size: "", marked: "", sort: "", search: "", truths: true, founds: true };
let shown = [], drawn = 0, at = -1, enlarged = -1, whole = false;

// ---- marks: kept by the browser where it allows that
const KEY = `detr_exp-review-${data.mark}`;
let marks = {}, keeps = true;
try { marks = JSON.parse(localStorage.getItem(KEY) || "{}"); } catch { keeps = false; }
function setMark(key, mark) {
  if (mark && marks[key] !== mark) marks[key] = mark; else delete marks[key];
  try { localStorage.setItem(KEY, JSON.stringify(marks)); } catch { keeps = false; }
  notes();
}

// ---- items: suspects, errors at a threshold, images
const box = (row, start) => row.slice(start, start + 4);
function item(image, kind, object, found, more) {
  const label = object >= 0 ? image.objects[object] : null, made = found >= 0 ? image.found[found] : null;
  const where = label ? box(label, 1) : made ? box(made, 2) : [0, 0, ...image.size];
  const key = object >= 0 ? `${image.id}/label${object}` : found >= 0 ? `${image.id}/prediction${found}` : `${image.id}`;
  return { image, kind, object, found, label, made, where, key, area: where[2] * where[3], score: made ? made[1] : 0, ...more };
}
const foundAt = (image, threshold) => image.found.filter((one) => one[1] >= threshold);
function missedAt(image, threshold) {
  const has = new Set(foundAt(image, threshold).filter((one) => FOUND_BY.includes(one[6])).map((one) => one[7]));
  return image.objects.map((_, place) => place).filter((place) => !has.has(place));
}
const suspects = data.suspects.map(([place, kind, rate, object, found]) => {
  const image = data.images[place];
  return item(image, kind, object, found < image.found.length ? found : -1, { rate });
});
const worst = new Map();
for (const one of suspects) if (!worst.has(one.image)) worst.set(one.image, one.rate);
function errors(threshold) {
  const made = [];
  for (const image of data.images) {
    image.found.forEach((one, place) => {
      if (one[1] >= threshold && !["hit", "ignored"].includes(one[6])) made.push(item(image, one[6], one[6] === "background" ? -1 : one[7], place));
    });
    for (const place of missedAt(image, threshold)) made.push(item(image, "missed", place, -1));
  }
  return made;
}
const short = (name) => name.split("/").slice(-2).join("/");
const className = (label) => data.classes[label][0];
const classesOf = (one) => [one.label && one.label[0], one.made && one.made[0]].filter((label) => label !== null);
const sizeOf = (area) => (area < SMALL ? "small" : area < LARGE ? "medium" : "large");

// ---- what is shown
let current = { threshold: null, errors: [] };
function errorsNow() {
  if (current.threshold !== state.threshold) current = { threshold: state.threshold, errors: errors(state.threshold) };
  return current.errors;
}
function select() {
  const { view, kind, size, marked } = state, label = state.class === "" ? null : Number(state.class), search = state.search.toLowerCase();
  const all = view === "suspects" ? suspects : view === "errors" ? errorsNow() : data.images.map((image) => item(image, "image", -1, -1));
  const byImage = new Map();
  if (view === "images") for (const one of errorsNow()) byImage.set(one.image, [...(byImage.get(one.image) || []), one]);
  const holds = (one) => {
    if (search && !one.image.name.toLowerCase().includes(search)) return false;
    const mark = marks[one.key];
    if (marked === "none" ? mark : marked === "any" ? !mark : marked && mark !== marked) return false;
    if (view !== "images") return (!kind || one.kind === kind) && (label === null || classesOf(one).includes(label)) && (!size || sizeOf(one.area) === size);
    const objects = [...one.image.objects.map((row) => [row[0], row[3] * row[4]]), ...foundAt(one.image, state.threshold).map((row) => [row[0], row[4] * row[5]])];
    return (!kind || (byImage.get(one.image) || []).some((error) => error.kind === kind)) && (label === null || objects.some((row) => row[0] === label)) && (!size || objects.some((row) => sizeOf(row[1]) === size));
  };
  const orders = {
    rate: (a, b) => (a.rate ?? worst.get(a.image) ?? 1) - (b.rate ?? worst.get(b.image) ?? 1), score: (a, b) => b.score - a.score, size: (a, b) => b.area - a.area,
    errors: (a, b) => (byImage.get(b.image) || []).length - (byImage.get(a.image) || []).length, name: (a, b) => a.image.name.localeCompare(b.image.name, undefined, { numeric: true }),
  };
  for (const one of all) if (view === "images") one.count = (byImage.get(one.image) || []).length;
  return all.filter(holds).sort(orders[state.sort] || (() => 0));
}
function options(element, pairs, value) {
  element.replaceChildren(...pairs.map(([name, text]) => Object.assign(document.createElement("option"), { value: name, textContent: text })));
  element.value = pairs.some(([name]) => String(name) === String(value)) ? value : pairs[0][0];
  return element.value;
}
function refresh() {
  const kinds = {}, names = state.view === "suspects" ? SUSPECTS : NAMES;
  for (const one of state.view === "suspects" ? suspects : errorsNow()) kinds[one.kind] = (kinds[one.kind] || 0) + 1;
  state.kind = options($("kind"), [["", "all"], ...Object.entries(names).map(([name, text]) => [name, `${text} (${kinds[name] || 0})`])], state.kind);
  state.sort = options($("sort"), Object.entries(SORTS[state.view]), state.sort);
  for (const button of document.querySelectorAll("[data-view]")) {
    const view = button.dataset.view, number = { suspects: suspects.length, errors: errorsNow().length, images: data.images.length }[view];
    button.textContent = `${VIEWS[view]} ${number.toLocaleString("en")}`;
    button.setAttribute("aria-pressed", view === state.view);
  }
  $("score").textContent = state.threshold.toFixed(2);
  $("truths").setAttribute("aria-pressed", state.truths);
  $("founds").setAttribute("aria-pressed", state.founds);
  shown = select();
  facts();
  notes();
  table();
  $("grid").replaceChildren();
  drawn = 0;
  more();
  if (!shown.length) $("grid").append(empty());
}
function empty() {
  const text = (() => {
    if (!data.images.length) return "There are no images.";
    const filtered = ["kind", "class", "size", "marked", "search"].some((name) => state[name] !== "");
    if (filtered) return "Nothing passes these filters.";
    if (state.view === "suspects") return "No label is suspicious: where labels and predictions differ, they differ as often elsewhere.";
    return "No errors from this score on.";
  })();
  const made = Object.assign(document.createElement("p"), { className: "empty", textContent: text });
  if (data.images.length && text.includes("filters")) {
    const button = Object.assign(document.createElement("button"), { textContent: "Show all", id: "reset" });
    button.onclick = () => { Object.assign(state, { kind: "", class: "", size: "", marked: "", search: "" }); for (const id of ["class", "size", "marked", "search"]) $(id).value = ""; refresh(); };
    made.append(document.createElement("br"), button);
  }
  return made;
}
function facts() {
  const objects = data.images.reduce((sum, image) => sum + image.objects.length, 0);
  const counted = data.images.flatMap((image) => foundAt(image, state.threshold)).filter((one) => one[6] !== "ignored"), hits = counted.filter((one) => one[6] === "hit").length;
  const share = (part, all) => (all ? (part / all).toFixed(3) : "–");
  const rows = [
    [many(data.images.length, "image"), data.all_images > data.images.length ? `of ${data.all_images.toLocaleString("en")}` : data.split], [many(objects, "object"), many(data.classes.length, "class")],
    [data.ap50 === null ? "–" : data.ap50.toFixed(3), "AP50, all scores"], [share(hits, counted.length), `precision from ${state.threshold.toFixed(2)}`],
    [share(hits, objects), "recall"], [share(2 * hits, counted.length + objects), "F1"],
  ];
  $("facts").replaceChildren(...rows.map(([value, text]) => {
    const tile = document.createElement("div");
    tile.append(Object.assign(document.createElement("b"), { textContent: value }), Object.assign(document.createElement("span"), { className: "soft small", textContent: text }));
    return tile;
  }));
  const number = Object.keys(marks).length;
  $("export").textContent = number ? `Export ${many(number, "mark")}` : "Export";
  $("export").disabled = !number;
  const of = { suspects: suspects.length, errors: errorsNow().length, images: data.images.length }[state.view];
  $("count").textContent = `${shown.length.toLocaleString("en")} of ${of.toLocaleString("en")} ${VIEWS[state.view].toLowerCase()}`;
}
function notes() {
  const made = [], objects = data.images.some((image) => image.objects.length), best = Math.max(0, ...data.images.flatMap((image) => image.found.slice(0, 1).map((one) => one[1])));
  const seen = data.images.filter((image) => image.seen).length;
  if (!objects) made.push("This split has no labelled objects: there is no AP, and every prediction is one without an object.");
  if (!best) made.push(`No prediction has a score from ${data.least.toFixed(2)} on.`);
  else if (best < state.threshold) made.push(`No prediction has a score from ${state.threshold.toFixed(2)} on; the highest is ${best.toFixed(2)}.`);
  if (seen) made.push(`${many(seen, "image")} ${seen === 1 ? "was" : "were"} among the training images of every checkpoint that was given: what they learned by heart is not suspected. Train on folds, and give all checkpoints.`);
  if (data.all_images > data.images.length) made.push(`Only ${many(data.images.length, "image")} of ${data.all_images.toLocaleString("en")} are on this page: those with suspected labels, then those with most errors. AP50 and costs are of all images.`);
  if (!keeps) made.push("This browser keeps no marks for this page: export them before you close it.");
  $("notes").replaceChildren(...made.map((text) => Object.assign(document.createElement("p"), { className: "note small", textContent: text })));
}
function table() {
  const counts = {}, most = Math.max(1e-9, ...Object.values(data.costs));
  for (const one of errorsNow()) counts[one.kind] = (counts[one.kind] || 0) + 1;
  const head = document.createElement("tr");
  head.innerHTML = '<th>kind</th><th class="n">AP50</th><th></th><th class="n">number</th><th>what it is</th>';
  const rows = Object.entries(data.costs).sort((a, b) => b[1] - a[1]).map(([kind, cost]) => {
    const row = document.createElement("tr"), cells = [NAMES[kind], `+${cost.toFixed(3)}`, "", (counts[kind] || 0).toLocaleString("en"), MEANING[kind]];
    row.append(...cells.map((text, place) => Object.assign(document.createElement("td"), { textContent: text, className: [1, 3].includes(place) ? "n" : place === 4 ? "soft" : "" })));
    const bar = Object.assign(document.createElement("span"), { className: "bar" });
    bar.style.width = `${(150 * cost) / most}px`;
    row.children[2].className = "bars";
    row.children[2].append(bar);
    const button = Object.assign(document.createElement("button"), { textContent: NAMES[kind] });
    button.onclick = () => { Object.assign(state, { view: "errors", kind }); refresh(); $("tools").scrollIntoView(); };
    row.children[0].replaceChildren(button);
    return row;
  });
  document.querySelector("#costs table").replaceChildren(head, ...rows);
}

// ---- drawing
const addresses = new Map();
function address(image) {  // a blob is decoded once, a data address each time it is used
  if (!addresses.has(image)) {
    const bytes = Uint8Array.from(atob(image.pixels.split(",")[1]), (letter) => letter.charCodeAt(0));
    addresses.set(image, URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" })));
  }
  return addresses.get(image);
}
const svgOf = (name, given) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(given)) made.setAttribute(key, value);
  return made;
};
function around(one, share) {  // the object with what is around it, in the shape of a tile
  const [x, y, w, h] = one.where, [W, H] = one.image.size;
  let width = Math.max(w, (h * 4) / 3, 24) * share;
  if (width >= W && (width * 3) / 4 >= H) return [0, 0, W, H];
  const height = (width * 3) / 4, put = (middle, length, end) => (length >= end ? (end - length) / 2 : Math.min(Math.max(0, middle - length / 2), end - length));
  return [put(x + w / 2, width, W), put(y + h / 2, height, H), width, height];
}
function picture(one, view, words) {
  const { image } = one, svg = svgOf("svg", { viewBox: view.join(" "), role: "img", "aria-label": caption(one) });
  svg.append(svgOf("image", { href: address(image), width: image.size[0], height: image.size[1], preserveAspectRatio: "none" }));
  const missed = new Set(missedAt(image, state.threshold)), boxes = [];
  image.objects.forEach((row, place) => { if (state.truths || place === one.object) boxes.push([box(row, 1), missed.has(place) ? "lost" : "truth", place === one.object, className(row[0]), row[6]]); });
  image.found.forEach((row, place) => {
    if (place === one.found || (state.founds && row[1] >= state.threshold && row[6] !== "ignored")) boxes.push([box(row, 2), row[6] === "hit" ? "hit" : "wrong", place === one.found, `${className(row[0])} ${row[1].toFixed(2)}`, row[8]]);
  });
  boxes.sort((a, b) => a[2] - b[2]);
  const chosen = boxes.some((row) => row[2]), texts = [], used = [];
  for (const [[x, y, width, height], style, isChosen, text, outline] of boxes) {
    const more = isChosen ? " chosen" : chosen ? " faint" : "";
    if (outline) svg.append(svgOf("path", { d: outline, class: `shape ${style}${more}` }));
    for (const under of [" under", ""]) svg.append(svgOf("rect", { x, y, width, height, class: `box ${under ? "" : style}${under}${more}` }));
    if (words && (isChosen || !chosen)) texts.push([x, y, text, style]);
  }
  const unit = words ? view[2] / words : 0, size = 13 * unit;
  for (const [x, y, text, style] of texts) {  // inside the image, and below each other
    const length = text.length * size * 0.58, left = Math.max(view[0] + 2 * unit, Math.min(x, view[0] + view[2] - length));
    let top = Math.max(["truth", "lost"].includes(style) ? y - 4 * unit : y + size, view[1] + size);
    while (used.some((one) => Math.abs(one[1] - top) < size && left < one[0] + one[2] && one[0] < left + length)) top += size * 0.6;
    used.push([left, top, length]);
    const mark = svgOf("text", { x: left, y: Math.min(top, view[1] + view[3] - 3 * unit), "font-size": size, "stroke-width": 3 * unit });
    mark.textContent = text;
    svg.append(mark);
  }
  return svg;
}
function caption(one) {
  const label = one.label && className(one.label[0]), made = one.made && `${className(one.made[0])} ${one.made[1].toFixed(2)}`;
  if (one.kind === "image") return `${many(one.image.objects.length, "object")}, ${many(one.count ?? 0, "error")}`;
  if (one.rate !== undefined) return { class: `labelled ${label}, found ${made}`, box: `${label}, found elsewhere: ${made}`, invented: `labelled ${label}, not found`, missing: `no label, found ${made}` }[one.kind];
  return { missed: `${label}: missed`, background: `${made}: background`, class: `${made}, is ${label}`, box: `${made}: badly placed`, twice: `${made}: found twice`, both: `${made}: class and place` }[one.kind];
}
function more() {
  const before = drawn;
  for (; drawn < Math.min(before + PAGE, shown.length); drawn++) {
    const one = shown[drawn], card = Object.assign(document.createElement("button"), { className: "card" }), place = drawn;
    card.append(picture(one, one.kind === "image" ? [0, 0, ...one.image.size] : around(one, 2.4), 0));
    const named = document.createElement("span"), from = Object.assign(document.createElement("span"), { className: "from", textContent: short(one.image.name), title: one.image.name });
    named.textContent = caption(one);
    card.append(named, from);
    if (marks[one.key]) card.dataset.mark = marks[one.key];
    card.onclick = () => enlarge(place);
    card.onfocus = () => { at = place; };
    $("grid").append(card);
  }
}
new IntersectionObserver((seen) => { if (seen.some((one) => one.isIntersecting)) more(); }, { rootMargin: "800px" }).observe(document.querySelector("main > p:last-child"));

// ---- enlarged
function enlarge(place) {
  if (place < 0 || place >= shown.length) return;
  while (drawn <= place) more();
  at = enlarged = place;
  const one = shown[at], side = $("side");
  if (!$("dialog").open) $("dialog").showModal();
  const all = [0, 0, ...one.image.size], view = one.kind === "image" || whole ? all : around(one, 4);
  const room = $("large").getBoundingClientRect(), fits = Math.min(room.width / view[2], room.height / view[3]) * view[2];
  $("large").replaceChildren(picture(one, view, Math.max(200, fits)));
  side.replaceChildren();
  const add = (name, text, given) => side.appendChild(Object.assign(document.createElement(name), { textContent: text, ...given }));
  add("h2", caption(one));
  add("p", `${one.image.name}, ${one.image.size.join(" × ")} px`, { className: "soft small" });
  if (one.rate !== undefined) add("p", `${SUSPECTS[one.kind]} ${one.rate < 0.001 ? "Less than 0.1" : (100 * one.rate).toFixed(1)} % of the labels are contradicted as much in this way.`, { className: "small" });
  else if (MEANING[one.kind]) add("p", `${NAMES[one.kind]}: ${MEANING[one.kind]}`, { className: "small" });
  if (data.judges.length > 1) add("p", `judged by ${data.judges[one.image.judge]}`, { className: "small soft" });
  if (one.image.seen) add("p", "All checkpoints were trained on this image.", { className: "small" });
  const row = add("div", "", { className: "row" });
  for (const [mark, text] of [...Object.entries(MARKS)]) {
    const button = Object.assign(document.createElement("button"), { textContent: `${text} ` });
    button.append(Object.assign(document.createElement("kbd"), { textContent: mark[0] }));
    button.dataset.set = mark;
    button.setAttribute("aria-pressed", marks[one.key] === mark);
    button.onclick = () => put(mark);
    row.append(button);
  }
  const go = add("div", "", { className: "row" });
  for (const [text, act] of [["← previous", () => enlarge(at - 1)], ["next →", () => enlarge(at + 1)], [whole ? "object (z)" : "whole image (z)", () => { whole = !whole; enlarge(at); }], ["close", () => $("dialog").close()]]) {
    go.append(Object.assign(document.createElement("button"), { textContent: text, onclick: act }));
  }
  add("p", `${at + 1} of ${shown.length}`, { className: "soft small" });
  const list = add("ul", "");
  one.image.objects.forEach((object, place) => list.append(Object.assign(document.createElement("li"), { textContent: `label ${className(object[0])}, ${Math.round(object[3])} × ${Math.round(object[4])} px`, className: place === one.object ? "chosen" : "" })));
  image_found(one).forEach(([found, place]) => list.append(Object.assign(document.createElement("li"), { textContent: `${className(found[0])} ${found[1].toFixed(2)}: ${found[6] === "hit" ? "right" : NAMES[found[6]] || found[6]}`, className: place === one.found ? "chosen" : "" })));
}
const image_found = (one) => one.image.found.map((found, place) => [found, place]).filter(([found, place]) => place === one.found || found[1] >= state.threshold);
function put(mark) {
  if (at < 0 || at >= shown.length) return;
  const one = shown[at];
  setMark(one.key, mark);
  const card = $("grid").children[at];
  if (marks[one.key]) card.dataset.mark = marks[one.key]; else delete card.dataset.mark;
  facts();
  if ($("dialog").open) enlarge(at);
}
$("dialog").addEventListener("close", () => { const card = $("grid").children[enlarged]; if (card && card.focus) card.focus(); });  // not where it was opened

// ---- export
function exported() {
  const items = [...suspects, ...errors(0), ...data.images.map((image) => item(image, "image", -1, -1))], first = new Map();
  for (const one of items) if (marks[one.key] && !first.has(one.key)) first.set(one.key, one);
  const images = new Map(), annotations = [];
  let free = Math.max(0, ...data.images.flatMap((image) => image.objects.map((row) => row[5] ?? 0)));  // ids of labels are those of their file
  const coco = (row, start) => ({ category_id: data.classes[row[0]][1], bbox: box(row, start) });
  for (const [key, one] of first) {
    const { image } = one;
    if (!images.has(image.id)) images.set(image.id, { id: image.id, file_name: image.name, width: image.size[0], height: image.size[1] });
    if (one.kind === "image") { images.get(image.id).mark = marks[key]; continue; }
    const label = one.label && one.object >= 0 ? coco(one.label, 1) : null, made = one.made ? { ...coco(one.made, 2), score: one.made[1] } : null, main = label || made;
    annotations.push({ id: (label && one.label[5]) ?? ++free, image_id: image.id, category_id: main.category_id, bbox: main.bbox, area: main.bbox[2] * main.bbox[3], iscrowd: 0, mark: marks[key], kind: one.kind, label, prediction: made });
  }
  return { info: { description: document.title }, images: [...images.values()], annotations, categories: data.classes.map(([name, id]) => ({ id, name })) };
}
$("export").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(exported(), null, 1)], { type: "application/json" }));
  link.download = `marked_${data.split}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

// ---- controls
options($("class"), [["", "all"], ...data.classes.map(([name], label) => [label, name])], "");
$("threshold").min = Math.floor(data.least * 100) / 100;
$("threshold").value = state.threshold;
for (const id of ["kind", "class", "size", "marked", "sort"]) $(id).onchange = () => { state[id] = $(id).value; refresh(); };
let waiting = 0;
const soon = (act) => { clearTimeout(waiting); waiting = setTimeout(act, 60); };
function setThreshold(value) {
  state.threshold = Math.min(1, Math.max(Number($("threshold").min), Math.round(value * 100) / 100));
  $("threshold").value = state.threshold;
  $("score").textContent = state.threshold.toFixed(2);
  soon(refreshAround);
}
$("threshold").oninput = () => setThreshold(Number($("threshold").value));
$("search").oninput = () => { state.search = $("search").value; soon(refresh); };
function setView(view) { Object.assign(state, { view, kind: "", sort: "" }); at = -1; refresh(); }
for (const button of document.querySelectorAll("[data-view]")) button.onclick = () => setView(button.dataset.view);
function refreshAround() {  // what is enlarged stays so where it is still shown
  const key = at >= 0 && at < shown.length ? shown[at].key : null;
  refresh();
  at = shown.findIndex((one) => one.key === key);
  if ($("dialog").open) { if (at < 0) $("dialog").close(); else enlarge(at); }
}
const toggle = (name) => { state[name] = !state[name]; refreshAround(); };
$("truths").onclick = () => toggle("truths");
$("founds").onclick = () => toggle("founds");
$("keys").onclick = () => $("help").showModal();
$("close").onclick = () => $("help").close();
for (const id of ["dialog", "help"]) $(id).onclick = (event) => { if (event.target === $(id)) $(id).close(); };
function walk(key) {
  const cards = $("grid").children, columns = getComputedStyle($("grid")).gridTemplateColumns.split(" ").length;
  const next = at + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key], to = at < 0 ? 0 : Math.min(Math.max(0, next), shown.length - 1);
  if (!shown.length) return;
  while (drawn <= to) more();
  cards[to].focus();
  cards[to].scrollIntoView({ block: "nearest" });
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const typing = ["INPUT", "SELECT"].includes(event.target.tagName), key = event.key, open = $("dialog").open;
  if (typing) { if (key === "Escape") event.target.blur(); return; }
  const acts = {
    w: () => put("wrong"), r: () => put("right"), u: () => put("unsure"), x: () => put(""), z: () => { if (open) { whole = !whole; enlarge(at); } },
    1: () => !open && setView("suspects"), 2: () => !open && setView("errors"), 3: () => !open && setView("images"),
    "[": () => setThreshold(state.threshold - 0.01), "]": () => setThreshold(state.threshold + 0.01), t: () => toggle("truths"), p: () => toggle("founds"),
    "/": () => !open && $("search").focus(), e: () => !$("export").disabled && $("export").click(), "?": () => !open && $("help").showModal(),
  };
  if (key.startsWith("Arrow")) {
    event.preventDefault();
    if (open) enlarge(at + (["ArrowLeft", "ArrowUp"].includes(key) ? -1 : 1)); else walk(key);
  } else if (acts[key]) { event.preventDefault(); acts[key](); }
});
refresh();
