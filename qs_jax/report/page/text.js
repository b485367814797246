// The text itself, the numbers of one token, and the comparison of both runs.
function buildText() {
  for (const side of SIDES)
    byId("text-" + side).append(...text.labels.map((label, token) =>
      element("span", { id: side + token, role: "option", "data-token": token }, label)));
}

function paintText(side, run) {
  const holder = byId("text-" + side);
  [...holder.children].forEach((span, token) => {
    const name = stateOf(run, state.layer, token) + (token === state.token ? " here" : "");
    if (span.className !== name) span.className = name;
  });
  holder.querySelector("[aria-selected]")?.removeAttribute("aria-selected");
  holder.children[state.token].setAttribute("aria-selected", "true");
  holder.setAttribute("aria-activedescendant", side + state.token);
}

// Rows of numbers of a token at a layer: a name, and the value of each run.
function tokenRows(runs, layer, token) {
  const i = at(layer, token), yes = (flag) => (flag ? "yes" : "no");
  const rows = {
    decision: (run) => stateOf(run, layer, token),
    "runs this layer": (run) => yes(run.ran[i]),
    "layers before it halted": (run) => run.depth[token],
    representative: (run) => (run.fused[i] === token ? "itself" : `${run.fused[i]} ${text.labels[run.fused[i]].trim()}`),
    "merged after this layer": (run) => yes(run.merged[i]),
    KV: (run) => KV_NAMES[kvState(run, layer, token)],
    "keys it saw": (run) => run.visible[i],
    bits: (run) => run.bits[i],
  };
  for (const [name, label] of runs.flatMap((run) => signalsOf(run.preset)))
    rows[label] = (run) => format(signalAt(run, name, layer, token));
  rows["log-probability, nats"] = (run) => (run.scored[token] ? format(run.logprobs[token]) : "not scored");
  return Object.entries(rows).map(([name, value]) =>
    [name, ...runs.map((run) => element("span", { dir: "auto" }, String(value(run))))]);
}

function describe(layer, token) {
  const label = element("bdi", {}, text.labels[token]);
  return element("div", {}, `token ${token} `, label, ` (id ${ids[token]}), layer ${layer}`);
}

function showDetail(runs) {
  const rows = tokenRows(runs, state.layer, state.token);
  byId("detail").replaceChildren(describe(state.layer, state.token), table(["", "run A", "run B"], rows));
}

function showTip(event, run, cell) {
  const tip = byId("tip");
  tip.hidden = !cell;
  if (!cell) return;
  const rows = tokenRows([run], cell.layer, cell.token);
  tip.replaceChildren(describe(cell.layer, cell.token),
    ...rows.map(([name, value]) => element("div", {}, `${name}: `, value)));
  const right = window.innerWidth - tip.offsetWidth - 6, below = event.clientY + 14;
  const top = below + tip.offsetHeight > window.innerHeight ? event.clientY - tip.offsetHeight - 12 : below;
  tip.style.left = clamp(event.clientX + 14, 4, right) + "px";
  tip.style.top = Math.max(4, top) + "px";
}

function compare(runs) {
  const rows = {
    "perplexity of the scored tokens": (s) => format(s.perplexity, 4),
    "tokens scored": (s) => format(s.scored),
    "tokens the mechanisms look at": (s) => format(s.subject),
    "of them exempt (first tokens, a prompt's last ones)": (s) => format(s.exempt),
    "of them halted": (s) => format(s.halted),
    "layers that these ran light": (s) => (s.light ? s.light.join(" to ") : "none"),
    "of them fused into another": (s) => format(s.fused),
    "layers run, mean over all tokens": (s) => format(s.mean_depth),
    ...SAVINGS,
    "FLOPs of signals and tests, of dense": (s) => percent(s.added_flops_share),
  };
  const cells = Object.entries(rows).map(([name, value]) => [name, ...runs.map((run) => value(run.summary))]);
  byId("compare").replaceChildren(...tableParts(["", ...runs.map(nameOf)], cells));
  const idle = runs.filter((run) => run.summary.idle).map((run) => `${run.title}. ${run.summary.idle}`);
  byId("idle").replaceChildren(...[...new Set(idle)].map((line) => element("p", {}, line)));
}
