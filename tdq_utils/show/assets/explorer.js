"use strict";
(function () {
  const at = (id) => document.getElementById(id);
  const models = JSON.parse(at("data").textContent);
  const METHODS = Object.assign(JSON.parse(at("names").textContent), { yours: "yours, a constant" });
  const KEYS = Object.keys(METHODS);
  const SVG = "http://www.w3.org/2000/svg";
  const state = { model: 0, layer: 0, bits: 5, i: 0, method: "mse", end: null };
  let playing = null, dragging = false;

  // ---- numbers ------------------------------------------------------------------------------------------------------

  const dB = (ratio) => 10 * Math.log10(Math.max(ratio, 1e-12));
  const short = (v) => String(Number(v.toPrecision(3)));
  const fixed = (v) => (v < 0 ? "\u2212" : "") + Math.abs(v).toFixed(1);
  const signed = (v) => (Math.abs(v) < 0.05 ? "0.0" : (v > 0 ? "+" : "\u2212") + Math.abs(v).toFixed(1));
  const percent = (v) => v === 0 ? "none" : v < 0.00095 ? (100 * v).toPrecision(1) + "\u00a0%" : (100 * v).toFixed(v < 0.0995 ? 1 : 0) + "\u00a0%";
  const model = () => models[state.model];
  const layer = () => model().layers[state.layer];

  /* A histogram whose density is even inside of each bin: its left edge, width of a bin, shares, and sums of shares. */
  function cell(one, i) {
    if (typeof one.cells[i][2] !== "string") return one.cells[i];
    const [start, width, codes] = one.cells[i];
    const share = Array.from(atob(codes), (c) => (c.charCodeAt(0) ? Math.pow(2, (c.charCodeAt(0) - 255) / model().octave) : 0));
    const total = share.reduce((a, b) => a + b, 0), sums = [0];
    let power = 0;
    share.forEach(function (value, k) {
      const a = start + k * width, b = a + width;
      share[k] = value / total;
      sums.push(sums[k] + share[k]);
      power += share[k] * (a * a + a * b + b * b) / 3;
    });
    return (one.cells[i] = { start, width, share, sums, power });
  }

  function below(one, x) {
    const place = Math.min(Math.max((x - one.start) / one.width, 0), one.share.length), k = Math.floor(place);
    return one.sums[k] + (k < one.share.length ? (place - k) * one.share[k] : 0);
  }

  /* Least and greatest level of the grid, in steps, counted from the value 0. */
  function ends(low, bits, s) {
    if (low === null) return [-Math.pow(2, bits - 1), Math.pow(2, bits - 1) - 1];
    const top = Math.pow(2, bits) - 1, zero = Math.min(Math.round(-low / s), top);
    return [-zero, top - zero];
  }

  const top = (bits, low) => Math.pow(2, low === null ? bits - 1 : bits) - 1;
  const stepOf = (low, bits, end) => (end - (low || 0)) / top(bits, low);

  /* Mean squared error of rounding and of truncation, and the share of values that is cut off. */
  function errors(one, low, bits, s) {
    const [least, most] = ends(low, bits, s), from = (least - 0.5) * s, to = (most + 0.5) * s;
    const sawtooth = (u) => { const n = Math.round(u), r = u - n; return n / 12 + r * r * r / 3; };  // integral of (u - round u)^2
    const cube = (x) => x * x * x / 3;
    let round = 0, cut = 0;
    for (let k = 0; k < one.share.length; k++) {
      if (!one.share[k]) continue;
      const a = one.start + k * one.width, b = a + one.width, density = one.share[k] / one.width;
      const inner = Math.min(Math.max(a, from), to), outer = Math.min(Math.max(b, from), to);
      round += density * s * s * s * (sawtooth(outer / s) - sawtooth(inner / s));
      if (a < from) cut += density * (cube(Math.min(b, from) - least * s) - cube(a - least * s));
      if (b > to) cut += density * (cube(b - most * s) - cube(Math.max(a, to) - most * s));
    }
    const outside = below(one, from) + 1 - below(one, to);
    return { round: Math.max(round, 0), cut: Math.max(cut, 0), outside: outside > 1e-9 ? outside : 0, s, end: most * s, start: least * s };
  }

  function step(method, i) {
    const one = layer(), bits = state.bits;
    if (method === "yours") return stepOf(one.low, bits, state.end);
    if (method === "mse") return one.mse[bits];
    if (method !== "minmax") return one[method][bits][i];
    const high = top(bits, one.low);
    return one.low === null ? Math.max(-one.least / (high + 1), one.greatest / high) : (one.greatest - one.low) / high;
  }

  const kept = new Map();  // of the methods that do not move
  function over(method) {
    const key = [state.model, state.layer, state.bits, method].join();
    if (method !== "yours" && kept.has(key)) return kept.get(key);
    const found = model().t.map(function (_, i) { const one = cell(layer(), i); return Object.assign(errors(one, layer().low, state.bits, step(method, i)), { power: one.power }); });
    if (method !== "yours") kept.set(key, found);
    return found;
  }
  const sum = (rows) => rows.reduce((total, row) => total + row.round + row.cut, 0);

  // ---- drawing ------------------------------------------------------------------------------------------------------

  function part(parent, kind, given, text) {
    const node = document.createElementNS(SVG, kind);
    for (const name in given) node.setAttribute(name, given[name]);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }

  function surface(box, height, label) {
    const width = Math.max(260, box.clientWidth), svg = box.querySelector("svg") || part(box, "svg", { role: "group" });
    svg.setAttribute("viewBox", "0 0 " + width + " " + height);
    svg.setAttribute("aria-label", label);
    return { svg, width };
  }

  function ticks(low, high, most) {
    const rough = (high - low) / most, size = Math.pow(10, Math.floor(Math.log10(rough)));
    const pitch = [1, 2, 5, 10].map((m) => m * size).find((p) => p >= rough), found = [];
    for (let k = Math.ceil(low / pitch); k * pitch <= high + 1e-9 * pitch; k++) found.push(k * pitch);
    return found;
  }

  const path = (points) => points.map((p, k) => (k ? "L" : "M") + p[0].toFixed(1) + " " + p[1].toFixed(1)).join("");

  /* What the main chart needs to turn a value into a place, and back. */
  function frame() {
    const one = layer(), width = Math.max(260, at("chart").clientWidth), left = 58, right = width - 14;
    const pad = 0.03 * (one.greatest - one.least), low = one.least - pad, high = one.greatest + 2 * pad;
    return { width, left, right, low, high, x: (v) => left + (right - left) * (Math.min(Math.max(v, low), high) - low) / (high - low),
             value: (px) => low + (high - low) * (px - left) / (right - left) };
  }

  function chart() {
    const f = frame(), one = layer(), now = cell(one, state.i), mine = errors(now, one.low, state.bits, step(state.method, state.i));
    const H = f.width < 480 ? 210 : 370, y0 = 34, base = y0 + H, strips = base + 54, uTop = strips + 5 * 19 + 40, uBase = uTop + (f.width < 480 ? 150 : 190);
    const { svg } = surface(at("chart"), uBase + 46, "Histogram of the input of " + one.name + " at t = " + short(model().t[state.i]));
    let back = svg.querySelector(".back");
    if (!back) {
      const hatch = part(part(svg, "defs", {}), "pattern", { id: "hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
      part(hatch, "rect", { width: 5, height: 5, class: "hatch-a" });
      part(hatch, "rect", { width: 2, height: 5, class: "hatch-b" });
      back = part(svg, "g", { class: "back" });
      handle(svg);
    }
    back.replaceChildren();
    const from = mine.start - mine.s / 2, to = mine.end + mine.s / 2, floor = 6;
    part(back, "rect", { x: f.x(from), y: y0, width: Math.max(1, f.x(to) - f.x(from)), height: H, class: "inside" });
    histogram(back, f, now, from, to, y0, H, floor);
    levels(back, f, mine, base);
    axis(back, f, base + 14, "value of the layer\u2019s input");
    intervals(back, f, strips);
    const best = bathtub(back, f, now, uTop, uBase);
    axis(back, f, uBase, "end of the interval");
    const start = f.x(mine.start);
    if (mine.start > f.low) part(back, "line", { x1: start, x2: start, y1: y0, y2: base + 10, class: "end" });
    place(svg, f, mine, y0, uBase, best);
  }

  function histogram(back, f, now, from, to, y0, H, floor) {
    const y = (share) => y0 + H * Math.min(1, Math.max(0, -Math.log10(Math.max(share, 1e-9)) / floor));
    for (let k = 0; k <= floor; k++) {
      part(back, "line", { x1: f.left, x2: f.right, y1: y0 + H * k / floor, y2: y0 + H * k / floor, class: k === floor ? "axis" : "grid" });
      if (k < floor && k % 2 === 0) part(back, "text", { x: f.left - 6, y: y0 + H * k / floor + 4, "text-anchor": "end" }, ["100 %", "", "1 %", "", "0.01 %"][k]);
    }
    part(back, "text", { x: f.left - 50, y: y0 - 14 }, "share of the values");
    const columns = Math.floor((f.right - f.left) / 4), wide = (f.high - f.low) / columns;
    const edges = Array.from({ length: columns + 1 }, (_, k) => f.low + k * wide).concat([from, to].filter((v) => v > f.low && v < f.high)).sort((a, b) => a - b);
    for (let k = 0; k + 1 < edges.length; k++) {
      const a = edges[k], b = edges[k + 1];
      if (b - a < 1e-9 * wide) continue;
      const share = (below(now, b) - below(now, a)) * wide / (b - a);  // of a whole column: all heights compare
      if (share <= Math.pow(10, -floor)) continue;
      const outside = (a + b) / 2 < from || (a + b) / 2 > to;
      part(back, "rect", { x: f.x(a) + 0.4, width: Math.max(0.3, f.x(b) - f.x(a) - 0.8), y: y(share), height: y0 + H - y(share), class: "bar " + (outside ? "cut" : "round") });
    }
  }

  function levels(back, f, mine, base) {
    const count = Math.round((mine.end - mine.start) / mine.s), places = [];
    for (let q = 0; q <= count; q++) {
      const v = mine.start + q * mine.s;
      if (v > f.low && v < f.high) places.push(f.x(v).toFixed(1));
    }
    part(back, "path", { d: places.map((x) => "M" + x + " " + (base + 1) + "v9").join(""), class: "levels", "stroke-width": places.length > 90 ? 0.7 : 1.5 });
  }

  function axis(back, f, y, title) {
    for (const v of ticks(f.low, f.high, f.width < 480 ? 5 : 9)) part(back, "text", { x: f.x(v), y: y + 15, "text-anchor": "middle" }, short(v).replace("-", "\u2212"));
    part(back, "text", { x: f.right, y: y + 31, "text-anchor": "end" }, title);
  }

  function intervals(back, f, y) {
    KEYS.forEach(function (method, k) {
      const found = errors(cell(layer(), state.i), layer().low, state.bits, step(method, state.i)), line = y + 19 * k + 10;
      const name = { minmax: "min-max", mse: "MSE", table: "table", tdq: "TDQ", yours: "yours" }[method], chosen = method === state.method;
      part(back, "text", { x: f.left - 8, y: line + 4, "text-anchor": "end", class: chosen ? "strong" : "" }, name);
      part(back, "line", { x1: f.left, x2: f.right, y1: line, y2: line, class: "grid" });
      part(back, "line", { x1: f.x(found.start), x2: f.x(found.end), y1: line, y2: line, class: "strip " + method + (chosen ? " chosen" : "") });
      part(back, "rect", { x: 0, width: f.right, y: line - 9, height: 19, class: "hot" }).onclick = () => choose(method);
    });
  }

  /* Truncation falls and rounding rises with the interval's end; their sum has a least value somewhere between. */
  function bathtub(back, f, now, yTop, yBase) {
    const one = layer(), first = Math.max(f.x(0) + 6, f.left), points = [];
    for (let px = first; px <= f.right; px += 3) {
      const found = errors(now, one.low, state.bits, stepOf(one.low, state.bits, f.value(px)));
      points.push([px, dB(found.round / now.power), dB(found.cut / now.power), dB((found.round + found.cut) / now.power)]);
    }
    const sums = points.map((p) => p[3]), least = Math.min.apply(null, sums), bottom = Math.floor((least - 8) / 10) * 10, most = 0;
    const y = (v) => yTop + (yBase - yTop) * (most - Math.min(most, Math.max(bottom, v))) / (most - bottom);
    for (const v of ticks(bottom, most, 4)) {
      part(back, "line", { x1: f.left, x2: f.right, y1: y(v), y2: y(v), class: v === bottom ? "axis" : "grid" });
      part(back, "text", { x: f.left - 6, y: y(v) + 4, "text-anchor": "end" }, fixed(v).replace(".0", ""));
    }
    part(back, "text", { x: f.left - 50, y: yTop - 12 }, f.width < 480 ? "error (dB); rounding dotted, truncation dashed" : "error at this t (dB): the sum, rounding dotted, truncation dashed");
    [["round", 1], ["cut", 2], ["sum", 3]].forEach(function (pair) {
      let pen = "M";  // lifted where the curve leaves the chart
      const d = points.map(function (p) {
        const seen = p[pair[1]] > bottom, drawn = seen ? pen + p[0].toFixed(1) + " " + y(p[pair[1]]).toFixed(1) : "";
        pen = seen ? "L" : "M";
        return drawn;
      });
      part(back, "path", { d: d.join(""), class: "curve " + pair[0] });
    });
    return y;
  }

  function handle(svg) {
    const group = part(svg, "g", { class: "handle", role: "slider", tabindex: 0, "aria-label": "Upper end of the interval", "aria-orientation": "horizontal" });
    part(group, "line", {});
    part(group, "rect", { class: "hit", width: 44, rx: 8 });
    part(group, "rect", { class: "ring", width: 34, height: 28, rx: 14 });
    part(group, "rect", { class: "grip", width: 28, height: 22, rx: 11 });
    part(group, "path", { class: "arrows", d: "M-3.5 -4l-4 4l4 4M3.5 -4l4 4l-4 4" });
    part(group, "circle", { class: "dot yours", r: 5.5 });
    const move = (event) => drag(frame().value((event.clientX - svg.getBoundingClientRect().left) * frame().width / svg.getBoundingClientRect().width));
    group.onpointerdown = function (event) { dragging = true; group.setPointerCapture(event.pointerId); event.preventDefault(); group.focus({ focusVisible: false }); };
    group.onpointermove = (event) => { if (dragging) move(event); };
    group.onpointerup = group.onpointercancel = () => { dragging = false; draw(); };
    group.onkeydown = function (event) {
      const f = frame(), now = step(state.method, state.i) * ends(layer().low, state.bits, step(state.method, state.i))[1], jump = (f.high - f.low) / 100;
      const moves = { ArrowRight: jump, ArrowUp: jump, ArrowLeft: -jump, ArrowDown: -jump, PageUp: 8 * jump, PageDown: -8 * jump };
      if (event.key in moves) drag((state.method === "yours" ? state.end : now) + moves[event.key]);
      else if (event.key === "Home") drag(0);
      else if (event.key === "End") drag(f.high);
      else if (event.key === "Enter" || event.key === " ") snap();
      else return;
      event.preventDefault();
    };
  }

  function place(svg, f, mine, y0, bottom, y) {
    const group = svg.querySelector(".handle"), x = f.x(mine.end), now = cell(layer(), state.i), error = dB((mine.round + mine.cut) / now.power);
    group.setAttribute("transform", "translate(" + x.toFixed(1) + " 0)");
    const set = (name, given) => { for (const key in given) group.querySelector(name).setAttribute(key, given[key]); };
    set("line", { x1: 0, x2: 0, y1: 16, y2: bottom });
    set(".hit", { x: -22, y: 0, height: bottom });
    set(".ring", { x: -17, y: y0 - 32 });
    set(".grip", { x: -14, y: y0 - 29 });
    set(".arrows", { transform: "translate(0 " + (y0 - 18) + ")" });
    set(".dot", { cy: y(error), class: "dot " + state.method });
    const told = { "aria-valuemin": 0, "aria-valuemax": short(f.high), "aria-valuenow": short(mine.end),
                   "aria-valuetext": short(mine.end) + ", error " + fixed(error) + " decibels" };
    for (const key in told) group.setAttribute(key, told[key]);
  }

  function overTime(id, height, title, values, low, high, label) {
    const t = model().t, { svg, width } = surface(at(id), height, title), left = 46, right = width - 12, top = 24, base = height - 40;
    const x = (v) => left + (right - left) * (t.length > 1 ? (v - t[0]) / (t[t.length - 1] - t[0]) : 0.5);
    const y = (v) => base - (base - top) * (Math.min(Math.max(v, low), high) - low) / (high - low || 1);
    svg.replaceChildren();
    for (const v of ticks(low, high, 4)) {
      part(svg, "line", { x1: left, x2: right, y1: y(v), y2: y(v), class: "grid" });
      part(svg, "text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, short(v).replace("-", "\u2212"));
    }
    part(svg, "text", { x: 2, y: 12 }, label);
    for (const v of ticks(Math.min(t[0], t[t.length - 1]), Math.max(t[0], t[t.length - 1]), 5)) part(svg, "text", { x: x(v), y: base + 17, "text-anchor": "middle" }, short(v).replace("-", "\u2212"));
    part(svg, "text", { x: left, y: base + 34 }, "\u2190 noise");
    part(svg, "text", { x: (left + right) / 2, y: base + 34, "text-anchor": "middle" }, "time step t");
    part(svg, "text", { x: right, y: base + 34, "text-anchor": "end" }, "image \u2192");
    part(svg, "line", { x1: x(t[state.i]), x2: x(t[state.i]), y1: top - 4, y2: base, class: "now" });
    const idle = state.method !== "yours" && Math.abs(step("yours", 0) / step("mse", 0) - 1) < 1e-6;  // it lies on the constant
    for (const method of KEYS.filter((m) => m !== state.method && !(idle && m === "yours")).concat(state.method)) {
      const chosen = method === state.method ? " chosen" : "";
      part(svg, "path", { d: path(values(method).map((v, k) => [x(t[k]), y(v)])), class: "curve " + method + chosen });
      if (chosen) part(svg, "circle", { cx: x(t[state.i]), cy: y(values(method)[state.i]), r: 5.5, class: "dot " + method });
    }
    const hot = part(svg, "rect", { x: left, y: 0, width: right - left, height, class: "hot" });
    const go = function (event) {
      const box = svg.getBoundingClientRect(), px = (event.clientX - box.left) * width / box.width;
      const near = t.reduce((best, v, k) => (Math.abs(x(v) - px) < Math.abs(x(t[best]) - px) ? k : best), 0);
      if (near !== state.i) { state.i = near; draw(); }
    };
    hot.onpointerdown = go;
    hot.onpointermove = (event) => { if (event.buttons) go(event); };
  }

  function table() {
    const base = sum(over("mse")), now = KEYS.map((m) => over(m)[state.i]), most = Math.max.apply(null, now.slice(1).map((row) => row.round + row.cut));
    KEYS.forEach(function (method, k) {
      const head = at("row-" + method), row = now[k], total = row.round + row.cut, bars = head.nextElementSibling;
      head.className = method + (method === state.method ? " chosen" : "");
      head.querySelector("input").checked = method === state.method;
      head.cells[1].textContent = fixed(dB(total / row.power));
      head.cells[2].textContent = method === "mse" ? "0.0" : signed(dB(sum(over(method)) / base));
      Object.assign(head.dataset, { step: row.s, round: row.round, cut: row.cut, over: sum(over(method)) });
      bars.querySelector(".round").style.width = 100 * Math.min(1, row.round / most) + "%";
      bars.querySelector(".cut").style.width = 100 * Math.min(1 - Math.min(1, row.round / most), row.cut / most) + "%";
    });
  }

  function insight() {
    const mine = over(state.method)[state.i], best = over("table")[state.i], lost = dB((mine.round + mine.cut) / (best.round + best.cut));
    const who = { minmax: "the min-max interval", mse: "the best constant", table: "the table\u2019s interval", tdq: "TDQ\u2019s interval", yours: "your interval" }[state.method];
    let text = "At t\u00a0=\u00a0" + short(model().t[state.i]) + ", " + who + " ends at " + short(mine.end) + ": ";
    text += (mine.outside > 0 ? percent(mine.outside) + " of the values are cut off, and truncation makes " + percent(mine.cut / (mine.round + mine.cut)) + " of the error." : "nothing is cut off, and all of the error is rounding.");
    if (state.method !== "table" && lost > 0.05) text += " The best one for this t ends " + (best.end > mine.end ? "farther" : "nearer") + ", at " + short(best.end) + ": its error is " + lost.toFixed(1) + "\u00a0dB lower.";
    else if (state.method !== "table") text += " No interval is better here by more than 0.05\u00a0dB.";
    else text += " No interval is better here: it was searched for at this t.";
    const all = (m) => dB(sum(over(m)) / sum(over("mse")));
    text += " Over all t, TDQ\u2019s error is " + Math.abs(all("tdq")).toFixed(1) + "\u00a0dB " + (all("tdq") > 0 ? "above" : "below") + " the best constant\u2019s; the table\u2019s, " + Math.abs(all("table")).toFixed(1) + "\u00a0dB below.";
    at("insight").setAttribute("aria-live", playing || dragging ? "off" : "polite");
    at("insight").textContent = text;
  }

  function draw() {
    const t = model().t;
    at("t").value = state.i;
    at("t").setAttribute("aria-valuetext", "t = " + short(t[state.i]));
    at("told").textContent = short(t[state.i]);
    at("where").textContent = "at t = " + short(t[state.i]) + ", " + state.bits + " bits: " + Math.pow(2, state.bits) + " levels";
    insight();
    chart();
    table();
    const reach = KEYS.map((m) => over(m).map((row) => row.end)), highest = Math.max.apply(null, reach.flat());
    overTime("ends", 190, "Upper end of the interval over t", (m) => over(m).map((row) => row.end), 0, 1.05 * highest, "upper end, units of the input");
    const loss = (m) => over(m).map((row) => dB((row.round + row.cut) / row.power)), every = KEYS.map(loss).flat();
    overTime("errors", 190, "Error over t", loss, Math.min.apply(null, every) - 1, Math.min(0, Math.max.apply(null, every)) + 1, "error / mean square of the values (dB)");
    remember();
  }

  // ---- what a reader does -------------------------------------------------------------------------------------------

  function choose(method) { state.method = method; draw(); }
  function drag(end) {
    const f = frame(), widest = f.high;
    state.end = Math.min(widest, Math.max(widest / 60, end));
    choose("yours");
  }
  function snap() { const one = layer(), s = one.table[state.bits][state.i]; drag(s * top(state.bits, one.low) + (one.low || 0)); }
  function constant() { const one = layer(); state.end = one.mse[state.bits] * top(state.bits, one.low) + (one.low || 0); }

  function stop() {
    clearInterval(playing);
    playing = null;
    at("play").setAttribute("aria-label", "Play over t");
    at("play").querySelector("path").setAttribute("d", "M5 3l12 7-12 7z");
  }
  function play() {
    if (playing) { stop(); draw(); return; }
    if (state.i === model().t.length - 1) state.i = 0;
    at("play").setAttribute("aria-label", "Pause");
    at("play").querySelector("path").setAttribute("d", "M4 3h4v14h-4zM12 3h4v14h-4z");
    playing = setInterval(function () {
      if (state.i === model().t.length - 1) { stop(); draw(); return; }
      state.i += 1;
      draw();
    }, 350);
    draw();
  }

  /* The address holds what is shown, to be shared; where there is none, as inside of another page, nothing happens. */
  function remember() {
    const now = { model: state.model, layer: layer().name, bits: state.bits, t: model().t[state.i], by: state.method };
    if (state.method === "yours") now.end = short(state.end);
    try { history.replaceState(null, "", "#" + new URLSearchParams(now)); } catch (error) { /* a page without an address */ }
  }
  function recall() {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (models[asked.get("model")]) state.model = Number(asked.get("model"));
    fillLayers();
    const found = model().layers.findIndex((one) => one.name === asked.get("layer"));
    if (found >= 0) state.layer = found;
    if (model().bits.includes(Number(asked.get("bits")))) state.bits = Number(asked.get("bits"));
    state.i = Math.max(0, asked.has("t") ? model().t.indexOf(Number(asked.get("t"))) : 0);
    if (asked.get("by") in METHODS) state.method = asked.get("by");
    constant();
    if (Number(asked.get("end")) > 0) state.end = Number(asked.get("end"));
  }

  function gain(one) {
    const was = [state.layer, state.bits];
    state.layer = model().layers.indexOf(one);
    state.bits = model().bits.includes(5) ? 5 : model().bits[0];
    const found = dB(sum(over("mse")) / sum(over("table")));
    [state.layer, state.bits] = was;
    return found;
  }
  function fillLayers() {
    if (!model().bits.includes(state.bits)) state.bits = model().bits[Math.floor(model().bits.length / 2)];
    const gains = model().layers.map(gain);
    at("layer").replaceChildren(...model().layers.map((one, k) => new Option(gains[k].toFixed(1) + " dB \u00b7 " + one.name, k)));
    state.layer = gains.indexOf(Math.max.apply(null, gains));
    at("bits").replaceChildren(...model().bits.map(function (bits) {
      const label = document.createElement("label"), input = document.createElement("input"), shown = document.createElement("span");
      Object.assign(input, { type: "radio", name: "bits", value: bits, onchange: () => { state.bits = bits; if (state.method !== "yours") constant(); draw(); } });
      input.setAttribute("aria-label", bits + " bits");
      shown.textContent = bits;
      label.append(input, shown);
      return label;
    }));
    at("t").max = model().t.length - 1;
    at("note").textContent = "Recorded: " + model().note + "; " + model().layers.length + " layers, those that are quantized. Decibels in the list of layers: by how much "
      + "a free interval for each t lowers a layer\u2019s error at 5 bits. Histograms are joined to at most 256 bins, so errors are right to about a tenth of a decibel.";
  }

  KEYS.forEach(function (method) {
    const body = at("methods").tBodies[0], head = body.insertRow(), bars = body.insertRow(), label = document.createElement("label"), input = document.createElement("input");
    head.id = "row-" + method;
    bars.className = "bars";
    Object.assign(input, { type: "radio", name: "method", onchange: () => choose(method) });
    const mark = document.createElementNS(SVG, "svg");
    mark.setAttribute("viewBox", "0 0 27 12");
    mark.setAttribute("aria-hidden", "true");
    part(mark, "path", { d: "M1 6h25", class: "curve " + method });
    label.append(input, mark, METHODS[method]);
    head.insertCell().append(label);
    head.insertCell();
    head.insertCell();
    const wide = bars.insertCell(), meter = document.createElement("div");
    wide.colSpan = 3;
    meter.className = "meter";
    meter.innerHTML = '<i class="round"></i><i class="cut"></i>';
    wide.append(meter);
  });
  at("model").replaceChildren(...models.map((one, k) => new Option(one.title, k)));
  recall();
  at("model").value = state.model;
  at("layer").value = state.layer;
  const bitsShown = () => { for (const input of at("bits").querySelectorAll("input")) input.checked = Number(input.value) === state.bits; };
  bitsShown();
  at("model").onchange = function () { stop(); state.model = Number(this.value); state.i = 0; fillLayers(); at("layer").value = state.layer; bitsShown(); constant(); draw(); };
  at("layer").onchange = function () { state.layer = Number(this.value); constant(); if (state.method === "yours") state.method = "mse"; draw(); };
  at("t").oninput = function () { stop(); state.i = Number(this.value); draw(); };
  at("play").onclick = play;
  new ResizeObserver(draw).observe(at("chart"));
  draw();
})();
