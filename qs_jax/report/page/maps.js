// Maps of tokens and layers on canvases: halting timeline, KV writes, bit widths, fusion flow.
const VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"
  .split(" ").map(rgb);

function rgb(hex) {
  const value = parseInt(hex.replace("#", ""), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

function viridis(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2), part = place - low;
  return VIRIDIS[low].map((value, i) => Math.round(value + part * (VIRIDIS[low + 1][i] - value)));
}

const HEIGHT = { timeline: 320, kv: 240, bits: 240, fusion: 300 };
const LEFT = 34, TOP = 6;
const KV_STATES = ["written", "kept", "freed", "skipped"];
const KV_NAMES = {
  written: "written by a token that runs", kept: "written for a token that does not run",
  freed: "written, not needed after the last token", skipped: "not written",
};

function kvState(run, layer, token) {
  if (!flag(run, layer, token, WRITTEN)) return "skipped";
  if (!flag(run, layer, token, HELD)) return "freed";
  return flag(run, layer, token, ACTIVE) ? "written" : "kept";
}

// Colour of a cell of each map.
function painters(run, range, colours) {
  const share = (value) => (value - range[0]) / (range[1] - range[0] || 1);
  return {
    timeline: (layer, token) => {
      if (!flag(run, layer, token, ACTIVE)) return colours.stopped;
      const value = signalAt(run, state.colour, layer, token);
      return Number.isNaN(value) ? colours.unknown : viridis(share(value));
    },
    kv: (layer, token) => colours[kvState(run, layer, token)],
    bits: (layer, token) => colours["bits" + bitsOf(run, layer, token)],
    fusion: () => colours.paper,
  };
}

function palette() {
  const names = ["stopped", "paper", "bits16", "bits8", "bits4", "bits2", ...KV_STATES];
  const found = Object.fromEntries(names.map((name) => [name, rgb(variable("--" + name))]));
  found.unknown = rgb(variable("--unknown"));
  return found;
}

function geometry(canvas, kind) {
  const width = Math.max(canvas.clientWidth, 200), named = state.span <= width / 15;
  const bottom = HEIGHT[kind] - (named ? 74 : 22);
  const cell = (width - LEFT - 4) / state.span, row = (bottom - TOP) / text.layers;
  return {
    width, height: HEIGHT[kind], bottom, cell, row, named,
    x: (token) => LEFT + (token - state.start) * cell,
    y: (layer) => bottom - layer * row, // upper edge
  };
}

// What does not depend on the cursor is drawn once, and kept until something else changes.
function drawMap(canvas, kind, run, range) {
  const shape = geometry(canvas, kind), ratio = window.devicePixelRatio || 1;
  const key = [run.title, shape.width, ratio, state.start, state.span, state.colour, range, variable("--paper")].join();
  canvas.style.height = shape.height + "px";
  if (canvas.drawn?.key !== key) {
    const still = element("canvas", {
      width: Math.round(shape.width * ratio), height: Math.round(shape.height * ratio),
    });
    const pen = still.getContext("2d");
    pen.scale(ratio, ratio);
    if (kind === "fusion") drawFlow(pen, shape, run);
    else drawCells(pen, shape, painters(run, range, palette())[kind]);
    if (kind === "timeline") drawCutOffs(pen, shape, run);
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

function drawCells(pen, shape, colour) {
  const { span, start } = state, image = new ImageData(span, text.layers);
  for (let layer = 1; layer <= text.layers; layer++)
    for (let i = 0; i < span; i++) {
      const place = 4 * ((text.layers - layer) * span + i);
      image.data.set(colour(layer, start + i), place);
      image.data[place + 3] = 255;
    }
  const small = element("canvas", { width: span, height: text.layers });
  small.getContext("2d").putImageData(image, 0, 0);
  // Where several tokens share a pixel their colours are averaged, but layers never are.
  const across = Math.min(span, Math.round(shape.cell * span));
  const narrow = element("canvas", { width: across, height: text.layers });
  narrow.getContext("2d").drawImage(small, 0, 0, across, text.layers);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(narrow, LEFT, TOP, shape.cell * span, shape.bottom - TOP);
  if (shape.cell < 6) return;
  pen.strokeStyle = variable("--paper");
  pen.lineWidth = 0.6;
  pen.beginPath();
  for (let i = 0; i <= span; i++) {
    pen.moveTo(LEFT + i * shape.cell, TOP);
    pen.lineTo(LEFT + i * shape.cell, shape.bottom);
  }
  pen.stroke();
}

function drawCutOffs(pen, shape, run) {
  const cut = variable("--cut"), absorbedCut = variable("--absorbed");
  for (let t = state.start; t < state.start + state.span; t++) {
    let last = run.depth[t];
    while (last > 0 && !flag(run, last, t, ACTIVE)) last--;
    if (last >= text.layers) continue;
    pen.fillStyle = last < run.depth[t] ? absorbedCut : cut;
    pen.fillRect(shape.x(t), shape.y(last) - 1.5, Math.max(shape.cell, 1), 3);
  }
}

function drawFlow(pen, shape, run) {
  const middle = (token) => shape.x(token) + shape.cell / 2;
  const end = Math.min(state.start + state.span, text.tokens);
  const names = ["--runs-line", "--absorbed", "--line", "--cut"];
  const colours = Object.fromEntries(names.map((name) => [name, variable(name)]));
  const wide = Math.min(Math.max(shape.cell * 0.35, 0.7), 3);
  for (let t = state.start; t < end; t++) {
    const stops = Math.min(run.depth[t], run.absorbed[t]);
    const stroke = (from, to, colour, dash = []) => {
      pen.strokeStyle = colours[colour];
      pen.setLineDash(dash);
      pen.lineWidth = wide;
      pen.beginPath();
      pen.moveTo(middle(t), shape.bottom - from * shape.row);
      pen.lineTo(middle(t), shape.bottom - to * shape.row);
      pen.stroke();
    };
    stroke(0, Math.min(stops, run.merged[t]), "--runs-line");
    if (run.merged[t] < stops) stroke(run.merged[t], stops, "--absorbed");
    if (stops < text.layers && flag(run, stops + 1, t, ACTIVE))
      stroke(stops, text.layers, "--line", [2, 3]); // runs on for its own prediction
    if (run.depth[t] < text.layers && run.depth[t] <= run.absorbed[t]) {
      pen.fillStyle = colours["--cut"];
      pen.fillRect(shape.x(t) + shape.cell * 0.1, shape.y(stops) - 1, Math.max(shape.cell * 0.8, 1), 2);
    }
  }
  pen.setLineDash([]);
  drawArcs(pen, shape, run, middle, end);
}

function drawArcs(pen, shape, run, middle, end) {
  const seen = new Set(), colour = variable("--halted");
  for (let i = 0; i < run.fused.length; i += 3) {
    const [layer, from, to] = [run.fused[i] - 1, run.fused[i + 1], run.fused[i + 2]];
    if (seen.has(from)) continue; // a later change is its representative's
    seen.add(from);
    if (from < state.start || from >= end) continue;
    const y = shape.bottom - layer * shape.row, x = middle(from), reach = middle(to);
    pen.strokeStyle = pen.fillStyle = colour;
    pen.lineWidth = shape.cell < 3 ? 0.8 : 1.4;
    pen.beginPath();
    pen.moveTo(x, y);
    pen.quadraticCurveTo((x + reach) / 2, y - Math.min(12, 4 + (reach - x) / 3), reach, y);
    pen.stroke();
    if (shape.cell < 5) continue;
    pen.fillRect(x - 2, y - 2, 4, 4);
    pen.beginPath();
    pen.moveTo(reach, y);
    pen.lineTo(reach - 5, y - 5);
    pen.lineTo(reach - 6, y + 1);
    pen.fill();
  }
}

function drawAxes(pen, shape) {
  pen.fillStyle = variable("--ink");
  pen.font = "11px system-ui, sans-serif";
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const every = Math.max(1, Math.ceil(14 / shape.row));
  const step = every <= 1 ? 1 : every <= 2 ? 2 : every <= 5 ? 5 : 10;
  for (let layer = 1; layer <= text.layers; layer++)
    if (layer % step === 0 || (layer === 1 && step > 2)) pen.fillText(layer, LEFT - 5, shape.y(layer) + shape.row / 2);
  if (shape.named) {
    for (let t = state.start; t < state.start + state.span; t++) {
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
  for (const token of ticks(state.start, state.start + state.span - 1, shape.width / 110))
    pen.fillText(token, shape.x(token) + shape.cell / 2, shape.bottom + 5);
}

function shortened(label, most) {
  const letters = [...label.trim()];
  return letters.length > most ? letters.slice(0, most - 1).join("") + "…" : letters.join("") || "␣";
}

function drawCursor(pen, shape) {
  pen.strokeStyle = variable("--token");
  pen.lineWidth = 1.5;
  pen.setLineDash([4, 3]);
  pen.strokeRect(LEFT, shape.y(state.layer), shape.cell * state.span, shape.row);
  pen.setLineDash([]);
  const { token } = state;
  if (token >= state.start && token < state.start + state.span)
    pen.strokeRect(shape.x(token), TOP, Math.max(shape.cell, 2), shape.bottom - TOP);
}

// The token and layer under a place on the canvas, or null.
function cellAt(canvas, kind, event) {
  const box = canvas.getBoundingClientRect(), shape = geometry(canvas, kind);
  const token = state.start + Math.floor((event.clientX - box.left - LEFT) / shape.cell);
  const layer = Math.floor((shape.bottom - (event.clientY - box.top)) / shape.row) + 1;
  const inside = token >= state.start && token < state.start + state.span;
  return inside && layer >= 1 && layer <= text.layers ? { token, layer } : null;
}

// Ends of the chosen signal's scale, over both runs; of a long text, over a sample of its tokens.
function colourRange(runs) {
  const values = [], every = Math.ceil((text.layers * text.tokens) / 40000);
  for (const run of runs)
    for (let layer = 1; layer <= text.layers; layer++)
      for (let t = layer % every; t < text.tokens; t += every) {
        const value = signalAt(run, state.colour, layer, t);
        if (!Number.isNaN(value)) values.push(value);
      }
  if (!values.length) return null;
  const sorted = Float64Array.from(values).sort();
  const pick = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  return [pick(0.01), pick(0.95)];
}

function drawLegends(range) {
  const fill = (id, entries, ...more) => {
    const made = entries.map(([name, colour]) => {
      const sample = element("i");
      sample.style.background = variable(colour);
      return element("span", {}, sample, name);
    });
    byId(id).replaceChildren(...more, ...made);
  };
  const scale = element("i", { class: "scale" });
  scale.style.background = `linear-gradient(to right, ${VIRIDIS.map((c) => `rgb(${c})`).join(",")})`;
  const name = byId("colour").selectedOptions[0]?.textContent ?? "";
  const ends = range
    ? [`${name}: ${told(range[0])}`, scale, `${told(range[1])} (1st to 95th percentile)`]
    : [`${name}: not stored for these runs`];
  fill("timeline-legend",
    [["does not run this layer", "--stopped"], ["no such score here", "--unknown"], ["cut-off: halted", "--cut"],
      ["cut-off: absorbed", "--absorbed"]],
    element("span", {}, ...ends));
  fill("kv-legend", KV_STATES.map((kind) => [KV_NAMES[kind], "--" + kind]));
  fill("bits-legend", BITS.map((bits) =>
    [bits === 16 ? "not quantised" : `${bits} bits`, `--bits${bits}`]));
  fill("fusion-legend",
    [["token on its own", "--runs-line"], ["representative of several", "--absorbed"],
      ["fusion", "--halted"], ["halted", "--cut"], ["absorbed, runs on for its own prediction", "--line"]]);
  fill("words-legend",
    [["runs", "--runs"], ["halted", "--halted"], ["absorbed by a later token", "--absorbed"],
      ["not looked at by the mechanisms", "--paper"]]);
}
