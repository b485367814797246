// What the page holds: arrays are unpacked when they are first needed.
const content = JSON.parse(document.getElementById("qs-data").textContent);
const text = content.text;
const BITS = [16, 8, 4, 2];
const ACTIVE = 1, WRITTEN = 2, HELD = 4, WEIGHED = 8;
const PARTS = { H: "halting", K: "KV skipping", F: "fusion", Q: "quantization" };
const byId = (id) => document.getElementById(id);

function halfToFloat(half) {
  const sign = half & 0x8000 ? -1 : 1, exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const READERS = {
  u1: (bytes) => bytes,
  u2: (bytes) => new Uint16Array(bytes.buffer),
  i4: (bytes) => new Int32Array(bytes.buffer),
  f4: (bytes) => new Float32Array(bytes.buffer),
  f2: (bytes) => Float32Array.from(new Uint16Array(bytes.buffer), halfToFloat),
};

async function unpack(stored) {
  const packed = Uint8Array.from(atob(stored.data), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = Number(stored.kind[1]), count = planes.length / size;
  const bytes = new Uint8Array(planes.length);
  for (let k = 0; k < size; k++)
    for (let j = 0; j < count; j++) bytes[j * size + k] = planes[k * count + j];
  return READERS[stored.kind](bytes);
}

const unpacked = new Map();
function arrayAt(place) {
  if (!unpacked.has(place)) unpacked.set(place, unpack(content.arrays[place]));
  return unpacked.get(place);
}

// The representative of every token in every layer, from where it changes.
function fusedMap(changes) {
  const { layers, tokens } = text, fused = new Int32Array(layers * tokens);
  let next = 0;
  for (let l = 0; l < layers; l++) {
    for (let t = 0; t < tokens; t++) fused[l * tokens + t] = l ? fused[(l - 1) * tokens + t] : t;
    for (; next < changes.length && changes[next] === l + 1; next += 3)
      fused[l * tokens + changes[next + 1]] = changes[next + 2];
  }
  return fused;
}

// Layers each token had run when it was first absorbed, and when it first absorbed; L for never.
function fusionLayers(changes) {
  const absorbed = new Int32Array(text.tokens).fill(text.layers);
  const merged = new Int32Array(text.tokens).fill(text.layers);
  for (let i = 0; i < changes.length; i += 3) {
    const [layer, from, to] = [changes[i] - 1, changes[i + 1], changes[i + 2]];
    absorbed[from] = Math.min(absorbed[from], layer);
    merged[to] = Math.min(merged[to], layer);
  }
  return { absorbed, merged };
}

const loaded = new Map();
// A run with its arrays; signals that are not stored for it are null.
function runOf(preset, letters) {
  const key = preset + "/" + letters;
  if (!loaded.has(key)) loaded.set(key, loadRun(preset, letters));
  return loaded.get(key);
}

async function loadRun(index, letters) {
  const preset = text.presets[index], stored = preset.runs[letters];
  const names = Object.keys(stored.arrays);
  const arrays = await Promise.all(names.map((name) => arrayAt(stored.arrays[name])));
  const run = { ...stored, preset, signals: {} };
  names.forEach((name, i) => (run[name] = arrays[i]));
  for (const name of Object.keys(preset.signals)) run.signals[name] = run[name] ?? null;
  run.fusedMap = fusedMap(run.fused);
  Object.assign(run, fusionLayers(run.fused));
  run.title = letters
    ? `${preset.name}: ${[...letters].map((letter) => PARTS[letter]).join(", ")}`
    : "dense model";
  return run;
}

// Layers count from 1.
const at = (layer, token) => (layer - 1) * text.tokens + token;
const flag = (run, layer, token, which) => (run.cells[at(layer, token)] & which) !== 0;
const bitsOf = (run, layer, token) => BITS[run.cells[at(layer, token)] >> 4];
const isHalted = (run, layer, token) => layer > run.depth[token];
const isAbsorbed = (run, layer, token) => run.fusedMap[at(layer, token)] !== token;

function stateOf(run, layer, token) {
  if (isHalted(run, layer, token)) return "halted";
  if (isAbsorbed(run, layer, token)) return "absorbed";
  return run.subject[token] ? "runs" : "other";
}

// Signals on offer as the colour of the timeline; the first is what the preset's rule reads.
function colourings(preset) {
  const names = { ...preset.signals };
  const found = [];
  if (preset.thresholds.drift) found.push(["score", "halting score max(τ − drift, 0)"]);
  for (const name of ["received", "drift", "entropy", "bits_entropy"])
    if (names[name]) found.push([name, names[name]]);
  return found;
}

function signalAt(run, name, layer, token) {
  if (name !== "score") return run.signals[name] ? run.signals[name][at(layer, token)] : NaN;
  const tau = run.preset.thresholds.drift?.[layer - 1];
  if (tau === null || tau === undefined || !run.signals.drift) return NaN;
  const drift = run.signals.drift[at(layer, token)];
  return Number.isNaN(drift) ? NaN : Math.max(tau - drift, 0);
}

function told(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en");
  return Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3)
    ? value.toExponential(digits - 1)
    : value.toPrecision(digits);
}
const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
