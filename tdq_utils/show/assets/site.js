"use strict";
(function () {
  // Panels are drawn by Jupyter's own script; it gives their pictures no text, and their sliders no name.
  const label = function () {
    for (const panel of document.querySelectorAll(".panel")) {
      for (const image of panel.querySelectorAll("img")) if (!image.alt) image.alt = panel.dataset.alt;
      for (const knob of panel.querySelectorAll("[role=slider]")) {
        const name = panel.querySelector(".widget-label");
        if (name && !knob.hasAttribute("aria-label")) knob.setAttribute("aria-label", name.textContent);
      }
    }
  };
  new MutationObserver(label).observe(document.body, { childList: true, subtree: true });
  label();

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = Array.from(table.tHead.rows[0].cells), body = table.tBodies[0];
    heads.forEach(function (head, column) {
      const sort = function () {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const text = (row) => row.cells[column].textContent.trim(), number = (row) => parseFloat(text(row).replace(/,/g, ""));
        const order = function (a, b) {
          const m = number(a), n = number(b);
          if (isNaN(m) || isNaN(n)) return isNaN(m) && isNaN(n) ? text(a).localeCompare(text(b)) : isNaN(m) ? 1 : -1;
          return m - n;
        };
        Array.from(body.rows).sort((a, b) => (down ? order(b, a) : order(a, b))).forEach((row) => body.append(row));
      };
      head.tabIndex = 0;
      head.onclick = sort;
      head.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); } };
    });
  }

  const asked = (new URLSearchParams(location.search).get("q") || "").trim(), hits = document.getElementById("hits");
  if (hits) {
    document.querySelector("input[type=search]").value = asked;
    const words = asked.toLowerCase().split(/\s+/).filter(Boolean), found = [];
    for (const [page, title, anchor, heading, text] of words.length ? window.INDEX : []) {
      const head = (title + " " + heading).toLowerCase(), all = text.toLowerCase();
      if (!words.every((word) => head.includes(word) || all.includes(word))) continue;
      const score = words.reduce((sum, word) => sum + (head.includes(word) ? 10 : 0) + Math.min(5, all.split(word).length - 1), 0);
      found.push({ score, page, title, anchor, heading, text });
    }
    found.sort((a, b) => b.score - a.score);
    for (const one of found.slice(0, 40)) {
      const item = document.createElement("li"), link = document.createElement("a"), line = document.createElement("p");
      link.href = one.page + (one.anchor ? "#" + one.anchor : "");
      link.textContent = one.heading && one.heading !== one.title ? one.title + " \u2013 " + one.heading : one.title;
      const place = Math.max(0, one.text.toLowerCase().indexOf(words[0]) - 80), part = one.text.slice(place, place + 240);
      const split = part.split(new RegExp("(" + words.map((word) => word.replace(/[.*+?^$\x7b\x7d()|[\]\\]/g, "\\$&")).join("|") + ")", "ig"));
      split.forEach(function (piece, k) {
        const node = k % 2 ? document.createElement("mark") : document.createTextNode(piece);
        if (k % 2) node.textContent = piece;
        line.append(node);
      });
      item.append(link, line);
      hits.append(item);
    }
    if (!found.length) hits.append(asked ? "Nothing holds all of these words." : "Type a word above.");
  }
})();
