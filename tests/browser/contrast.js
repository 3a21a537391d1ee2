// Texts whose contrast is below AA: 4.5, of large ones 3.
() => {
  const light = (c) => { const v = c.map((x) => x / 255).map((x) => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4); return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
  const parts = (text) => (text.match(/[\d.]+/g) || []).map(Number), bad = [];
  for (const node of document.querySelectorAll("body *")) {
    if (!Array.from(node.childNodes).some((n) => n.nodeType === 3 && n.textContent.trim()) || node.closest("svg, math, script, style, option, [hidden], .skip, .panel")) continue;
    const style = getComputedStyle(node), box = node.getBoundingClientRect();
    if (!box.width || style.visibility === "hidden" || style.color.startsWith("color(")) continue;
    let under = node, back = [0, 0, 0, 0];
    while (under && !(back.length === 3 || back[3] === 1)) { back = parts(getComputedStyle(under).backgroundColor); under = under.parentElement; }
    const a = light(parts(style.color).slice(0, 3)), b = light(back.slice(0, 3)), ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.6 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) bad.push([node.tagName, node.className, node.textContent.trim().slice(0, 30), ratio.toFixed(2)].join(" "));
  }
  return [...new Set(bad)].slice(0, 8);
}
