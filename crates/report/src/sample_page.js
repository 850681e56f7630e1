"use strict";
(() => {
  const { images, samples } = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const list = byId("list"), detail = byId("detail");
  const rows = [...list.children];
  const hiddenLayers = { t: false, p: false, a: false };
  let shown = rows.slice(), current = null;

  const make = (tag, props = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), props);
    node.append(...children);
    return node;
  };
  const shape = (tag, attributes) => {
    const node = document.createElementNS("http:\u002f/www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const number = (v) => (v === null ? "–" : v.toFixed(3));

  // Thumbnails of the list are set when they become visible.
  const lazy = new IntersectionObserver((seen) => {
    for (const { isIntersecting, target } of seen) {
      if (!isIntersecting) continue;
      const uri = images[samples[target.dataset.i].image];
      if (uri) target.firstElementChild.src = uri;
      lazy.unobserve(target);
    }
  }, { root: list, rootMargin: "300px" });
  rows.forEach((row) => lazy.observe(row));

  const drawable = (b) => b.every(Number.isFinite) && b[0] < b[2] && b[1] < b[3];

  function stage(s) {
    const [w, h] = s.size;
    const box = make("div", { className: "stage" });
    box.style.aspectRatio = `${w} / ${h}`;
    if (s.image !== null) box.append(make("img", { src: images[s.image], alt: s.id }));
    if (s.heat) {
      const [r, c] = s.grid, canvas = make("canvas", { width: c, height: r });
      const bytes = Uint8Array.from(atob(s.heat), (x) => x.charCodeAt(0));
      const pixels = new ImageData(c, r);
      bytes.forEach((v, j) => pixels.data.set([255, 122, 0, v * 0.7], 4 * j));
      canvas.getContext("2d").putImageData(pixels, 0, 0);
      box.append(canvas);
    }
    const svg = shape("svg", { viewBox: `0 0 ${w} ${h}`, preserveAspectRatio: "none" });
    for (const [boxes, kind] of [[s.truth, "true"], [s.predicted, "pred"]]) {
      for (const b of boxes.filter(drawable)) {
        svg.append(shape("rect", { x: b[0], y: b[1], width: b[2] - b[0], height: b[3] - b[1], class: kind }));
      }
    }
    box.append(svg);
    for (const key of "tpa") box.classList.toggle("no" + key, hiddenLayers[key]);
    return box;
  }

  function legend(s) {
    const entry = (key, mark, text) => {
      const tick = make("input", { type: "checkbox", checked: !hiddenLayers[key] });
      tick.addEventListener("change", () => toggle(key));
      return make("label", {}, tick, make("i", { className: mark }), text);
    };
    const invalid = s.predicted.filter((b) => !drawable(b)).length;
    return make("div", { className: "key" },
      entry("t", "true", `true (${s.truth.length})`),
      entry("p", "pred", `predicted (${s.predicted.length}${invalid ? `, ${invalid} invalid and not drawn` : ""})`),
      entry("a", "heat", s.heat ? `attention of the named class, maximum ${s.peak.toPrecision(2)} of 1` : "attention: no rows of tokens that name the class"));
  }

  function table(s) {
    const head = make("tr", {}, make("th", { textContent: "component" }), make("th", { textContent: "value" }), make("th"));
    const body = s.components.map((c) => {
      const detail = Object.entries(c.detail).map(([k, v]) => `${k} ${v === null ? "–" : +v.toPrecision(4)}`).join(" · ");
      const masked = c.why === null ? "" : c.why.slice(c.why.indexOf(":") + 2);
      const why = [masked, c.failed].filter(Boolean).join(": ");
      return make("tr", {}, make("td", { textContent: c.name }),
        make("td", { className: "n", textContent: c.why === null ? number(c.value) : "masked" }),
        make("td", { className: why ? "why" : "" }, why, make("small", { textContent: (why && detail ? " · " : "") + detail })));
    });
    const total = make("tr", {}, make("td", {}, make("b", { textContent: "total" })),
      make("td", { className: "n" }, make("b", { textContent: number(s.total) })), make("td", { textContent: s.total === null ? "every component is masked" : "" }));
    return make("table", {}, head, ...body, total);
  }

  function show(row) {
    if (current) current.classList.remove("on");
    current = row;
    detail.replaceChildren();
    if (!row) return;
    row.classList.add("on");
    row.scrollIntoView({ block: "nearest" });
    const s = samples[row.dataset.i];
    const where = `#${s.index}${s.step === null ? "" : ` · step ${s.step}`} · ${s.reference ?? (s.truth.length ? s.category : "no finding")}`;
    detail.append(
      make("h2", {}, s.id + " ", make("span", { textContent: where })),
      make("div", { className: "view" },
        make("div", {}, stage(s), legend(s)),
        make("div", {}, make("code", { textContent: s.text || "(empty)" }), table(s))));
    history.replaceState(null, "", "#" + row.dataset.i);
  }

  function move(by) {
    if (!shown.length) return;
    const at = shown.indexOf(current);
    show(shown[Math.max(0, Math.min(shown.length - 1, at < 0 ? 0 : at + by))]);
  }

  function toggle(key) {
    hiddenLayers[key] = !hiddenLayers[key];
    show(current);
  }

  function filter() {
    const bound = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
    const [low, high, mask, order] = [bound("low"), bound("high"), byId("mask").value, byId("order").value];
    const words = byId("find").value.toLowerCase().trim();
    const matches = (s) => {
      if ((low !== null || high !== null) && s.total === null) return false;
      if (low !== null && s.total < low || high !== null && s.total > high) return false;
      if (mask === "none" ? s.masks.length : mask === "all" ? s.total !== null : mask && !s.masks.includes(mask)) return false;
      return !words || (words.match(/^step \d+$/) ? `step ${s.step}` === words : `${s.id} ${s.text} ${s.category}`.toLowerCase().includes(words));
    };
    const sampleOf = (row) => samples[row.dataset.i];
    shown = rows.filter((row) => !(row.hidden = !matches(sampleOf(row))));
    const sorted = rows.slice();
    if (order) {
      const sign = order === "up" ? 1 : -1, last = (row) => sampleOf(row).total === null;
      const rank = (a, b) => last(a) - last(b) || sign * (sampleOf(a).total - sampleOf(b).total);
      sorted.sort(rank);
      shown.sort(rank);
    }
    list.append(...sorted);
    byId("count").textContent = `${shown.length} of ${rows.length}`;
    show(shown.includes(current) ? current : shown[0] || null);
  }

  for (const id of ["find", "low", "high", "mask", "order"]) byId(id).addEventListener("input", filter);
  document.forms[0].addEventListener("submit", (e) => e.preventDefault());
  list.addEventListener("click", (e) => {
    const row = e.target.closest("li");
    if (row) show(row);
  });
  const keys = {
    ArrowDown: () => move(1), j: () => move(1), ArrowUp: () => move(-1), k: () => move(-1),
    PageDown: () => move(10), PageUp: () => move(-10), Home: () => move(-Infinity), End: () => move(Infinity),
    t: () => toggle("t"), p: () => toggle("p"), a: () => toggle("a"), "/": () => byId("find").focus(),
  };
  document.addEventListener("keydown", (e) => {
    const typing = e.target.matches("input:not([type=checkbox]), select");
    if (e.key === "Escape" && typing) e.target.blur();
    if (typing || e.ctrlKey || e.metaKey || e.altKey || !keys[e.key]) return;
    e.preventDefault();
    keys[e.key]();
  });
  const linked = Number(location.hash.slice(1));
  if (location.hash && rows[linked]) current = rows[linked];
  filter();
})();
