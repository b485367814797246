// The text itself, the numbers of one token, and the comparison of both runs.
function buildText() {
  for (const side of ["a", "b"]) {
    const holder = byId("text-" + side);
    text.labels.forEach((label, i) => {
      holder.append(element("span", { id: `${side}${i}`, role: "option", "data-token": i }, label));
    });
  }
}

function paintText(side, run) {
  const spans = byId("text-" + side).children;
  for (let t = 0; t < spans.length; t++) {
    const now = stateOf(run, state.layer, t);
    if (spans[t].className !== now) spans[t].className = now;
  }
  const here = spans[state.token];
  here.className += " here";
  const before = byId("text-" + side).querySelector("[aria-selected]");
  if (before) before.removeAttribute("aria-selected");
  here.setAttribute("aria-selected", "true");
  byId("text-" + side).setAttribute("aria-activedescendant", here.id);
}

// Rows of numbers of a token at a layer: [name, value of A, value of B].
function tokenRows(runs, layer, token) {
  const names = { runs: "runs", halted: "halted", absorbed: "absorbed", other: "not looked at" };
  const both = (pick) => runs.map(pick);
  const rows = [
    ["decision", ...both((run) => names[stateOf(run, layer, token)])],
    ["runs this layer", ...both((run) => (flag(run, layer, token, ACTIVE) ? "yes" : "no"))],
    ["layers before it halted", ...both((run) => run.depth[token])],
    ["representative", ...both((run) => representative(run, layer, token))],
    ["merged after this layer", ...both((run) => (flag(run, layer, token, WEIGHED) ? "yes" : "no"))],
    ["KV", ...both((run) => KV_NAMES[kvState(run, layer, token)])],
    ["keys it saw", ...both((run) => run.visible[at(layer, token)])],
    ["bits", ...both((run) => bitsOf(run, layer, token))],
  ];
  const signals = new Map(runs.flatMap((run) => colourings(run.preset)));
  for (const [name, label] of signals)
    rows.push([label, ...both((run) => told(signalAt(run, name, layer, token)))]);
  rows.push(["log-probability, nats",
    ...both((run) => (run.scored[token] ? told(run.logprobs[token]) : "not scored"))]);
  return rows;
}

function representative(run, layer, token) {
  const other = run.fusedMap[at(layer, token)];
  return other === token ? "itself" : `${other} ${text.labels[other].trim()}`;
}

function describe(layer, token) {
  const name = element("bdi", {}, text.labels[token]);
  return element("div", {}, `token ${token} `, name, ` (id ${ids[token]}), layer ${layer}`);
}

function showDetail(runs) {
  const rows = tokenRows(runs, state.layer, state.token).map(([name, ...values]) =>
    [name, ...values.map((value) => element("span", { dir: "auto" }, value))]);
  const table = element("table", {}, ...tableParts(["", "run A", "run B"], rows));
  byId("detail").replaceChildren(describe(state.layer, state.token), table);
}

function showTip(event, run, layer, token) {
  const tip = byId("tip");
  const lines = tokenRows([run], layer, token).map(([name, value]) =>
    element("div", {}, `${name}: `, element("span", { dir: "auto" }, String(value))));
  tip.replaceChildren(describe(layer, token), ...lines);
  tip.hidden = false;
  const width = tip.offsetWidth, height = tip.offsetHeight;
  const left = Math.min(event.clientX + 14, window.innerWidth - width - 6);
  const above = event.clientY + 14 + height > window.innerHeight;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.max(4, above ? event.clientY - height - 12 : event.clientY + 14) + "px";
}

const hideTip = () => (byId("tip").hidden = true);

function compare(runs) {
  const rows = [
    ["perplexity of the scored tokens", (s) => told(s.perplexity, 4)],
    ["tokens scored", (s) => told(s.scored)],
    ["tokens the mechanisms may act on", (s) => told(s.subject)],
    ["of them halted", (s) => told(s.halted)],
    ["of them fused into another", (s) => told(s.fused)],
    ["layers run, mean over all tokens", (s) => told(s.mean_depth)],
    ["layer-tokens saved, simulated", (s) => percent(s.layer_tokens_saved)],
    ["FLOPs saved (exact count), simulated", (s) => percent(s.exact_flops_saved)],
    ["FLOPs saved (the paper's count), simulated", (s) => percent(s.paper_flops_saved)],
    ["KV bytes saved, simulated", (s) => percent(s.kv_bytes_saved)],
    ["FLOPs of signals and tests, of dense", (s) => percent(s.added_flops_share)],
  ];
  const heads = ["", ...runs.map((run, i) => `${"AB"[i]} · ${run.title}`)];
  const cells = rows.map(([name, pick]) => [name, ...runs.map((run) => pick(run.summary))]);
  byId("compare").replaceChildren(...tableParts(heads, cells));
}
