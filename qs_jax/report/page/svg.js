// Small pieces of SVG and HTML: axes, lines, legends, tables.
function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function ticks(low, high, count = 5) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * unit).find((n) => n >= rough);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return [...Array(last - first + 1)].map((_, k) => (first + k) * step);
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const digits = last - first > 3 ? [1] : [1, 2, 5];
  const all = [...Array(last - first + 1)].flatMap((_, k) => digits.map((digit) => digit * 10 ** (first + k)));
  return all.filter((value) => value >= low && value <= high);
}

const plain = (value) => value.toLocaleString("en", { maximumSignificantDigits: 6 });

// A frame with axes: the svg element and the scales x and y.
function frame({ width, height, x: [xLow, xHigh], y: [yLow, yHigh], log, ...options }) {
  const left = 62, right = width - 14, top = 10, bottom = height - 42;
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.label });
  const scale = log ? Math.log10 : (value) => value;
  const x = (value) => left + ((value - xLow) / (xHigh - xLow || 1)) * (right - left);
  const y = (value) =>
    bottom - ((scale(value) - scale(yLow)) / (scale(yHigh) - scale(yLow) || 1)) * (bottom - top);
  const write = (text, attributes) => root.append(svg("text", { "text-anchor": "middle", ...attributes }, text));
  for (const value of log ? logTicks(yLow, yHigh) : ticks(yLow, yHigh)) {
    root.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }));
    write((options.format ?? plain)(value), { x: left - 6, y: y(value) + 4, "text-anchor": "end" });
  }
  for (const value of options.xTicks ?? ticks(xLow, xHigh, clamp((right - left) / 90, 3, 10)))
    write((options.xFormat ?? plain)(value), { x: x(value), y: bottom + 17 });
  root.append(svg("path", { class: "axis", d: `M${left},${top}V${bottom}H${right}` }));
  const middle = (top + bottom) / 2;
  write(options.xLabel, { x: (left + right) / 2, y: height - 6 });
  write(options.yLabel, { x: 14, y: middle, transform: `rotate(-90 14 ${middle})` });
  return { root, x, y };
}

// Points are [x, y]; a y that is not a number breaks the line.
function path(plot, points) {
  let broken = true, d = "";
  for (const [x, y] of points.map(([x, y]) => [plot.x(x), plot.y(y)])) {
    if (Number.isFinite(y)) d += `${broken ? "M" : "L"}${x.toFixed(1)},${y.toFixed(1)}`;
    broken = !Number.isFinite(y);
  }
  return d;
}

function line(plot, points, color, dash = "none") {
  const style = { fill: "none", stroke: color, "stroke-width": 2, "stroke-dasharray": dash };
  plot.root.append(svg("path", { d: path(plot, points), ...style }));
}

function mark(plot, [x, y], { glyph, color }, title) {
  const place = { x: plot.x(x), y: plot.y(y), style: `fill: ${color}`, class: "mark" };
  plot.root.append(svg("text", place, glyph, svg("title", {}, title)));
}

// entries: {name, color, dash or glyph}; a box without either.
function legend(entries) {
  return entries.map(({ name, color, dash, glyph }) => {
    const stroke = svg("path", { d: "M0,6H24", stroke: color, "stroke-width": 2.5, "stroke-dasharray": dash });
    if (dash) return element("span", {}, svg("svg", { width: 24, height: 12, "aria-hidden": "true" }, stroke), name);
    const style = glyph ? `color: ${color}` : `background: ${color}`;
    return element("span", {}, element("i", { style, class: glyph ? "glyph" : "" }, glyph ?? ""), name);
  });
}

const legendRow = (entries) => element("div", { class: "legend" }, ...legend(entries));

// Head and body of a table; the first cell of a row names it.
function tableParts(heads, rows) {
  const cells = (row) => row.map((cell, i) => element(i ? "td" : "th", i ? {} : { scope: "row" }, cell));
  return [
    element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells(row)))),
  ];
}

const table = (heads, rows) => element("div", { class: "scroll" }, element("table", {}, ...tableParts(heads, rows)));
const numbers = (heads, rows) =>
  element("details", {}, element("summary", {}, "The numbers"), table(heads, rows));
