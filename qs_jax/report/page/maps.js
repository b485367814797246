// Maps of tokens and layers on canvases: halting timeline, KV writes, bit widths, fusion flow.
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const VIRIDIS = "#440154 #482878 #3e4989 #31688e #26828e #1f9e89 #35b779 #6ece58 #b5de2b #fde725".split(" ").map(rgb);
const LEFT = 34, TOP = 6;
const KV_NAMES = {
  written: "written by a token that runs", kept: "written for a token that does not run",
  freed: "written, not needed after the last token", skipped: "not written",
};

function viridis(share) {
  const place = clamp(share, 0, 1) * (VIRIDIS.length - 1), low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[low].map((value, i) => value + (place - low) * (VIRIDIS[low + 1][i] - value));
}

// Of each map: its height, the colour of a cell, and what the colours mean.
const MAPS = {
  timeline: {
    height: 320,
    cell(run, layer, token, [low, high]) {
      if (!run.ran[at(layer, token)]) return "stopped";
      const value = signalAt(run, state.colour, layer, token);
      return Number.isNaN(value) ? "unknown" : viridis((value - low) / (high - low));
    },
    names: {
      stopped: "does not run this layer", unknown: "no such score here", cut: "cut-off: halted",
      absorbed: "cut-off: absorbed",
    },
  },
  kv: { height: 240, cell: kvState, names: KV_NAMES },
  bits: {
    height: 240,
    cell: (run, layer, token) => "bits" + run.bits[at(layer, token)],
    names: { bits16: "not quantised", bits8: "8 bits", bits4: "4 bits", bits2: "2 bits" },
  },
  fusion: {
    height: 300,
    cell(run, layer, token) {
      if (!run.ran[at(layer, token)]) return "stopped";
      if (isAbsorbed(run, layer, token)) return "unknown";
      return layer > run.absorbs[token] ? "absorbed" : "runs-line";
    },
    names: {
      "runs-line": "token on its own", absorbed: "representative of several", halted: "fusion", cut: "cut-off: halted",
      unknown: "absorbed, runs on for its own prediction", stopped: "does not run this layer",
    },
  },
};

function geometry(canvas, kind) {
  const { height } = MAPS[kind], width = Math.max(canvas.clientWidth, 200), named = state.span <= width / 15;
  const bottom = height - (named ? 74 : 22);
  const cell = (width - LEFT - 4) / state.span, row = (bottom - TOP) / text.layers;
  const x = (token) => LEFT + (token - state.start) * cell, y = (layer) => bottom - layer * row; // upper edge
  return { width, height, bottom, cell, row, named, x, y, end: state.start + state.span };
}

// Everything but the cursor is drawn once, and kept until something else changes.
function drawMap(canvas, kind, run) {
  const shape = geometry(canvas, kind), ratio = window.devicePixelRatio || 1;
  const key = [run.key, shape.width, ratio, state.start, state.span, state.colour, colourRange(), css("paper")].join();
  canvas.style.height = shape.height + "px";
  if (canvas.drawn?.key !== key) {
    const still = element("canvas", { width: Math.round(shape.width * ratio), height: Math.round(shape.height * ratio) });
    const pen = still.getContext("2d");
    pen.scale(ratio, ratio);
    drawCells(pen, shape, kind, run);
    if (kind === "timeline" || kind === "fusion") drawCutOffs(pen, shape, run);
    if (kind === "fusion") drawArcs(pen, shape, run);
    drawAxes(pen, shape);
    canvas.drawn = { key, still };
  }
  canvas.width = canvas.drawn.still.width;
  canvas.height = canvas.drawn.still.height;
  const pen = canvas.getContext("2d");
  pen.drawImage(canvas.drawn.still, 0, 0);
  pen.scale(ratio, ratio);
  drawCursor(pen, shape);
}

function drawCells(pen, shape, kind, run) {
  const { span, start } = state, { cell, names } = MAPS[kind], range = colourRange() ?? [0, 1];
  const colours = Object.fromEntries(Object.keys(names).map((name) => [name, rgb(css(name))]));
  const image = new ImageData(span, text.layers);
  for (let i = 0; i < span * text.layers; i++) {
    const colour = cell(run, text.layers - Math.floor(i / span), start + (i % span), range);
    image.data.set([...(typeof colour === "string" ? colours[colour] : colour), 255], 4 * i);
  }
  const grid = (width) => element("canvas", { width, height: text.layers }).getContext("2d"), small = grid(span);
  small.putImageData(image, 0, 0);
  // Where several tokens share a pixel their colours are averaged, but layers never are.
  const across = Math.min(span, Math.round(shape.cell * span)), narrow = grid(across);
  narrow.drawImage(small.canvas, 0, 0, across, text.layers);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(narrow.canvas, LEFT, TOP, shape.cell * span, shape.bottom - TOP);
  if (shape.cell < 6) return;
  pen.fillStyle = css("paper"); // gaps between tokens
  for (let t = start; t <= shape.end; t++) pen.fillRect(shape.x(t) - 0.3, TOP, 0.6, shape.bottom - TOP);
}

function drawCutOffs(pen, shape, run) {
  const halted = css("cut"), absorbed = css("absorbed");
  for (let t = state.start; t < shape.end; t++) {
    let last = run.depth[t];
    while (last > 0 && !run.ran[at(last, t)]) last--;
    pen.fillStyle = last < run.depth[t] ? absorbed : halted;
    if (last < text.layers) pen.fillRect(shape.x(t), shape.y(last) - 1.5, Math.max(shape.cell, 1), 3);
  }
}

// From each token to the one it first fuses into.
function drawArcs(pen, shape, run) {
  pen.strokeStyle = pen.fillStyle = css("halted");
  pen.lineWidth = shape.cell < 3 ? 0.8 : 1.4;
  for (let t = state.start; t < shape.end; t++) {
    if (run.absorbed[t] >= text.layers) continue;
    const y = shape.y(run.absorbed[t]), x = shape.x(t) + shape.cell / 2;
    const reach = shape.x(run.fused[at(run.absorbed[t] + 1, t)]) + shape.cell / 2;
    pen.beginPath();
    pen.moveTo(x, y);
    pen.quadraticCurveTo((x + reach) / 2, y - Math.min(12, 4 + (reach - x) / 3), reach, y);
    pen.stroke();
    if (shape.cell >= 5) pen.fillRect(reach - 2, y - 2, 4, 4);
  }
}

function drawAxes(pen, shape) {
  pen.fillStyle = css("ink");
  pen.font = "11px system-ui, sans-serif";
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (const layer of ticks(1, text.layers, (shape.bottom - TOP) / 20).filter(Number.isInteger))
    pen.fillText(layer, LEFT - 5, shape.y(layer) + shape.row / 2);
  if (shape.named) {
    for (let t = state.start; t < shape.end; t++) {
      pen.save();
      pen.translate(shape.x(t) + shape.cell / 2 + 1, shape.bottom + 5);
      pen.rotate(-Math.PI / 3.2);
      pen.fillText(shortened(text.labels[t], 10), 0, 2);
      pen.restore();
    }
    return;
  }
  pen.textBaseline = "top";
  pen.textAlign = "center";
  for (const token of ticks(state.start, shape.end - 1, shape.width / 110))
    pen.fillText(token, shape.x(token) + shape.cell / 2, shape.bottom + 5);
}

function shortened(label, most) {
  const letters = [...label.trim()];
  return letters.length > most ? letters.slice(0, most - 1).join("") + "…" : letters.join("") || "␣";
}

function drawCursor(pen, shape) {
  pen.strokeStyle = css("token");
  pen.lineWidth = 1.5;
  pen.setLineDash([4, 3]);
  pen.strokeRect(LEFT, shape.y(state.layer), shape.cell * state.span, shape.row);
  pen.setLineDash([]);
  if (state.token >= state.start && state.token < shape.end)
    pen.strokeRect(shape.x(state.token), TOP, Math.max(shape.cell, 2), shape.bottom - TOP);
}

// The token and layer under a place on the canvas, or null.
function cellAt(canvas, kind, event) {
  const box = canvas.getBoundingClientRect(), shape = geometry(canvas, kind);
  const token = state.start + Math.floor((event.clientX - box.left - LEFT) / shape.cell);
  const layer = Math.floor((shape.bottom - (event.clientY - box.top)) / shape.row) + 1;
  const inside = token >= state.start && token < shape.end && layer >= 1 && layer <= text.layers;
  return inside ? { token, layer } : null;
}

// Ends of a signal's colour scale, over both runs; null where it is the same everywhere or not stored.
function colourRange(name = state.colour) {
  return once(`range ${runs.map((run) => run.key)} ${name}`, () => {
    const values = runs.flatMap((run) => [...(run.signals[name] ?? [])]);
    const ends = [quantile(values, 0.01), quantile(values, 0.95)];
    return ends[1] > ends[0] ? ends : null;
  });
}

function drawLegends() {
  const entries = (names) => Object.entries(names).map(([key, name]) => ({ name, color: css(key) }));
  for (const [kind, { names }] of Object.entries(MAPS)) byId(kind + "-legend").replaceChildren(...legend(entries(names)));
  byId("words-legend").replaceChildren(...legend(entries({
    runs: "runs", halted: "halted", absorbed: "absorbed by a later token", paper: "exempt: the mechanisms do not act on it",
  })));
  const scale = element("i", { class: "scale", style: `background: linear-gradient(to right, ${VIRIDIS.map((c) => `rgb(${c})`)})` });
  const name = byId("colour").selectedOptions[0].textContent, ends = colourRange()?.map((end) => format(end));
  const known = () => [`${name}: ${ends[0]}`, scale, `${ends[1]} (1st to 95th percentile)`];
  byId("timeline-legend").prepend(element("span", {}, ...(ends ? known() : [`${name}: the same everywhere, or not stored`])));
}
