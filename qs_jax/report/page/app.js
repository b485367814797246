// State, controls and drawing. Everything shown follows from `state`.
const state = { a: { preset: 0, letters: "" }, b: { preset: 0, letters: "" }, layer: 1, token: 0, start: 0, span: 1, colour: "" };
const MAPS = ["timeline", "kv", "bits", "fusion"];
const STEP = 350; // milliseconds a layer while playing
let runs = [], ids = [], range = null, timer = null, drawn = {};

async function chooseRuns() {
  runs = await Promise.all(["a", "b"].map((side) => runOf(state[side].preset, state[side].letters)));
  const offered = new Map(runs.flatMap((run) => colourings(run.preset)));
  const select = byId("colour");
  select.replaceChildren(...[...offered].map(([name, label]) => element("option", { value: name }, label)));
  if (!offered.has(state.colour)) state.colour = preferred(offered);
  select.value = state.colour;
  for (const side of ["a", "b"])
    for (const caption of document.querySelectorAll(`.panel > .pair figcaption[data-name="${side}"]`))
      caption.textContent = runs["ab".indexOf(side)].title;
  range = colourRange(runs);
  compare(runs);
  drawn = {};
  draw();
}

// What the rule reads, unless it is the same everywhere: where nothing is near its threshold.
function preferred(offered) {
  for (const name of offered.keys()) {
    state.colour = name;
    const found = colourRange(runs);
    if (found && found[1] > found[0]) return name;
  }
  return [...offered.keys()][0];
}

let waiting = false;
function draw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawNow();
  });
}

function drawNow() {
  byId("layer").value = state.layer;
  byId("layer-value").textContent = `${state.layer} of ${text.layers}`;
  byId("start").max = text.tokens - state.span;
  byId("start").value = state.start;
  byId("start-value").textContent = `${state.start}–${state.start + state.span - 1} of ${text.tokens}`;
  for (const place of document.querySelectorAll("[data-layer]")) place.textContent = state.layer;
  drawLegends(range);
  ["a", "b"].forEach((side, i) => {
    paintText(side, runs[i]);
    for (const kind of MAPS) drawMap(byId(`${kind}-${side}`), kind, runs[i], range ?? [0, 1]);
  });
  showDetail(runs);
  // Charts that show a layer or a token follow it; the others stay.
  const fresh = drawn.runs !== runs;
  const moved = fresh || drawn.layer !== state.layer, other = moved || drawn.token !== state.token;
  const only = [];
  if (moved || drawn.colour !== state.colour) only.push("entropy");
  if (other) only.push("drift");
  if (fresh) only.push("decay", "cost");
  drawRunCharts(runs, only);
  drawn = { runs, layer: state.layer, token: state.token, colour: state.colour };
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), Math.max(low, high));

function moveTo(token, layer, scroll = false) {
  state.token = clamp(token, 0, text.tokens - 1);
  state.layer = clamp(layer, 1, text.layers);
  if (state.token < state.start) state.start = state.token;
  if (state.token >= state.start + state.span) state.start = state.token - state.span + 1;
  if (scroll) for (const side of ["a", "b"]) scrollTo(byId("text-" + side), byId(side + state.token));
  draw();
}

// Without moving the page itself.
function scrollTo(holder, child) {
  const top = child.offsetTop - holder.offsetTop;
  if (top < holder.scrollTop || top > holder.scrollTop + holder.clientHeight - 30)
    holder.scrollTop = top - holder.clientHeight / 2;
}

function zoom(span) {
  const centre = clamp(state.token, state.start, state.start + state.span - 1);
  const share = (centre - state.start) / state.span;
  state.span = clamp(Math.round(span), Math.min(8, text.tokens), text.tokens);
  state.start = clamp(Math.round(centre - share * state.span), 0, text.tokens - state.span);
  draw();
}

function steer(event) {
  const far = event.shiftKey ? 10 : 1;
  const moves = { ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, far], ArrowDown: [0, -far] };
  if (moves[event.key]) moveTo(state.token + moves[event.key][0], state.layer + moves[event.key][1], true);
  else if (event.key === "Home") moveTo(0, state.layer, true);
  else if (event.key === "End") moveTo(text.tokens - 1, state.layer, true);
  else if (event.key === "+" || event.key === "=") zoom(state.span / 1.5);
  else if (event.key === "-") zoom(state.span * 1.5);
  else return;
  event.preventDefault();
}

function play(on) {
  clearInterval(timer);
  timer = null;
  const button = byId("play");
  button.textContent = on ? "❚❚" : "▶";
  button.setAttribute("aria-pressed", String(on));
  button.setAttribute("aria-label", on ? "Pause" : "Play through the layers");
  if (!on) return;
  if (state.layer === text.layers) moveTo(state.token, 1);
  timer = setInterval(() => {
    if (state.layer >= text.layers) play(false);
    else moveTo(state.token, state.layer + 1);
  }, STEP);
}

function wireSwitches(side) {
  const select = byId("preset-" + side);
  text.presets.forEach((preset, i) => select.append(element("option", { value: i }, preset.name)));
  const boxes = Object.fromEntries(Object.keys(PARTS).map((letter) => [letter, byId(`${letter}-${side}`)]));
  const show = () => {
    const preset = text.presets[state[side].preset], on = state[side].letters;
    for (const [letter, box] of Object.entries(boxes)) {
      box.checked = on.includes(letter);
      const flipped = box.checked ? on.replace(letter, "") : ordered(on + letter);
      box.disabled = !preset.letters.includes(letter) || (!(flipped in preset.runs) && nearest(preset, flipped, letter) === null);
    }
  };
  const choose = (letters) => {
    state[side].letters = letters;
    show();
    chooseRuns().catch(report);
  };
  select.addEventListener("change", () => {
    state[side].preset = +select.value;
    const preset = text.presets[+select.value];
    choose(state[side].letters in preset.runs ? state[side].letters : preset.letters);
  });
  for (const [letter, box] of Object.entries(boxes))
    box.addEventListener("change", () => {
      const on = state[side].letters.replace(letter, "");
      const wanted = ordered(box.checked ? on + letter : on), preset = text.presets[state[side].preset];
      choose(wanted in preset.runs ? wanted : nearest(preset, wanted, letter) ?? state[side].letters);
    });
  show();
}

const ordered = (letters) => Object.keys(PARTS).filter((letter) => letters.includes(letter)).join("");

// The run closest to what was asked for that has the letter as asked: without H there is no K.
function nearest(preset, wanted, letter) {
  const apart = (letters) => Object.keys(PARTS).filter((l) => letters.includes(l) !== wanted.includes(l)).length;
  const fitting = Object.keys(preset.runs).filter((letters) => letters.includes(letter) === wanted.includes(letter));
  return fitting.sort((x, y) => apart(x) - apart(y))[0] ?? null;
}

function wire() {
  byId("layer").addEventListener("input", (event) => moveTo(state.token, +event.target.value));
  byId("play").addEventListener("click", () => play(timer === null));
  byId("start").addEventListener("input", (event) => {
    state.start = clamp(+event.target.value, 0, text.tokens - state.span);
    draw();
  });
  byId("zoom-in").addEventListener("click", () => zoom(state.span / 1.5));
  byId("zoom-out").addEventListener("click", () => zoom(state.span * 1.5));
  byId("zoom-all").addEventListener("click", () => zoom(text.tokens));
  byId("colour").addEventListener("change", (event) => {
    state.colour = event.target.value;
    range = colourRange(runs);
    draw();
  });
  ["a", "b"].forEach((side, i) => {
    wireSwitches(side);
    const words = byId("text-" + side);
    words.addEventListener("keydown", steer);
    words.addEventListener("pointermove", (event) => {
      const token = event.target.dataset?.token;
      if (token === undefined) return hideTip();
      showTip(event, runs[i], state.layer, +token);
    });
    words.addEventListener("pointerleave", hideTip);
    words.addEventListener("click", (event) => {
      if (event.target.dataset?.token !== undefined) moveTo(+event.target.dataset.token, state.layer);
    });
    for (const kind of MAPS) {
      const canvas = byId(`${kind}-${side}`);
      canvas.addEventListener("keydown", steer);
      canvas.addEventListener("pointermove", (event) => {
        const cell = cellAt(canvas, kind, event);
        if (cell) showTip(event, runs[i], cell.layer, cell.token);
        else hideTip();
      });
      canvas.addEventListener("pointerleave", hideTip);
      canvas.addEventListener("click", (event) => {
        const cell = cellAt(canvas, kind, event);
        if (cell) moveTo(cell.token, cell.layer, true);
      });
    }
  });
}

function report(error) {
  const place = byId("problem");
  place.hidden = false;
  place.textContent = typeof DecompressionStream === "undefined"
    ? "This browser is too old for this page (no DecompressionStream): Chrome 103, Firefox 113 or Safari 16.4 are not."
    : `This page could not be drawn: ${error.message}`;
  throw error;
}

function redraw() {
  if (text && runs.length) {
    drawn = {};
    draw();
  }
  drawFileCharts();
}

async function start() {
  drawFileCharts();
  if (text) {
    ids = await arrayAt(text.ids);
    state.a.letters = text.presets[0].letters;
    state.layer = text.layers;
    state.span = Math.min(text.tokens, 256);
    buildText();
    wire();
    const first = await runOf(0, state.a.letters);
    const touched = (_, t) => first.depth[t] < text.layers || first.absorbed[t] < text.layers;
    state.token = Math.max(0, text.labels.findIndex(touched));
    state.start = clamp(state.token - state.span / 2, 0, text.tokens - state.span) | 0;
    await chooseRuns();
  }
  window.addEventListener("resize", redraw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.body.dataset.ready = "yes";
}
start().catch(report);
