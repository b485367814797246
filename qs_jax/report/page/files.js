// Charts of what other commands measured: evaluations, a search.
const SERIES = () => ["--a", "--b", "--third", "--fourth"].map(variable);

function chartResults(holder) {
  const rows = content.results;
  const name = (row) => `${row.preset} (${row.file})`;
  const ended = (row) => (row.perplexity_interval
    ? row.perplexity_interval.map((end) => told(end, 4)).join(" to ") : "one window");
  numbersTable(holder,
    ["", "data", "protocol", "engine", "dtype", "windows", "perplexity", "95 % interval", "layer-tokens saved",
      "FLOPs saved, exact", "FLOPs saved, paper", "KV bytes saved", ""],
    rows.map((row) => [name(row), row.data, row.protocol, row.engine, row.dtype, `${row.windows} × ${row.seq_len}`,
      told(row.perplexity, 4), ended(row), percent(row.layer_tokens_saved), percent(row.exact_flops_saved),
      percent(row.paper_flops_saved), percent(row.kv_bytes_saved), row.simulated ? "simulated" : "counted"]),
    null);
  for (const row of rows) resultsLayers(holder, row);
}

function resultsLayers(holder, row) {
  holder.append(element("h3", {}, `${row.preset} (${row.file}): share of tokens by layer`));
  const { kv_written: written, halted, fused } = row.per_layer;
  const lines = [["keys written", written], ["halted", halted], ["fused into another", fused]];
  for (const bits of [8, 4, 2]) lines.push([`${bits} bits`, row.per_layer[`bits_${bits}`]]);
  const dashes = [undefined, "6 3", "2 3", "8 3 2 3"];
  const shown = lines.filter(([name, values]) => name === "keys written" || values.some(Boolean));
  const plot = frame(holder, {
    height: 230, x: [1, Math.max(written.length, 2)], y: [0, 1], xLabel: "layer", yLabel: "share of tokens",
    format: (value) => `${Math.round(100 * value)} %`, label: `Share of tokens by layer, ${row.file}`,
  });
  const colours = SERIES();
  const style = (i) => [colours[i % colours.length], dashes[Math.floor(i / colours.length) + (i % 2)]];
  shown.forEach(([, values], i) => {
    const [color, dash] = style(i);
    line(plot, values.map((count, l) => [l + 1, count / row.tokens]), color, dash ? { "stroke-dasharray": dash } : {});
  });
  legend(holder, shown.map(([name], i) => [name, ...style(i)]));
}

// A heading and a chart for every evaluation.
function chartEach(holder, draw) {
  const colours = SERIES();
  content.results.forEach((row, i) => {
    holder.append(element("h3", {}, `${row.preset} (${row.file})`));
    draw(row, { name: row.preset, color: colours[i % colours.length] });
  });
}

const chartResultsDecay = (holder) => chartEach(holder, (row, style) =>
  decayChart(holder, [{ ...style, active: row.per_layer.layer_tokens, decay: row.decay }], "active tokens", row.tokens));
const chartResultsCost = (holder) => chartEach(holder, (row, style) =>
  costChart(holder, [{ ...style, costs: row.costs }], row.dense_flops));

function chartFront(holder) {
  const { points, front, verified, budget, objective } = content.front;
  const marks = { skip: ["--a", "circle"], extrapolate: ["--halted", "square"], propagate: ["--third", "triangle"] };
  const style = (family) => {
    const [colour, shape] = marks[family] ?? ["--soft", "triangle"];
    return [variable(colour), shape];
  };
  const everything = [...points, ...verified];
  const costs = everything.map((point) => point.ppl_increase);
  // Candidates far beyond the budget would flatten the others.
  const most = Math.max(budget * 3, ...front.map((point) => point.ppl_increase));
  const high = Math.min(Math.max(...costs, budget), most), low = Math.min(0, ...costs);
  const plot = frame(holder, {
    height: 320, x: [0, Math.max(0.01, ...everything.map((point) => point.saving)) * 1.06], y: [low - 0.05 * (high - low), high * 1.08],
    xLabel: `${objective.replaceAll("_", " ")} saved, simulated`, yLabel: "perplexity increase",
    xFormat: (value) => `${+(100 * value).toFixed(1)} %`, label: "Pareto front of the calibration",
  });
  rule(plot, budget, variable("--fourth"), `budget ${told(budget)}`, false);
  const along = [...front].sort((a, b) => a.saving - b.saving);
  line(plot, along.map((point) => [point.saving, point.ppl_increase]), variable("--soft"), { "stroke-width": 1.5 });
  const title = (point) => `${point.family}: ${percent(point.saving)} saved, perplexity +${told(point.ppl_increase)}`;
  let hidden = 0;
  for (const point of points) {
    if (point.ppl_increase > high * 1.08) hidden++;
    else mark(plot, point.saving, point.ppl_increase, style(point.family)[1], style(point.family)[0], title(point), 4.5, 0.5);
  }
  for (const point of verified)
    if (point.ppl_increase <= high * 1.08)
      mark(plot, point.saving, point.ppl_increase, "star", variable("--token"), `verified, ${title(point)}`, 6);
  const families = [...new Set(points.map((point) => point.family))];
  legend(holder, [
    ...families.map((family) => [`${family}, calibration windows`, ...style(family)]),
    ["Pareto front", variable("--soft")], ["verification windows", variable("--token"), "star"],
    ["budget", variable("--fourth"), "5 4"],
  ]);
  if (hidden) holder.append(element("p", { class: "about" }, `${hidden} candidates cost more than the axis shows.`));
  numbersTable(holder, ["policy", "saved", "perplexity increase"],
    along.map((point) => [point.family, percent(point.saving), told(point.ppl_increase)]));
}

const FILE_CHARTS = {
  results: chartResults, "results-decay": chartResultsDecay, "results-cost": chartResultsCost,
  front: chartFront,
};

function drawFileCharts() {
  for (const [name, draw] of Object.entries(FILE_CHARTS)) {
    const holder = byId(name + "-chart");
    if (!holder) continue;
    holder.replaceChildren();
    draw(holder);
  }
}
