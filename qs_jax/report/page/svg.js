// Small pieces of SVG: axes, lines, bars, and a table that says the same in numbers.
function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function ticks(low, high, count = 5) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * unit).find((n) => n >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

function logTicks(low, high) {
  const found = [], first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  for (let k = first; k <= last; k++)
    for (const digit of last - first > 3 ? [1] : [1, 2, 5]) found.push(digit * 10 ** k);
  return found.filter((value) => value >= low && value <= high);
}

const plain = (value) => (+value.toPrecision(6)).toLocaleString("en", { maximumSignificantDigits: 6 });

// A frame with axes. Returns the svg element, scales x and y, and the plot's edges.
function frame(holder, options) {
  const width = Math.max(holder.clientWidth, 260), height = options.height ?? 260;
  const box = { left: options.left ?? 62, right: width - 14, top: 10, bottom: height - 42 };
  const root = svg("svg", {
    width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.label,
  });
  const [xLow, xHigh] = options.x, [yLow, yHigh] = options.y;
  const scaleY = options.log ? Math.log10 : (value) => value;
  const x = (value) => box.left + ((value - xLow) / (xHigh - xLow || 1)) * (box.right - box.left);
  const y = (value) =>
    box.bottom -
    ((scaleY(value) - scaleY(yLow)) / (scaleY(yHigh) - scaleY(yLow) || 1)) * (box.bottom - box.top);
  const format = options.format ?? plain;
  const across = Math.max(3, Math.min(10, Math.floor((box.right - box.left) / 90)));
  for (const value of options.log ? logTicks(yLow, yHigh) : ticks(yLow, yHigh)) {
    root.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }));
    root.append(svg("text", { x: box.left - 6, y: y(value) + 4, "text-anchor": "end" }, format(value)));
  }
  for (const value of options.xTicks ?? ticks(xLow, xHigh, across)) {
    const label = (options.xFormat ?? plain)(value);
    root.append(svg("text", { x: x(value), y: box.bottom + 17, "text-anchor": "middle" }, label));
  }
  root.append(svg("path", { class: "axis", d: `M${box.left},${box.top}V${box.bottom}H${box.right}` }));
  const centre = (box.left + box.right) / 2, middle = (box.top + box.bottom) / 2;
  const turned = `rotate(-90 14 ${middle})`;
  root.append(svg("text", { x: centre, y: height - 6, "text-anchor": "middle" }, options.xLabel));
  root.append(svg("text", { x: 14, y: middle, "text-anchor": "middle", transform: turned }, options.yLabel));
  holder.append(root);
  return { root, x, y, box };
}

// Points are [x, y]; a y that is not a number breaks the line.
function path(plot, points) {
  let drawn = "", pen = false;
  for (const [px, py] of points) {
    if (!Number.isFinite(py)) { pen = false; continue; }
    drawn += `${pen ? "L" : "M"}${plot.x(px).toFixed(1)},${plot.y(py).toFixed(1)}`;
    pen = true;
  }
  return drawn;
}

function line(plot, points, color, more = {}) {
  const made = svg("path", { d: path(plot, points), fill: "none", stroke: color, "stroke-width": 2, ...more });
  plot.root.append(made);
  return made;
}

function band(plot, lower, upper, color) {
  const there = lower.map((_, i) => i).filter((i) => Number.isFinite(lower[i][1]));
  if (there.length < 2) return;
  const around = [...there.map((i) => upper[i]), ...there.reverse().map((i) => lower[i])];
  plot.root.append(svg("path", { d: path(plot, around) + "Z", fill: color, opacity: 0.18 }));
}

function rule(plot, value, color, name, vertical = true) {
  const { box, root } = plot;
  const place = vertical ? plot.x(value) : plot.y(value);
  const ends = vertical
    ? { x1: place, x2: place, y1: box.top, y2: box.bottom }
    : { x1: box.left, x2: box.right, y1: place, y2: place };
  root.append(svg("line", { ...ends, stroke: color, "stroke-width": 1.5, "stroke-dasharray": "5 4" }));
  const where = vertical
    ? place > box.right - 60
      ? { x: place - 4, y: box.top + 10, "text-anchor": "end" }
      : { x: place + 4, y: box.top + 10 }
    : { x: box.right - 4, y: place - 4, "text-anchor": "end" };
  root.append(svg("text", where, name));
}

const MARKS = {
  circle: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  square: (r) => `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}Z`,
  triangle: (r) => `M0,${-1.2 * r}L${1.1 * r},${r}H${-1.1 * r}Z`,
  star: (r) => {
    const points = [...Array(10).keys()].map((k) => {
      const far = k % 2 ? 0.5 * r : 1.35 * r, angle = (Math.PI * k) / 5 - Math.PI / 2;
      return `${(far * Math.cos(angle)).toFixed(2)},${(far * Math.sin(angle)).toFixed(2)}`;
    });
    return `M${points.join("L")}Z`;
  },
};

function mark(plot, px, py, shape, color, title, size = 4.5, opacity = 1) {
  plot.root.append(svg("path", {
    d: MARKS[shape](size), fill: color, "fill-opacity": opacity, stroke: color,
    transform: `translate(${plot.x(px)} ${plot.y(py)})`,
  }, svg("title", {}, title)));
}

// entries: [name, color, dash or mark]
function legend(holder, entries) {
  const row = element("div", { class: "legend" });
  for (const [name, color, style] of entries) {
    const sample = svg("svg", { width: 24, height: 12, "aria-hidden": "true", style: "width:24px" });
    if (style in MARKS)
      sample.append(svg("path", { d: MARKS[style](4.5), fill: color, transform: "translate(12 6)" }));
    else if (style === "box")
      sample.append(svg("rect", { x: 2, y: 1, width: 20, height: 10, fill: color }));
    else
      sample.append(svg("path", {
        d: "M0,6H24", stroke: color, "stroke-width": 2.5, "stroke-dasharray": style ?? "none",
      }));
    row.append(element("span", {}, sample, name));
  }
  holder.append(row);
}

// Head and body of a table; the first cell of a row names it.
function tableParts(heads, rows) {
  const cells = (row) => row.map((cell, i) => element(i ? "td" : "th", i ? {} : { scope: "row" }, cell));
  return [
    element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells(row)))),
  ];
}

function numbersTable(holder, heads, rows, name = "The numbers") {
  const scroll = element("div", { class: "scroll" }, element("table", {}, ...tableParts(heads, rows)));
  if (name) holder.append(element("details", {}, element("summary", {}, name), scroll));
  else holder.append(scroll);
}

// Groups of bars: groups [{name, values: [number or null]}], series [{name, color}].
function bars(holder, groups, series, options) {
  const values = groups.flatMap((group) => group.values).filter(Number.isFinite);
  const low = Math.min(0, ...values), high = Math.max(0, ...values) || 1;
  const room = (high - low) * 0.12;
  const narrow = holder.clientWidth / groups.length < 105;
  const plot = frame(holder, {
    height: 250, x: [0, groups.length], y: [low < 0 ? low - room : 0, high + room], xTicks: [], xLabel: "",
    ...options,
  });
  const step = plot.x(1) - plot.x(0), width = (step * 0.72) / series.length;
  groups.forEach((group, g) => {
    group.values.forEach((value, s) => {
      if (!Number.isFinite(value)) return;
      const left = plot.x(g) + step * 0.14 + s * width;
      const title = `${group.name}, ${series[s].name}: ${options.format(value)}`;
      plot.root.append(svg("rect", {
        x: left + 1, width: Math.max(width - 2, 1), fill: series[s].color,
        y: Math.min(plot.y(value), plot.y(0)), height: Math.max(Math.abs(plot.y(value) - plot.y(0)), 0.5),
      }, svg("title", {}, title)));
      if (width > 34) {
        const y = value < 0 ? plot.y(value) + 13 : plot.y(value) - 4;
        plot.root.append(svg("text", { x: left + width / 2, y, "text-anchor": "middle" }, options.format(value)));
      }
    });
    const centre = plot.x(g) + step / 2;
    const where = narrow
      ? { x: centre, y: plot.box.bottom + 12, "text-anchor": "end",
          transform: `rotate(-28 ${centre} ${plot.box.bottom + 12})` }
      : { x: centre, y: plot.box.bottom + 16, "text-anchor": "middle" };
    plot.root.append(svg("text", where, group.name));
  });
  plot.root.append(svg("path", { class: "axis", d: `M${plot.box.left},${plot.y(0)}H${plot.box.right}` }));
}
