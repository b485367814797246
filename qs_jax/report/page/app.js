// State, controls and drawing. Everything shown follows from `state`.
const SIDES = ["a", "b"];
const state = {
  a: { preset: 0, letters: "" }, b: { preset: 0, letters: "" }, layer: 1, token: 0, start: 0, span: 1, colour: "",
};
// What a map says where a run has nothing to show in it.
const EMPTY = {
  timeline: (s) => !s.halted && "no token halted",
  kv: (s) => !s.kv_bytes_saved && "every key and value is held",
  bits: (s) => !s.quantised && "nothing is quantised",
  fusion: (s) => !s.fused && "no tokens fused",
};
const STEP = 350; // milliseconds a layer while playing
let runs = [], ids = [], timer = null, waiting = false;

async function chooseRuns() {
  runs = await Promise.all(SIDES.map((side) => runOf(state[side])));
  const offered = new Map(runs.flatMap((run) => signalsOf(run.preset))), select = byId("colour");
  select.replaceChildren(...[...offered].map(([name, label]) => element("option", { value: name }, label)));
  // What the rule reads, unless it is the same everywhere: where nothing is near its threshold.
  if (!offered.has(state.colour)) state.colour = [...offered.keys()].find(colourRange) ?? [...offered.keys()][0];
  select.value = state.colour;
  SIDES.forEach((side, i) => {
    showSwitches(side);
    const captions = document.querySelectorAll(`figcaption[data-name="${side}"]`);
    for (const caption of captions) {
      const empty = EMPTY[caption.closest("section").id]?.(runs[i].summary);
      caption.textContent = runs[i].title + (empty ? ` (${empty})` : "");
    }
  });
  compare(runs);
  drawCounts(runs);
  draw();
}

function draw() {
  if (!waiting) requestAnimationFrame(drawNow);
  waiting = true;
}

function drawNow() {
  waiting = false;
  byId("layer").value = state.layer;
  byId("layer-value").textContent = `${state.layer} of ${text.layers}`;
  byId("start").max = text.tokens - state.span;
  byId("start").value = state.start;
  byId("start-value").textContent = `${state.start}–${state.start + state.span - 1} of ${text.tokens}`;
  drawLegends();
  SIDES.forEach((side, i) => {
    paintText(side, runs[i]);
    for (const kind of Object.keys(MAPS)) drawMap(byId(`${kind}-${side}`), kind, runs[i]);
  });
  showDetail(runs);
  drawSignals(runs);
}

function moveTo(token, layer) {
  const before = state.token;
  state.token = clamp(token, 0, text.tokens - 1);
  state.layer = clamp(layer, 1, text.layers);
  state.start = clamp(state.start, state.token - state.span + 1, state.token);
  if (state.token !== before) for (const side of SIDES) scrollTo(byId("text-" + side), byId(side + state.token));
  draw();
}

// Without moving the page itself.
function scrollTo(holder, child) {
  const top = child.offsetTop - holder.offsetTop;
  if (top < holder.scrollTop || top > holder.scrollTop + holder.clientHeight - 30)
    holder.scrollTop = top - holder.clientHeight / 2;
}

function zoom(factor) {
  const centre = clamp(state.token, state.start, state.start + state.span - 1);
  const share = (centre - state.start) / state.span;
  state.span = clamp(Math.round(state.span * factor), Math.min(8, text.tokens), text.tokens);
  state.start = clamp(Math.round(centre - share * state.span), 0, text.tokens - state.span);
  draw();
}

function steer(event) {
  const far = event.shiftKey ? 10 : 1, { token, layer } = state;
  const moves = {
    ArrowLeft: () => moveTo(token - far, layer), ArrowRight: () => moveTo(token + far, layer),
    ArrowUp: () => moveTo(token, layer + far), ArrowDown: () => moveTo(token, layer - far),
    Home: () => moveTo(0, layer), End: () => moveTo(text.tokens - 1, layer),
    "+": () => zoom(1 / 1.5), "=": () => zoom(1 / 1.5), "-": () => zoom(1.5),
  };
  if (!moves[event.key]) return;
  moves[event.key]();
  event.preventDefault();
}

function play(on) {
  clearInterval(timer);
  timer = null;
  const button = byId("play");
  button.textContent = on ? "❚❚" : "▶";
  button.setAttribute("aria-pressed", String(on));
  if (!on) return;
  if (state.layer === text.layers) moveTo(state.token, 1);
  timer = setInterval(() => (state.layer >= text.layers ? play(false) : moveTo(state.token, state.layer + 1)), STEP);
}

const boxesOf = (side) => Object.keys(PARTS).map((letter) => [letter, byId(`${letter}-${side}`)]);

// The run nearest to the chosen one that has a mechanism on or off: KV skipping brings halting along.
function nearest({ preset, letters }, letter, on) {
  const apart = (other) => Object.keys(PARTS).filter((l) => letters.includes(l) !== other.includes(l)).length;
  const fitting = Object.keys(text.presets[preset].runs).filter((other) => other.includes(letter) === on);
  return fitting.sort((x, y) => apart(x) - apart(y))[0];
}

function showSwitches(side) {
  for (const [letter, box] of boxesOf(side)) {
    box.checked = state[side].letters.includes(letter);
    box.disabled = nearest(state[side], letter, !box.checked) === undefined;
  }
}

function wireSwitches(side) {
  const select = byId("preset-" + side);
  select.append(...text.presets.map((preset, i) => element("option", { value: i }, preset.name)));
  const choose = (preset, letters) => {
    state[side] = { preset, letters };
    chooseRuns().catch(showProblem);
  };
  select.addEventListener("change", () => {
    const preset = text.presets[+select.value], { letters } = state[side];
    choose(+select.value, letters in preset.runs ? letters : preset.letters);
  });
  for (const [letter, box] of boxesOf(side))
    box.addEventListener("change", () => choose(state[side].preset, nearest(state[side], letter, box.checked)));
}

// Keys, hovering and clicking on the text or a map; `locate` gives the cell of an event, or null.
function wireView(node, side, locate) {
  node.addEventListener("keydown", steer);
  node.addEventListener("pointermove", (event) => showTip(event, runs[SIDES.indexOf(side)], locate(event)));
  node.addEventListener("pointerleave", (event) => showTip(event, null, null));
  node.addEventListener("click", (event) => {
    const cell = locate(event);
    if (cell) moveTo(cell.token, cell.layer);
  });
}

function wire() {
  byId("layer").addEventListener("input", (event) => moveTo(state.token, +event.target.value));
  byId("play").addEventListener("click", () => play(timer === null));
  byId("start").addEventListener("input", (event) => {
    state.start = +event.target.value;
    draw();
  });
  const factors = { in: 1 / 1.5, out: 1.5, all: Infinity };
  for (const [name, factor] of Object.entries(factors)) byId("zoom-" + name).addEventListener("click", () => zoom(factor));
  byId("colour").addEventListener("change", (event) => {
    state.colour = event.target.value;
    draw();
  });
  for (const side of SIDES) {
    wireSwitches(side);
    wireView(byId("text-" + side), side, ({ target: { dataset } }) =>
      (dataset.token === undefined ? null : { token: +dataset.token, layer: state.layer }));
    for (const kind of Object.keys(MAPS)) {
      const canvas = byId(`${kind}-${side}`);
      wireView(canvas, side, (event) => cellAt(canvas, kind, event));
    }
  }
}

function showProblem(error) {
  byId("problem").hidden = false;
  byId("problem").textContent =
    `This page could not be drawn; it needs Chrome 111, Firefox 113 or Safari 16.4, or later. ${error.message}`;
  throw error;
}

function redraw() {
  drawFiles();
  if (runs.length) chooseRuns().catch(showProblem);
}

async function start() {
  drawFiles();
  if (text) {
    ids = await unpack(text.ids);
    state.a.letters = text.presets[0].letters;
    state.layer = text.layers;
    state.span = Math.min(text.tokens, 256);
    buildText();
    wire();
    const { depth, absorbed } = await runOf(state.a);
    state.token = Math.max(0, text.labels.findIndex((_, t) => depth[t] < text.layers || absorbed[t] < text.layers));
    state.start = clamp(Math.floor(state.token - state.span / 2), 0, text.tokens - state.span);
    await chooseRuns();
  }
  window.addEventListener("resize", redraw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.body.dataset.ready = "yes";
}
start().catch(showProblem);
