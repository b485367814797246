// Charts: signals, active tokens and cost of two runs; evaluations and a search.
const DASHES = ["none", "6 3"];
const COLORS = ["a", "b", "third", "fourth"];
const MISSING = "This signal is not stored for these two runs: it is for the dense model and the whole preset.";
const nameOf = (run, i) => `${"AB"[i]} · ${run.title}`;
const styleOf = (i) => ({ color: css(COLORS[i % 4]), dash: DASHES[Math.floor(i / 4) % 2] });

// Replaces a chart at once, so that the page does not jump.
function fill(id, build) {
  const holder = byId(id + "-chart");
  if (holder) holder.replaceChildren(...build(Math.max(holder.clientWidth, 260)));
}

// Lines over layers, with what they are and, on demand, a table of the numbers.
// series: {name, color, dash, values, low, high}; one number a layer, NaN for none; low and high bound a band.
function layerChart(series, { layer, withNumbers, ...options }) {
  const all = series.flatMap(({ values, low = [], high = [] }) => [...values, ...low, ...high])
    .filter((value) => Number.isFinite(value) && (value > 0 || !options.log));
  const least = Math.min(...all), most = Math.max(...all), count = series[0].values.length;
  const y = options.log ? [least * 0.9, most * 1.1] : [Math.min(0, least), most * 1.08];
  const xTicks = ticks(1, count, 10).filter(Number.isInteger);
  const plot = frame({ height: 280, x: [1, Math.max(count, 2)], y, xLabel: "layer", xTicks, ...options });
  const points = (values) => values.map((value, l) => [l + 1, value]);
  for (const { values, low, high, color, dash } of series) {
    if (low) {
      const outline = [...points(high), ...points(low).reverse()].filter((point) => Number.isFinite(point[1]));
      plot.root.append(svg("path", { d: path(plot, outline) + "Z", fill: color, opacity: 0.18 }));
    }
    line(plot, points(values), color, dash);
  }
  if (layer) line(plot, y.map((end) => [layer, end]), css("soft"), "5 4");
  const write = options.format ?? format;
  const rows = series[0].values.map((_, l) => [l + 1, ...series.map(({ values }) => write(values[l]))]);
  const table = withNumbers ? [numbers(["layer", ...series.map(({ name }) => name)], rows)] : [];
  return [plot.root, legendRow(series), ...table];
}

// Median and the 10th and 90th percentile of a signal at each layer, over the tokens that ran it.
const spreadOf = (run, name) => once(`spread ${run.key} ${name}`, () =>
  [0.1, 0.5, 0.9].map((share) => [...Array(text.layers).keys()].map((l) =>
    quantile(run.signals[name].subarray(l * text.tokens, (l + 1) * text.tokens), share))));

function signalChart(runs, name, options) {
  const { signals, thresholds } = runs[0].preset;
  const series = runs.flatMap((run, i) => {
    if (!run.signals[name]) return [];
    const [low, values, high] = spreadOf(run, name), dash = DASHES[i];
    const token = low.map((_, l) => signalAt(run, name, l + 1, state.token));
    const label = `${"AB"[i]} · token ${state.token} ${shortened(text.labels[state.token], 16)}`;
    return [{ name: nameOf(run, i), color: css(COLORS[i]), dash, values, low, high },
      { name: label, color: css("token"), dash, values: token }];
  });
  if (!series.length) return [MISSING];
  const limits = { drift: { "τ drift": thresholds.drift }, entropy: { "τ halt": thresholds.halt } }[name] ?? {};
  if (thresholds.bits && name === (signals.bits_entropy ? "bits_entropy" : "entropy"))
    ["τ low", "τ high"].forEach((label, i) => (limits[label] = Array(text.layers).fill(thresholds.bits[i])));
  for (const [label, values] of Object.entries(limits))
    if (values) series.push({ name: label, values: values.map((tau) => tau ?? NaN), color: css("fourth"), dash: "2 3" });
  const yLabel = signals[name] ?? name;
  return layerChart(series, { yLabel, label: `${yLabel} by layer`, layer: state.layer, ...options });
}

function drawSignals(runs) {
  const names = runs[0].preset.signals.bits_entropy ? ["entropy", "bits_entropy"] : ["entropy"];
  fill("entropy", (width) => names.flatMap((name) => signalChart(runs, name, { width })));
  fill("drift", (width) => signalChart(runs, "drift", { width, log: true }));
}

// Two series: active tokens, in shares of `whole`, and their exponential fit.
function decaySeries({ name, color, dash }, active, decay, whole = 1) {
  const quality = decay.r_squared === null ? "no decay" : `R² = ${decay.r_squared.toFixed(3)}`;
  const fit = `fit: N = ${decay.start.toFixed(1)}, α = ${decay.rate.toFixed(4)} per layer, ${quality}`;
  const fitted = active.map((_, l) => (decay.start * Math.exp(-decay.rate * (l + 1))) / whole);
  return [{ name, color, dash, values: active.map((count) => count / whole) },
    { name: fit, color, dash: "1 4", values: fitted }];
}

// FLOPs of each component as bars in a table; entries: {name, color, costs}, bars in shares of `dense`.
function costTable(entries, dense) {
  const cell = (flops, color) => {
    const style = `--share: ${(100 * flops) / dense}%; --color: ${color}`;
    return element("div", { class: "bar", style }, `${percent(flops / dense)} · ${format(flops / 1e9, 4)}`);
  };
  const names = Object.keys(content.components).filter((name) => entries.some(({ costs }) => costs[name]));
  const rows = names.map((name) =>
    [content.components[name], ...entries.map(({ costs, color }) => cell(costs[name] ?? 0, color))]);
  const sums = entries.map(({ costs, color }) => cell(sum(costs), color));
  return table(["of dense · GFLOPs", ...entries.map(({ name }) => name)], [...rows, ["together", ...sums]]);
}

const sum = (costs) => Object.values(costs).reduce((a, b) => a + b, 0);

function drawCounts(runs) {
  const entries = runs.map((run, i) => ({ ...run, name: nameOf(run, i), color: css(COLORS[i]), dash: DASHES[i] }));
  fill("decay", (width) => layerChart(entries.flatMap((entry) => decaySeries(entry, entry.active, entry.decay)),
    { width, yLabel: "active tokens", label: "Active tokens by layer", withNumbers: true }));
  fill("cost", () => [costTable(entries, sum(runs[0].preset.runs[""].costs))]);
}

function resultsTable() {
  const columns = {
    data: (row) => row.data, protocol: (row) => row.protocol, engine: (row) => row.engine, dtype: (row) => row.dtype,
    windows: (row) => `${row.windows} × ${row.seq_len}`,
    perplexity: (row) => format(row.perplexity, 4),
    "95 % interval": (row) => row.perplexity_interval?.map((end) => format(end, 4)).join(" to ") ?? "one window",
    ...SAVINGS,
    savings: (row) => (row.simulated ? "simulated" : "counted"),
  };
  return table(["", ...Object.keys(columns)],
    content.results.map((row) => [`${row.preset} (${row.file})`, ...Object.values(columns).map((value) => value(row))]));
}

// What tokens did at each layer of an evaluation, as shares, and what it cost.
function resultsCharts(row, width) {
  const names = { kv_written: "keys written", halted: "halted", fused: "fused into another" };
  for (const bits of [8, 4, 2]) names[`bits_${bits}`] = `${bits} bits`;
  const shown = Object.keys(names).filter((name) => name === "kv_written" || row.per_layer[name].some(Boolean));
  const series = shown.map((name, i) =>
    ({ name: names[name], ...styleOf(i + 1), values: row.per_layer[name].map((count) => count / row.tokens) }));
  const active = decaySeries({ name: "active", ...styleOf(0) }, row.per_layer.layer_tokens, row.decay, row.tokens);
  const label = `Share of tokens by layer, ${row.file}`, options = { width, format: share, withNumbers: true };
  return [
    element("h3", {}, `${row.preset} (${row.file})`),
    ...(row.idle ? [element("p", {}, row.idle)] : []),
    ...layerChart([...active, ...series], { yLabel: "share of tokens", label, ...options }),
    costTable([{ name: row.preset, color: css("a"), costs: row.costs }], row.dense_flops),
  ];
}

function frontChart(width) {
  const { points, front, verified, budget, objective } = content.front;
  const all = [...points, ...verified], costs = all.map((point) => point.ppl_increase);
  // Candidates far beyond the budget would flatten the others.
  const most = Math.max(budget * 3, ...front.map((point) => point.ppl_increase));
  const high = Math.min(Math.max(...costs, budget), most) * 1.08, low = Math.min(0, ...costs);
  const right = Math.max(0.01, ...all.map((point) => point.saving)) * 1.06;
  const plot = frame({
    width, height: 320, x: [0, right], y: [low - 0.05 * (high - low), high], xFormat: share, yLabel: "perplexity increase",
    xLabel: `${objective.replaceAll("_", " ")} saved, simulated`, label: "Pareto front",
  });
  const place = ({ saving, ppl_increase }) => [saving, ppl_increase];
  const along = [...front].sort((a, b) => a.saving - b.saving);
  line(plot, along.map(place), css("soft"));
  line(plot, [[0, budget], [right, budget]], css("fourth"), "5 4");
  const families = [...new Set(points.map((point) => point.family))];
  const styles = families.map((family, i) => ({ name: family, color: css(COLORS[i % 4]), glyph: "●■▲"[i % 3] }));
  const star = { name: "verification windows", color: css("token"), glyph: "★" };
  const draw = (point, style) => {
    const title = `${style.name}: ${percent(point.saving)} saved, perplexity +${format(point.ppl_increase)}`;
    if (point.ppl_increase <= high) mark(plot, place(point), style, title);
  };
  for (const point of points) draw(point, styles[families.indexOf(point.family)]);
  for (const point of verified) draw(point, { ...star, name: `${point.family}, verified` });
  const hidden = points.filter((point) => point.ppl_increase > high).length;
  return [
    plot.root,
    legendRow([
      ...styles, star, { name: "Pareto front", color: css("soft"), dash: "none" },
      { name: `budget ${format(budget)}`, color: css("fourth"), dash: "5 4" },
    ]),
    hidden ? `Candidates that cost more than the axis shows: ${hidden}.` : "",
  ];
}

function drawFiles() {
  fill("results", (width) => [resultsTable(), ...content.results.flatMap((row) => resultsCharts(row, width))]);
  fill("front", frontChart);
}
