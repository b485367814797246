// Charts of the two runs: entropy, drift, active tokens, cost.
const BINS = 40;
const MISSING = "This signal is not stored for these two runs: it is for the dense model and the whole preset.";
const sides = () => [["A", variable("--a")], ["B", variable("--b")]];

function quantile(sorted, share) {
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : NaN;
}

// Values of a signal at a layer, of the tokens that ran it.
function valuesAt(run, name, layer) {
  if (!run.signals[name]) return [];
  const values = run.signals[name].subarray(at(layer, 0), at(layer, text.tokens));
  return values.filter((value) => !Number.isNaN(value));
}

function entropyBins(run, name, low, high) {
  return [...Array(text.layers).keys()].map((l) => {
    const counts = new Array(BINS).fill(0);
    for (const value of valuesAt(run, name, l + 1))
      counts[Math.min(BINS - 1, Math.max(0, Math.floor(((value - low) / (high - low)) * BINS)))]++;
    return counts;
  });
}

function chartEntropy(holder, runs) {
  const name = runs[0].preset.signals.bits_entropy && state.colour === "bits_entropy" ? "bits_entropy" : "entropy";
  let [low, high] = [Infinity, -Infinity];
  for (const run of runs)
    for (const value of run.signals[name] ?? [])
      if (!Number.isNaN(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
  if (!(high > low)) return holder.append(MISSING);
  if (low > 0 && low < high / 3) low = 0;
  const counts = runs.map((run) => entropyBins(run, name, low, high));
  const edge = (bin) => low + (bin / BINS) * (high - low);
  const heat = element("div", { class: "pair" });
  holder.append(heat);
  runs.forEach((run, i) => {
    const cell = element("figure", {}, element("figcaption", { "data-name": "ab"[i] }, run.title));
    heat.append(cell);
    entropyHeat(cell, counts[i], edge, runs[i].preset.signals[name] ?? name, i);
  });
  const most = Math.max(1, ...counts.flatMap((each) => each[state.layer - 1]));
  const plot = frame(holder, {
    height: 220, x: [low, high], y: [0, most], xLabel: `${runs[0].preset.signals[name] ?? name} after layer ${state.layer}, nats`,
    yLabel: "tokens", label: `Histogram of entropy after layer ${state.layer}`,
  });
  counts.forEach((each, i) => {
    const points = each[state.layer - 1].flatMap((count, bin) => [
      [edge(bin), count], [edge(bin + 1), count],
    ]);
    line(plot, [[low, 0], ...points, [high, 0]], sides()[i][1], i ? { "stroke-dasharray": "6 3" } : {});
  });
  const { halt, bits } = runs[0].preset.thresholds;
  const now = halt?.[state.layer - 1];
  if (Number.isFinite(now) && now >= low && now <= high && name === "entropy") rule(plot, now, variable("--soft"), "τ halt");
  const reads = runs[0].preset.signals.bits_entropy ? "bits_entropy" : "entropy";
  if (bits && name === reads)
    bits.forEach((value, i) => {
      if (Number.isFinite(value) && value >= low && value <= high) rule(plot, value, variable("--soft"), i ? "τ high" : "τ low");
    });
  legend(holder, runs.map((run, i) => [`${"AB"[i]} · ${run.title}`, sides()[i][1], i ? "6 3" : undefined]));
}

function entropyHeat(holder, counts, edge, name, index) {
  const most = Math.max(1, ...counts.flat());
  const plot = frame(holder, {
    height: 260, left: 44, x: [edge(0), edge(BINS)], y: [0.5, text.layers + 0.5], xLabel: `${name}, nats`, yLabel: "layer",
    label: `Entropy by layer, run ${"AB"[index]}: brighter cells hold more tokens`,
  });
  const width = plot.x(edge(1)) - plot.x(edge(0)), height = plot.y(1) - plot.y(2);
  counts.forEach((bins, l) =>
    bins.forEach((count, bin) => {
      if (!count) return;
      plot.root.append(svg("rect", {
        x: plot.x(edge(bin)), y: plot.y(l + 1.5), width: width + 0.5, height: height + 0.5,
        fill: `rgb(${viridis(Math.sqrt(count / most))})`,
      }));
    }));
  plot.root.append(svg("rect", {
    x: plot.box.left, y: plot.y(state.layer + 0.5), width: plot.box.right - plot.box.left, height,
    fill: "none", stroke: variable("--token"), "stroke-dasharray": "4 3", "stroke-width": 1.5,
  }));
}

function chartDrift(holder, runs) {
  const layers = [...Array(text.layers).keys()].map((l) => l + 1);
  const known = runs.map((run) => (run.signals.drift ? run : null));
  if (!known.some(Boolean)) return holder.append(MISSING);
  const spread = known.map((run) => layers.map((layer) => {
    const sorted = run ? Float64Array.from(valuesAt(run, "drift", layer)).sort() : [];
    return [0.1, 0.5, 0.9].map((share) => quantile(sorted, share));
  }));
  const mine = known.map((run) => layers.map((layer) => [layer, run ? run.signals.drift[at(layer, state.token)] : NaN]));
  const tau = runs[0].preset.thresholds.drift;
  const all = [...spread.flat(2), ...mine.flat().map((point) => point[1]), ...(tau ?? [])]
    .filter((value) => Number.isFinite(value) && value > 0);
  const plot = frame(holder, {
    height: 300, log: true, x: [1, Math.max(text.layers, 2)], y: [Math.min(...all) * 0.9, Math.max(...all) * 1.1],
    xLabel: "layer", yLabel: runs[0].preset.signals.drift, label: "Drift by layer",
  });
  known.forEach((run, i) => {
    if (!run) return;
    const curve = (k) => layers.map((layer, l) => [layer, spread[i][l][k]]);
    const dash = i ? { "stroke-dasharray": "6 3" } : {};
    band(plot, curve(0), curve(2), sides()[i][1]);
    line(plot, curve(1), sides()[i][1], dash);
    line(plot, mine[i], variable("--token"), { ...dash, "stroke-width": 1.3, class: `of-token-${"ab"[i]}` });
  });
  if (tau) line(plot, layers.map((layer, l) => [layer, tau[l] ?? NaN]), variable("--fourth"), { "stroke-dasharray": "2 3" });
  rule(plot, state.layer, variable("--soft"), `layer ${state.layer}`);
  legend(holder, [
    ...runs.map((run, i) => [`${"AB"[i]} · ${run.title}`, sides()[i][1], i ? "6 3" : undefined]),
    [`token ${state.token} ${shortened(text.labels[state.token], 16)}`, variable("--token")],
    ...(tau ? [["τ drift", variable("--fourth"), "2 3"]] : []),
  ]);
}

const formula = (decay) =>
  `N = ${decay.start.toFixed(1)}, α = ${decay.rate.toFixed(4)} per layer, ` +
  (decay.r_squared === null ? "no decay" : `R² = ${decay.r_squared.toFixed(3)}`);

function decayChart(holder, entries, yLabel, unit = 1) {
  const layers = entries[0].active.map((_, l) => l + 1);
  const fitted = (decay, l) => decay.start * Math.exp(-decay.rate * l);
  const high = Math.max(...entries.flatMap(({ active, decay }) => [fitted(decay, 1), ...active])) / unit;
  const plot = frame(holder, {
    height: 280, x: [1, Math.max(layers.length, 2)], y: [0, high * 1.08], xLabel: "layer", yLabel, label: "Active tokens by layer",
    format: unit === 1 ? undefined : (value) => `${Math.round(100 * value)} %`,
  });
  const styles = [];
  entries.forEach(({ name, active, decay, color }, i) => {
    line(plot, active.map((count, l) => [l + 1, count / unit]), color, i ? { "stroke-dasharray": "6 3" } : {});
    line(plot, layers.map((l) => [l, fitted(decay, l) / unit]), color,
      { "stroke-width": 1.2, "stroke-dasharray": "1 4", "stroke-linecap": "round" });
    styles.push([name, color, i ? "6 3" : undefined]);
    styles.push([`fit: ${formula(decay)}`, color, "1 4"]);
  });
  legend(holder, styles);
  numbersTable(holder, ["layer", ...entries.map((entry) => entry.name)],
    layers.map((layer, l) => [layer, ...entries.map((entry) => told(entry.active[l]))]));
}

function chartDecay(holder, runs) {
  const entries = runs.map((run, i) => ({
    name: `${"AB"[i]} · ${run.title}`, active: run.active, decay: run.decay, color: sides()[i][1],
  }));
  decayChart(holder, entries, "active tokens");
}

// entries: {name, costs, color}; shares of `whole`.
function costChart(holder, entries, whole) {
  const names = Object.keys(content.components).filter((name) => entries.some((e) => e.costs[name]));
  const groups = names.map((name) => ({
    name: content.components[name], values: entries.map((entry) => (entry.costs[name] ?? 0) / whole),
  }));
  bars(holder, groups, entries, {
    label: "Cost by component", yLabel: "share of dense FLOPs", height: 300,
    format: (value) => `${(100 * value).toFixed(Math.abs(value) < 0.0995 && value !== 0 ? 1 : 0)} %`,
  });
  legend(holder, entries.map((entry) => [entry.name, entry.color, "box"]));
  numbersTable(holder, ["component", ...entries.map((entry) => `${entry.name}, GFLOPs`)], [
    ...names.map((name) => [content.components[name], ...entries.map((e) => told((e.costs[name] ?? 0) / 1e9, 4))]),
    ["together", ...entries.map((e) => told(Object.values(e.costs).reduce((a, b) => a + b, 0) / 1e9, 4))],
  ]);
}

function chartCost(holder, runs) {
  const dense = Object.values(runs[0].preset.runs[""].costs).reduce((a, b) => a + b, 0);
  const entries = runs.map((run, i) => ({ name: `${"AB"[i]} · ${run.title}`, costs: run.costs, color: sides()[i][1] }));
  costChart(holder, entries, dense);
}

const RUN_CHARTS = { entropy: chartEntropy, drift: chartDrift, decay: chartDecay, cost: chartCost };

function drawRunCharts(runs, only = Object.keys(RUN_CHARTS)) {
  for (const name of only) {
    const holder = byId(name + "-chart"), height = holder.offsetHeight;
    const open = [...holder.querySelectorAll("details")].map((each) => each.open);
    holder.style.minHeight = height + "px"; // the page must not jump while it is drawn anew
    holder.replaceChildren();
    RUN_CHARTS[name](holder, runs);
    [...holder.querySelectorAll("details")].forEach((each, i) => (each.open = open[i] ?? false));
    holder.style.minHeight = "";
  }
}
