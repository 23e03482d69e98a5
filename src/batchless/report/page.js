"use strict";
// Draws the figures that the page holds as JSON. A colour that begins with "--" is one of the style sheet's variables,
// so that light and dark need no figures of their own.
const figures = JSON.parse(document.getElementById("figures").textContent);
const hidden = new Set();
let counted = "rounds"; // what the horizontal axes count where a figure lets one choose
const touch = matchMedia("(pointer: coarse)").matches; // there a drag scrolls the page; it does not zoom a chart
const config = {
  responsive: true,
  displaylogo: false,
  displayModeBar: !touch,
  modeBarButtons: [["toImage", "resetScale2d"]], // named, because plotly's own choice has one that uploads
};

function coloured(value, key, css) {
  if (Array.isArray(value)) return value.map((item) => coloured(item, key, css));
  if (value !== null && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, coloured(item, name, css)]));
  const variable = typeof value === "string" && /color(scale)?$/.test(key) && value.startsWith("--");
  return variable ? css.getPropertyValue(value).trim() : value;
}

function draw() {
  const css = getComputedStyle(document.documentElement);
  for (const [id, figure] of Object.entries(figures)) {
    const { data, layout, across } = coloured(figure, "", css);
    if (across && across[counted]) {
      data.forEach((trace, index) => (trace.x = across[counted].x[index]));
      Object.assign(layout.xaxis, across[counted].xaxis);
      layout.uirevision = counted; // a zoom into rounds is none into images
    }
    for (const trace of data) trace.visible = !hidden.has(trace.meta);
    layout.dragmode = touch ? false : "zoom";
    Plotly.react(id, data, layout, config);
  }
}

const keys = document.querySelectorAll("button[data-series]");
for (const key of keys) {
  key.addEventListener("click", () => {
    const series = Number(key.dataset.series);
    if (!hidden.delete(series)) hidden.add(series);
    for (const other of keys) other.setAttribute("aria-pressed", String(!hidden.has(Number(other.dataset.series))));
    draw();
  });
}
const axes = document.querySelectorAll("button[data-across]");
for (const axis of axes) {
  axis.addEventListener("click", () => {
    counted = axis.dataset.across;
    for (const other of axes) other.setAttribute("aria-pressed", String(other === axis));
    draw();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
