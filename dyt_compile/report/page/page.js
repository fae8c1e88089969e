"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const sites = data.sites.rows;
const byId = (id) => document.getElementById(id);
// Non-finite numbers come as text ("NaN", "Infinity").
const number = (value) => (value === null || value === undefined ? null : Number(value));
const known = (value) => number(value) !== null && Number.isFinite(number(value));
// Plotly reads a little HTML in its labels; names are text.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function significant(value) {
  if (value === null) return "";
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-4 || size >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

/* Charts */

const SCALE = [[0, "#4169e1"], [0.5, "#c0429a"], [1, "#ee8a12"]];
const coarse = matchMedia("(pointer: coarse)").matches;
const narrow = matchMedia("(max-width: 760px)");
// On a narrow page the buttons would lie on the legend.
const config = () => ({ displaylogo: false, responsive: true, displayModeBar: narrow.matches ? false : "hover", modeBarButtons: [["toImage", "resetScale2d"]] });

function colours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["surface", "line", "grid", "text", "quiet", "dyt", "norm"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

function axis(title, more) {
  const { line, grid, quiet } = colours();
  return {
    title: { text: title, standoff: 8, font: { size: 13 } }, tickfont: { size: 12 }, gridcolor: grid, linecolor: line, zerolinecolor: line, tickcolor: line,
    ticks: "outside", ticklen: 4, automargin: true, color: quiet, exponentformat: "power", ...more,
  };
}

function layout(x, y, more) {
  const { surface, text, line } = colours();
  return {
    paper_bgcolor: surface, plot_bgcolor: surface, margin: { l: 56, r: 12, t: 30, b: 44 },
    font: { family: getComputedStyle(document.documentElement).fontFamily, size: 13, color: text },
    hoverlabel: { bgcolor: surface, bordercolor: line, font: { color: text }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom" },
    dragmode: coarse ? false : "zoom", hovermode: "closest", xaxis: x, yaxis: y, ...more,
  };
}

// A logarithmic axis, with ticks at 1, 2 and 5, where the values span more than a factor of 20.
function span(values) {
  const found = values.map(number).filter((value) => Number.isFinite(value) && value > 0);
  const [low, high] = [Math.min(...found), Math.max(...found)];
  if (!(high > 20 * low)) return { rangemode: "tozero" };
  const decades = Array.from({ length: 40 }, (_, place) => 10 ** (place - 20));
  const steps = Math.log10(high / low) > 3 ? [1] : [1, 2, 5];
  const ticks = decades.flatMap((decade) => steps.map((step) => step * decade)).filter((tick) => tick > low / 5 && tick < high * 5);
  return { type: "log", tickvals: ticks, ticktext: ticks.map(significant), minor: { ticks: "" } };
}

function drawCost() {
  const { attempts, budget, metric, converted, error, standard_error: deviation } = data.cost;
  const { dyt, quiet, norm } = colours();
  const best = new Map(); // the smallest error of each number of sites
  for (const [count, missed] of attempts) if (known(missed)) best.set(count, Math.min(missed, best.get(count) ?? missed));
  const counts = [...best.keys()].sort((a, b) => a - b);
  const traces = [
    {
      mode: "lines", x: counts, y: counts.map((count) => best.get(count)), line: { color: quiet, width: 1 },
      showlegend: false, hoverinfo: "skip",
    },
    {
      name: "tried", mode: "markers", x: attempts.map(([count]) => count),
      y: attempts.map(([, missed]) => number(missed)), marker: { color: quiet, size: 8, opacity: 0.75 },
      hovertemplate: "%{x} converted: %{y:.3g}<extra>tried, plan samples</extra>",
    },
    {
      name: "taken", mode: "markers", x: [converted], y: [number(error)],
      error_y: { type: "data", array: [number(deviation)], color: dyt, thickness: 1.5 },
      marker: { color: dyt, size: 12, symbol: "diamond" },
      hovertemplate: "%{x} converted: %{y:.3g}<extra>taken, report samples</extra>",
    },
  ];
  const total = sites.length;
  if (known(budget)) {
    traces.push({
      name: "budget", mode: "lines", x: [-total, 2 * total], y: [budget, budget], hoverinfo: "skip",
      line: { color: norm, dash: "dash", width: 1.5 },
    });
  }
  const x = axis("converted sites", { range: [-0.04 * total - 0.3, 1.04 * total + 0.3], tickformat: "d", zeroline: false });
  const y = axis(`${metric} error`, span([...attempts.map(([, missed]) => missed), error]));
  Plotly.react("cost", traces, layout(x, y), config());
}

// A series over sites in execution order; hollow where the site keeps its norm.
function overDepth(name, values, colour, symbol, solid) {
  const places = sites.map((_, place) => place).filter((place) => known(values[place]));
  return {
    name, mode: "markers", x: places.map((place) => place + 1), y: places.map((place) => number(values[place])),
    customdata: places.map((place) => plain(sites[place].name)),
    hovertemplate: `%{customdata}<br>${name} %{y:.3g}<extra></extra>`,
    marker: { color: colour, size: sites.length > 60 ? 6 : 9, symbol: places.map((place) => symbol + (solid(place) ? "" : "-open")) },
  };
}

function drawDepth(id, title, traces) {
  const total = sites.length;
  const x = axis("site", { range: [1 - 0.03 * total - 0.2, total + 0.03 * total + 0.2], tickformat: "d", zeroline: false });
  const legend = { showlegend: traces.filter((trace) => trace.x.length).length > 1 };
  const values = traces.flatMap((trace) => trace.y);
  Plotly.react(id, traces.filter((trace) => trace.x.length), layout(x, axis(title, span(values)), legend), config());
  const plot = byId(id);
  plot.removeAllListeners("plotly_click");
  plot.on("plotly_click", (event) => select(event.points[0].x - 1, true));
}

const alphas = sites.map((site, place) => site.alpha ?? data.scatters[place]?.fit?.alpha ?? null);
const isDyt = (place) => sites[place].now === "DyT";

function split(name, values, chosen, colour) {
  return overDepth(name, values.map((value, place) => (chosen(place) ? value : null)), colour, "circle", isDyt);
}

function drawCharts() {
  const { dyt, norm, quiet } = colours();
  const kept = (place) => !isDyt(place);
  const alone = sites.map((site) => site.sensitivity);
  const middle = sites.map((site) => site.sigma_median);
  const largest = sites.map((site) => (known(site.sigma_median) && known(site.sigma_peak) ? site.sigma_median * site.sigma_peak : null));
  const parts = {
    cost: [data.cost?.attempts.length > 1, drawCost],
    alone: [alone.some(known), () => drawDepth("alone", `${data.cost?.metric} error`,
      [split("DyT", alone, isDyt, dyt), split("norm", alone, kept, norm)])],
    alpha: [alphas.some(known), () => drawDepth("alpha", "α",
      [split("DyT", alphas, isDyt, dyt), split("norm", alphas, kept, norm)])],
    sigma: [middle.some(known), () => drawDepth("sigma", "σ",
      [overDepth("median", middle, dyt, "circle", () => true), overDepth("largest", largest, quiet, "triangle-up", () => true)])],
  };
  for (const [name, [possible, draw]] of Object.entries(parts)) {
    if (possible) draw();
    else document.querySelector(`[data-needs=${name}]`)?.remove();
  }
  byId("charts").hidden = !byId("charts").childElementCount;
}

/* Input against output */

function points(scatter, colour, title) {
  const places = scatter.x.flatMap((row, token) => row.map((_, channel) => [token, channel]));
  return {
    mode: "markers", showlegend: false, x: scatter.x.flat(), y: scatter.y.flat(),
    marker: {
      size: 5, opacity: 0.8, colorscale: SCALE, color: places.map(([token, channel]) => colour(token, channel)),
      colorbar: { thickness: 10, outlinewidth: 0, nticks: 6, ticklen: 3, ticks: "outside", tickfont: { size: 12 }, ...(narrow.matches
        ? { orientation: "h", title: { text: title, side: "top", font: { size: 13 } }, y: 1.02, yanchor: "bottom", len: 1 }
        : { title: { text: title, side: "right", font: { size: 13 } }, len: 0.9 }) },
    },
    customdata: places.map(([token, channel]) => [scatter.sigma[token], scatter.channels[channel]]),
    hovertemplate: "x %{x:.3g}, y %{y:.3g}<br>σ of token %{customdata[0]:.3g}, channel %{customdata[1]}<extra></extra>",
  };
}

const curve = (fit, gamma, beta) => fit.squashed.map((value) => gamma * value + beta);

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length % 2 ? sorted[(sorted.length - 1) / 2] : (sorted[sorted.length / 2 - 1] + sorted[sorted.length / 2]) / 2;
}

function mixed(share) { // the colour of SCALE at a share from 0 to 1
  const place = share < 0.5 ? 0 : 1;
  const part = (share - SCALE[place][0]) * 2;
  const channel = (stop, at) => parseInt(SCALE[stop][1].slice(at, at + 2), 16);
  return `rgb(${[1, 3, 5].map((at) => Math.round(channel(place, at) * (1 - part) + channel(place + 1, at) * part)).join()})`;
}

function drawCurves(scatter) {
  const { fit, channels } = scatter;
  const last = Math.max(channels.length - 1, 1);
  const byToken = [points(scatter, (token) => scatter.sigma[token], "σ")];
  const byChannel = [points(scatter, (_, channel) => channel + 1, "rank")];
  if (fit) {
    const all = channels.map((_, channel) => curve(fit, fit.gamma[channel], fit.beta[channel]));
    const line = { mode: "lines", x: fit.x, showlegend: false, hoverinfo: "skip" };
    byToken.push({ ...line, y: fit.x.map((_, at) => median(all.map((y) => y[at]))), line: { color: colours().text, width: 2.5 } });
    all.forEach((y, channel) => byChannel.push({ ...line, y, line: { color: mixed(channel / last), width: 1.2 } }));
  }
  const axes = () => layout(axis("input x"), axis("output y"), { margin: { l: 50, r: 8, t: 8, b: 44 } });
  Plotly.react("by-token", byToken, axes(), config());
  Plotly.react("by-channel", byChannel, axes(), config());
}

let selected = 0;

function select(place, scroll) {
  selected = Math.min(Math.max(place, 0), sites.length - 1);
  const site = sites[selected], scatter = data.scatters[selected];
  byId("site").value = String(selected);
  byId("previous").disabled = selected === 0;
  byId("next").disabled = selected === sites.length - 1;
  const told = [site.now === "DyT" ? "DyT" : `keeps its norm: ${site.reason}`];
  if (known(alphas[selected])) told.push(`α ${significant(number(alphas[selected]))}`);
  if (site.fit_error !== null) told.push(`fit error ${significant(number(site.fit_error))}`);
  byId("about-site").textContent = told.join(" · ");
  document.querySelector("#curves .charts").hidden = !scatter;
  byId("no-points").hidden = Boolean(scatter);
  if (scatter) drawCurves(scatter);
  for (const row of document.querySelectorAll("#site-table tbody tr")) row.classList.toggle("selected", Number(row.dataset.place) === selected);
  if (scroll) byId("curves").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

/* Tables */

// Decimals of a column, so that its points stand under each other: three digits of the median.
function decimals(rows, field) {
  const sizes = rows.map((row) => Math.abs(number(row[field]))).filter((size) => size > 0 && Number.isFinite(size));
  return sizes.length ? Math.min(Math.max(2 - Math.floor(Math.log10(median(sizes))), 0), 6) : 0;
}

function shown(value, column, places) {
  if (value === null || value === undefined) return "";
  if (column.kind === "exact") return significant(number(value));
  if (column.kind !== "number") return String(value);
  const found = number(value);
  if (!Number.isFinite(found)) return String(value);
  const fixed = found.toFixed(places);
  return found !== 0 && (Number(fixed) === 0 || Math.abs(found) >= 1e6) ? found.toExponential(1) : fixed;
}

function compare(column, rising) {
  const numeric = ["number", "count", "exact"].includes(column.kind);
  return (a, b) => {
    const [first, second] = [a[column.field], b[column.field]];
    const missing = (value) => value === null || value === "" || (numeric && Number.isNaN(Number(value)));
    if (missing(first) || missing(second)) return missing(first) - missing(second); // last, either way
    const order = numeric ? Number(first) - Number(second) || 0 : String(first).localeCompare(String(second), "en", { numeric: true });
    return rising ? order : -order;
  };
}

class Table {
  constructor(table, { columns, rows }, kept, cell) {
    Object.assign(this, { rows, kept, cell, sorted: null, rising: true });
    this.columns = columns.filter((column) => rows.some((row) => row[column.field] !== null && row[column.field] !== "" && row[column.field] !== undefined));
    this.places = this.columns.map((column) => decimals(rows, column.field));
    const head = table.appendChild(element("thead")).appendChild(element("tr"));
    this.heads = this.columns.map((column) => head.appendChild(this.heading(column)));
    this.body = table.appendChild(element("tbody"));
    this.fill();
  }

  heading(column) {
    const head = element("th", undefined, column.kind);
    head.scope = "col";
    head.title = column.hint;
    const button = head.appendChild(element("button", column.label));
    button.type = "button";
    button.addEventListener("click", () => {
      this.rising = this.sorted === column ? !this.rising : true;
      this.sorted = column;
      this.heads.forEach((other, place) => {
        if (this.columns[place] === column) other.setAttribute("aria-sort", this.rising ? "ascending" : "descending");
        else other.removeAttribute("aria-sort");
      });
      this.fill();
    });
    return head;
  }

  fill() {
    const rows = this.rows.filter(this.kept);
    if (this.sorted) rows.sort(compare(this.sorted, this.rising));
    this.body.replaceChildren(...rows.map((row) => this.line(row)));
    if (!rows.length) {
      const cell = this.body.appendChild(element("tr")).appendChild(element("td", this.rows.length ? "Nothing matches." : "None.", "empty"));
      cell.colSpan = Math.max(this.columns.length, 1);
    }
    return rows.length;
  }

  line(row) {
    const line = element("tr", undefined, row.now);
    if (row.place) line.dataset.place = row.place - 1;
    line.classList.toggle("selected", row.place - 1 === selected && Boolean(data.scatters[selected]));
    this.columns.forEach((column, place) => {
      const text = shown(row[column.field], column, this.places[place]);
      const cell = line.appendChild(element("td", undefined, text.length > 40 && column.kind === "text" ? "text wide" : column.kind));
      cell.append(this.cell(column, row, text));
    });
    return line;
  }
}

function siteCell(column, row, text) {
  if (column.kind !== "site") return text;
  const drawn = data.scatters[row.place - 1];
  const button = element(drawn ? "button" : "span");
  for (const part of text.split(/(?<=[._/])/)) button.append(part, element("wbr")); // long paths break between names
  if (!drawn) return button;
  button.type = "button";
  button.addEventListener("click", () => select(row.place - 1, true));
  return button;
}

function wanted(row) {
  const state = byId("state").value, words = byId("search").value.toLowerCase().split(/\s+/);
  const text = data.sites.columns.map((column) => row[column.field] ?? "").join(" ").toLowerCase();
  return (!state || row.now === state) && words.every((word) => text.includes(word));
}

/* The page */

function list(id, entries) {
  for (const [name, value] of entries) byId(id).append(element("dt", name), element("dd", value));
}

function build() {
  byId("model").textContent = data.model;
  byId("headline").textContent = data.headline;
  for (const { label, value, note } of data.cards) {
    const card = byId("cards").appendChild(element("div", undefined, "card"));
    card.append(element("div", label, "label"), element("div", value, "value"), element("div", note, "note"));
  }
  sites.forEach((site, place) => byId("site").append(new Option(site.name, String(place))));
  list("seconds", data.seconds);
  list("environment", data.environment);
  const table = new Table(byId("site-table"), data.sites, wanted, siteCell);
  new Table(byId("refusal-table"), data.refusals, () => true, (_, __, text) => text);
  const filter = () => { byId("count").textContent = `${table.fill()} of ${sites.length}`; };
  byId("search").addEventListener("input", filter);
  byId("state").addEventListener("change", filter);
  filter();
  byId("site").addEventListener("change", (event) => select(Number(event.target.value)));
  byId("previous").addEventListener("click", () => select(selected - 1));
  byId("next").addEventListener("click", () => select(selected + 1));
  byId("curves").hidden = !data.scatters.some(Boolean);
  byId("refusals").hidden = !data.refusals.rows.length;
  byId("sites").hidden = !sites.length;
  byId("state").hidden = !sites.some((site) => site.now);
  byId("cards").hidden = !data.cards.length;
  byId("seconds").parentElement.hidden = !data.seconds.length;
}

function draw() {
  drawCharts();
  if (data.scatters.some(Boolean)) select(selected);
}

selected = Math.max(data.scatters.findIndex(Boolean), 0);
build();
addEventListener("DOMContentLoaded", draw); // plotly.js stands behind this script: text comes first
for (const changed of [matchMedia("(prefers-color-scheme: dark)"), narrow]) changed.addEventListener("change", draw);
