"use strict";
const items = JSON.parse(document.getElementById("items").textContent);
const store = "unveil-review-" + document.body.dataset.name;
let decisions = {};
try { decisions = JSON.parse(localStorage.getItem(store)) || {}; } catch (e) { decisions = {}; }
let current = 0;

function make(tag, props, ...children) {
  const svg = ["svg", "rect", "image", "title"].includes(tag) && !(props && props.html);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [k, v] of Object.entries(props || {})) {
    if (k === "text") node.textContent = v;
    else if (k.startsWith("on")) node.addEventListener(k.slice(2), v);
    else node.setAttribute(k, v);
  }
  node.append(...children);
  return node;
}

function figure(item) {
  const [w, h] = item.size;
  const svg = make("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": item.category });
  svg.append(make("image", { href: item.image, width: w, height: h }));
  for (const b of item.boxes) {
    const rect = make("rect", { x: b.x1, y: b.y1, width: b.x2 - b.x1, height: b.y2 - b.y1 });
    rect.append(make("title", { text: b.label }));
    svg.append(rect);
  }
  return svg;
}

const NAMES = { accept: "accepted", edit: "edited", reject: "rejected" };

function card(item, k) {
  const text = make("textarea", { "aria-label": "answer", spellcheck: "true" });
  const saved = decisions[item.id];
  text.value = saved && saved.key === item.key && saved.answer ? saved.answer : item.reflection;
  const state = make("span", { class: "state" });
  // Without this, the click would also select the card.
  const button = (decision, label) => make("button", { type: "button", text: label, onclick: (e) => { e.stopPropagation(); decide(k, decision); } });
  const accept = button("accept", "Accept");
  const reset = button(null, "Undo");
  const article = make("article", { id: "r" + k, onclick: () => select(k, false) },
    figure(item),
    make("div", {},
      make("h2", {}, item.category + " ", make("span", { text: item.id })),
      make("p", { class: "facts", text: [item.modality, item.source, item.question].filter(Boolean).join(" · ") }),
      ...item.faults.map((f) => make("span", { class: "fault", text: f })),
      text,
      make("details", {}, make("summary", { text: "first answer (diagnosis)" }), make("p", { text: item.diagnosis })),
      make("div", { class: "buttons" }, accept, button("edit", "Save edit"), button("reject", "Reject"), reset, state)));
  Object.assign(item, { article, text, state, accept });
  text.addEventListener("input", () => show(k));
  return article;
}

function decide(k, decision) {
  const item = items[k];
  if (decision === "accept" && item.text.value !== item.reflection) decision = "edit";
  if (decision === "edit" && item.text.value === item.reflection) decision = "accept";
  if (decision === "edit" && !item.text.value.trim()) return;
  if (decision === "accept" && !item.usable) return;
  if (decision === null) { delete decisions[item.id]; item.text.value = item.reflection; }
  else decisions[item.id] = { id: item.id, key: item.key, decision, ...(decision === "edit" ? { answer: item.text.value } : {}) };
  save();
  show(k);
  if (decision) select(next(k), true);
}

function save() {
  try { localStorage.setItem(store, JSON.stringify(decisions)); } catch (e) { /* the download still contains them */ }
}

function decision(item) {
  const saved = decisions[item.id];
  return saved && saved.key === item.key ? saved.decision : "";
}

function show(k) {
  const item = items[k], status = decision(item);
  item.article.className = status + (k === current ? " current" : "");
  const unsaved = status === "edit" ? decisions[item.id].answer !== item.text.value : item.text.value !== item.reflection;
  item.state.textContent = (NAMES[status] || "") + (unsaved && status !== "reject" ? " (unsaved edit)" : "");
  item.accept.disabled = !item.usable && item.text.value === item.reflection;
  item.accept.title = item.accept.disabled ? "Edit it first: " + item.faults.join(", ") : "";
  const done = items.filter((i) => decision(i)).length;
  document.getElementById("count").textContent = `${done} of ${items.length} decided`;
  document.querySelector(".bar i").style.width = (100 * done) / Math.max(1, items.length) + "%";
  document.getElementById("download").disabled = done === 0;
}

function next(k) {
  for (let i = 1; i <= items.length; i++) {
    const at = (k + i) % items.length;
    if (!decision(items[at]) && !items[at].article.hidden) return at;
  }
  return k;
}

function select(k, scroll) {
  const old = current;
  current = k;
  show(old);
  show(k);
  if (scroll) items[k].article.scrollIntoView({ block: "start", behavior: "smooth" });
}

function filter() {
  const shown = document.getElementById("filter").value;
  for (const item of items) {
    const status = decision(item);
    item.article.hidden = !(shown === "all" || (shown === "open" && !status) || (shown === "faulty" && item.faults.length) || shown === status);
  }
}

function download() {
  const lines = items.filter((i) => decision(i)).map((i) => JSON.stringify(decisions[i.id]) + "\n");
  const url = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  make("a", { href: url, download: "decisions-" + document.body.dataset.name + ".jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

async function load(event) {
  const text = await event.target.files[0].text();
  for (const line of text.split("\n").filter((l) => l.trim())) {
    try {
      const d = JSON.parse(line);
      const item = items.find((i) => i.id === d.id && i.key === d.key);
      if (item && NAMES[d.decision]) {
        decisions[d.id] = d;
        if (d.answer) item.text.value = d.answer;
      }
    } catch (e) { /* lines that are not decisions are ignored */ }
  }
  save();
  items.forEach((_, k) => show(k));
}

document.querySelector("main").append(...items.map(card));
document.getElementById("download").addEventListener("click", download);
document.getElementById("load").addEventListener("change", load);
document.getElementById("filter").addEventListener("change", filter);
document.addEventListener("keydown", (e) => {
  if (e.target.tagName === "TEXTAREA") {
    if (e.key === "Escape") e.target.blur();
    return;
  }
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const keys = {
    a: () => decide(current, "accept"), r: () => decide(current, "reject"), u: () => decide(current, null),
    e: () => items[current].text.focus(), s: () => decide(current, "edit"),
    j: () => select(Math.min(items.length - 1, current + 1), true), k: () => select(Math.max(0, current - 1), true),
  };
  if (keys[e.key]) { e.preventDefault(); keys[e.key](); }
});
items.forEach((_, k) => show(k));
if (items.length) select(next(items.length - 1), false);
