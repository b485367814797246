// What the page holds: arrays are unpacked when they are first needed.
const content = JSON.parse(document.getElementById("qs-data").textContent);
const text = content.text;
const PARTS = { H: "halting", K: "KV skipping", F: "fusion", Q: "quantization" };
const READERS = { u1: Uint8Array, i4: Int32Array, f4: Float32Array };

const cache = new Map();
function once(key, compute) {
  if (!cache.has(key)) cache.set(key, compute());
  return cache.get(key);
}

async function unpack(place) {
  const [kind, data] = content.arrays[place];
  const packed = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = Number(kind[1]), count = planes.length / size;
  return new READERS[kind](planes.map((_, i) => planes[(i % size) * count + Math.floor(i / size)]).buffer);
}

async function unpackAll(places) {
  const arrays = await Promise.all(Object.values(places).map(unpack));
  return Object.fromEntries(Object.keys(places).map((name, i) => [name, arrays[i]]));
}

const runOf = ({ preset, letters }) => once(`run ${preset} ${letters}`, () => loadRun(preset, letters));

// A run with its arrays. `absorbed` and `absorbs`: layers a token had run when it was first absorbed, and when it
// first absorbed another; the number of layers for never.
async function loadRun(index, letters) {
  const preset = text.presets[index], stored = preset.runs[letters];
  const run = { ...stored, ...(await unpackAll(stored.arrays)), preset, key: `${index} ${letters}` };
  run.signals = await unpackAll(stored.signals);
  const tau = preset.thresholds.drift;
  if (tau)
    run.signals.score = run.signals.drift.map((drift, i) => Math.max((tau[Math.floor(i / text.tokens)] ?? NaN) - drift, 0));
  run.absorbed = new Int32Array(text.tokens).fill(text.layers);
  run.absorbs = run.absorbed.slice();
  run.fused.forEach((to, i) => {
    const layer = Math.floor(i / text.tokens), token = i % text.tokens;
    if (to === token) return;
    run.absorbed[token] = Math.min(run.absorbed[token], layer);
    run.absorbs[to] = Math.min(run.absorbs[to], layer);
  });
  const parts = [...letters].map((letter) => PARTS[letter]).join(", ");
  run.title = letters ? `${preset.name}: ${parts}` : "dense model";
  return run;
}

// Layers count from 1.
const at = (layer, token) => (layer - 1) * text.tokens + token;
const isAbsorbed = (run, layer, token) => run.fused[at(layer, token)] !== token;
const signalAt = (run, name, layer, token) => run.signals[name]?.[at(layer, token)] ?? NaN;
// Signals and their names; the first is what the preset's rule reads.
const signalsOf = ({ thresholds, signals }) =>
  Object.entries({ ...(thresholds.drift && { score: "halting score max(τ − drift, 0)" }), ...signals });

function stateOf(run, layer, token) {
  if (layer > run.depth[token]) return "halted";
  if (isAbsorbed(run, layer, token)) return "absorbed";
  return run.eligible[token] ? "runs" : "exempt";
}

function kvState(run, layer, token) {
  const i = at(layer, token);
  if (!run.written[i]) return "skipped";
  if (!run.held[i]) return "freed";
  return run.ran[i] ? "written" : "kept";
}

function quantile(values, share) {
  const sorted = Float64Array.from(values.filter((value) => !Number.isNaN(value))).sort();
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? NaN;
}

function format(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en");
  return Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3)
    ? value.toExponential(digits - 1)
    : value.toPrecision(digits);
}
const share = (value) => `${+(100 * value).toFixed(1)} %`;
const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1).replace(/^-0\.0$/, "0.0")} %`);

// Of a run or an evaluation, for tables.
const SAVINGS = {
  "layer-tokens saved": (row) => percent(row.layer_tokens_saved),
  "FLOPs saved, exact": (row) => percent(row.exact_flops_saved),
  "FLOPs saved, paper": (row) => percent(row.paper_flops_saved),
  "KV bytes saved": (row) => percent(row.kv_bytes_saved),
};

const byId = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const clamp = (value, low, high) => Math.min(Math.max(value, low), Math.max(low, high));

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
