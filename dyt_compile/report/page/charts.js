// Figures over all sites: what they cost, and their values over depth.
const SCALE = [
  [0, "#4169e1"],
  [0.5, "#c0429a"],
  [1, "#ee8a12"],
];
const coarse = matchMedia("(pointer: coarse)").matches;
const narrow = matchMedia("(max-width: 760px)");
// On a narrow page the buttons would lie on the legend.
const config = () => ({
  displaylogo: false,
  responsive: true,
  displayModeBar: narrow.matches ? false : "hover",
  modeBarButtons: [["toImage", "resetScale2d"]],
});

function colours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["surface", "line", "grid", "text", "quiet", "dyt", "norm"];
  return Object.fromEntries(
    names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]),
  );
}

function axis(title, more) {
  const { line, grid, quiet } = colours();
  return {
    title: { text: title, standoff: 8, font: { size: 13 } },
    tickfont: { size: 12 },
    gridcolor: grid,
    linecolor: line,
    zerolinecolor: line,
    tickcolor: line,
    ticks: "outside",
    ticklen: 4,
    automargin: true,
    color: quiet,
    exponentformat: "power",
    ...more,
  };
}

function layout(x, y, more) {
  const { surface, text, line } = colours();
  return {
    paper_bgcolor: surface,
    plot_bgcolor: surface,
    margin: { l: 56, r: 12, t: 30, b: 44 },
    font: { family: getComputedStyle(document.documentElement).fontFamily, size: 13, color: text },
    hoverlabel: { bgcolor: surface, bordercolor: line, font: { color: text }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom" },
    dragmode: coarse ? false : "zoom",
    hovermode: "closest",
    xaxis: x,
    yaxis: y,
    ...more,
  };
}

// A logarithmic axis, with ticks at 1, 2 and 5, where the values span more than a factor of 20.
function span(values) {
  const found = values.map(number).filter((value) => Number.isFinite(value) && value > 0);
  const [low, high] = [Math.min(...found), Math.max(...found)];
  if (!(high > 20 * low)) return { rangemode: "tozero" };
  const decades = Array.from({ length: 40 }, (_, place) => 10 ** (place - 20));
  const steps = Math.log10(high / low) > 3 ? [1] : [1, 2, 5];
  const ticks = decades
    .flatMap((decade) => steps.map((step) => step * decade))
    .filter((tick) => tick > low / 5 && tick < high * 5);
  return { type: "log", tickvals: ticks, ticktext: ticks.map(significant), minor: { ticks: "" } };
}

// What a model with fewer norms is drawn against, of a point of the frontier.
const AGAINST = {
  sites: { title: "converted sites", of: (point) => point.sites },
  kernels: { title: "kernels saved, at most", of: (point) => point.kernels_saved },
  traffic: {
    title: "MB of traffic saved a sample, at most",
    of: (point) => point.traffic_bytes_saved / 1e6,
  },
};

function frontierTrace(frontier, against) {
  const { quiet } = colours();
  const added = ({ added: [first, ...more] }) =>
    first === undefined ? "" : plain(first) + (more.length ? ` and ${more.length} more` : "");
  return {
    name: "frontier",
    mode: "lines+markers",
    x: frontier.map(against),
    y: frontier.map((point) => number(point.error)),
    error_y: {
      type: "data",
      array: frontier.map((point) => number(point.standard_error)),
      color: quiet,
      thickness: 1,
    },
    line: { color: quiet, width: 1.5 },
    marker: { color: quiet, size: 7 },
    customdata: frontier.map((point) => [
      point.sites,
      added(point),
      point.kernels_saved,
      significant(point.traffic_bytes_saved / 1e6),
    ]),
    hovertemplate:
      "%{customdata[0]} converted: %{y:.3g}<br>added %{customdata[1]}<br>" +
      "saves at most %{customdata[2]} kernels, %{customdata[3]} MB a sample (estimate)" +
      "<extra>plan samples</extra>",
  };
}

// The smallest error of each number of sites that was tried, joined.
function bestTried(attempts) {
  const best = new Map();
  for (const [count, missed] of attempts)
    if (known(missed)) best.set(count, Math.min(missed, best.get(count) ?? missed));
  const counts = [...best.keys()].sort((a, b) => a - b);
  return {
    mode: "lines",
    x: counts,
    y: counts.map((count) => best.get(count)),
    line: { color: colours().quiet, width: 1 },
    showlegend: false,
    hoverinfo: "skip",
  };
}

// Sets of sites: those that the plan tried, and the one that was taken.
function planTraces({ attempts, converted, error, standard_error: deviation }) {
  const { dyt, quiet } = colours();
  return [
    {
      name: "tried",
      mode: "markers",
      x: attempts.map(([count]) => count),
      y: attempts.map(([, missed]) => number(missed)),
      marker: { color: quiet, size: 8, opacity: 0.75, symbol: "circle-open" },
      hovertemplate: "%{x} converted: %{y:.3g}<extra>tried, plan samples</extra>",
    },
    {
      name: "taken",
      mode: "markers",
      x: [converted],
      y: [number(error)],
      error_y: { type: "data", array: [number(deviation)], color: dyt, thickness: 1.5 },
      marker: { color: dyt, size: 12, symbol: "diamond" },
      hovertemplate: "%{x} converted: %{y:.3g}<extra>taken, report samples</extra>",
    },
  ];
}

function drawCost() {
  const { frontier, attempts, budget, measure, error } = data.cost;
  const chosen = byId("against").value;
  const { title, of } = AGAINST[chosen];
  const curve = frontier.length ? frontierTrace(frontier, of) : bestTried(attempts);
  const traces = [curve, ...(chosen === "sites" ? planTraces(data.cost) : [])];
  const most = chosen === "sites" ? sites.length : Math.max(...frontier.map(of));
  if (known(budget)) {
    traces.push({
      name: "budget",
      mode: "lines",
      x: [-most, 2 * most],
      y: [budget, budget],
      hoverinfo: "skip",
      line: { color: colours().norm, dash: "dash", width: 1.5 },
    });
  }
  const room = chosen === "sites" ? 0.3 : 0;
  const x = axis(title, {
    range: [-0.04 * most - room, 1.04 * most + room],
    tickformat: chosen === "traffic" ? "" : "d",
    zeroline: false,
  });
  const missed = [...attempts.map(([, found]) => found), ...frontier.map((point) => point.error)];
  Plotly.react("cost", traces, layout(x, axis(measure, span([...missed, error]))), config());
}

function drawRecovery() {
  const { metric, times, errors, stages, chosen, before, after } = data.recovery;
  const { dyt, norm, quiet, line } = colours();
  const [unit, seconds] = times.at(-1) > 120 ? ["minutes", 60] : ["seconds", 1];
  const x = times.map((time) => time / seconds);
  const y = errors.map(number);
  const level = (name, value, color) => ({
    name,
    mode: "lines",
    x: [x[0], x.at(-1)],
    y: [number(value), number(value)],
    line: { color, dash: "dash", width: 1.5 },
    hovertemplate: `%{y:.3g}<extra>${name}, report samples</extra>`,
  });
  const traces = [
    {
      name: "held out",
      mode: "lines+markers",
      x,
      y,
      line: { color: dyt, width: 1.5 },
      marker: { color: dyt, size: 6 },
      hovertemplate: `%{x:.3g} ${unit}: %{y:.3g}<extra>held out</extra>`,
    },
    {
      name: "chosen",
      mode: "markers",
      x: [x[chosen]],
      y: [y[chosen]],
      marker: { color: dyt, size: 12, symbol: "diamond" },
      hovertemplate: `%{x:.3g} ${unit}: %{y:.3g}<extra>chosen</extra>`,
    },
    level("before", before, norm),
    level("after", after, quiet),
  ];
  const begun = stages.length > 1 ? stages.map(([time, count]) => [time / seconds, count]) : [];
  const marks = {
    shapes: begun.map(([time]) => ({
      type: "line",
      yref: "paper",
      x0: time,
      x1: time,
      y0: 0,
      y1: 1,
      line: { color: line, width: 1 },
    })),
    annotations: begun.map(([time, count]) => ({
      x: time,
      y: 0,
      yref: "paper",
      xanchor: "left",
      yanchor: "bottom",
      showarrow: false,
      text: `${count} DyT`,
      font: { size: 12, color: quiet },
    })),
  };
  const shown = axis(`${metric} error`, span([...errors, before, after]));
  Plotly.react("recovery", traces, layout(axis(unit), shown, marks), config());
}

// A series over sites in execution order; hollow where the site keeps its norm.
function overDepth(name, values, colour, symbol, solid) {
  const places = sites.map((_, place) => place).filter((place) => known(values[place]));
  return {
    name,
    mode: "markers",
    x: places.map((place) => place + 1),
    y: places.map((place) => number(values[place])),
    customdata: places.map((place) => plain(sites[place].name)),
    hovertemplate: `%{customdata}<br>${name} %{y:.3g}<extra></extra>`,
    marker: {
      color: colour,
      size: sites.length > 60 ? 6 : 9,
      symbol: places.map((place) => symbol + (solid(place) ? "" : "-open")),
    },
  };
}

function drawDepth(id, title, traces) {
  const total = sites.length;
  const x = axis("site", {
    range: [1 - 0.03 * total - 0.2, total + 0.03 * total + 0.2],
    tickformat: "d",
    zeroline: false,
  });
  const legend = { showlegend: traces.filter((trace) => trace.x.length).length > 1 };
  const values = traces.flatMap((trace) => trace.y);
  Plotly.react(
    id,
    traces.filter((trace) => trace.x.length),
    layout(x, axis(title, span(values)), legend),
    config(),
  );
  const plot = byId(id);
  plot.removeAllListeners("plotly_click");
  plot.on("plotly_click", (event) => select(event.points[0].x - 1, true));
}

const alphas = sites.map((site, place) => site.alpha ?? data.scatters[place]?.fit?.alpha ?? null);
const isConverted = (place) => sites[place].now !== "norm";

function split(name, values, chosen, colour) {
  return overDepth(
    name,
    values.map((value, place) => (chosen(place) ? value : null)),
    colour,
    "circle",
    isConverted,
  );
}

function drawCharts() {
  const { dyt, norm, quiet } = colours();
  const kept = (place) => !isConverted(place);
  const alone = sites.map((site) => site.sensitivity);
  const middle = sites.map((site) => site.sigma_median);
  const largest = sites.map((site) =>
    known(site.sigma_median) && known(site.sigma_peak) ? site.sigma_median * site.sigma_peak : null,
  );
  const parts = {
    cost: [data.cost?.attempts.length > 1 || data.cost?.frontier.length > 0, drawCost],
    recovery: [data.recovery, drawRecovery],
    alone: [
      alone.some(known),
      () =>
        drawDepth("alone", data.cost?.measure ?? "", [
          split("converted", alone, isConverted, dyt),
          split("norm", alone, kept, norm),
        ]),
    ],
    alpha: [
      alphas.some(known),
      () =>
        drawDepth("alpha", "α", [
          split("converted", alphas, isConverted, dyt),
          split("norm", alphas, kept, norm),
        ]),
    ],
    sigma: [
      middle.some(known),
      () =>
        drawDepth("sigma", "σ", [
          overDepth("median", middle, dyt, "circle", () => true),
          overDepth("largest", largest, quiet, "triangle-up", () => true),
        ]),
    ],
  };
  for (const [name, [possible, draw]] of Object.entries(parts)) {
    if (possible) draw();
    else document.querySelector(`[data-needs=${name}]`)?.remove();
  }
  byId("charts").hidden = !byId("charts").childElementCount;
}
