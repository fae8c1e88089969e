// Input against output of one site.
function points(scatter, colour, title) {
  const places = scatter.x.flatMap((row, token) => row.map((_, channel) => [token, channel]));
  return {
    mode: "markers",
    showlegend: false,
    x: scatter.x.flat(),
    y: scatter.y.flat(),
    marker: {
      size: 5,
      opacity: 0.8,
      colorscale: SCALE,
      color: places.map(([token, channel]) => colour(token, channel)),
      colorbar: {
        thickness: 10,
        outlinewidth: 0,
        nticks: 6,
        ticklen: 3,
        ticks: "outside",
        tickfont: { size: 12 },
        // On a narrow page above the points; the caption says what it shows.
        ...(narrow.matches
          ? { orientation: "h", y: 1, yref: "container", yanchor: "top", len: 1 }
          : { title: { text: title, side: "right", font: { size: 13 } }, len: 0.9 }),
      },
    },
    customdata: places.map(([token, channel]) => [scatter.sigma[token], scatter.channels[channel]]),
    hovertemplate:
      "x %{x:.3g}, y %{y:.3g}<br>" +
      "σ of token %{customdata[0]:.3g}, channel %{customdata[1]}<extra></extra>",
  };
}

const curve = (fit, gamma, beta) => fit.squashed.map((value) => gamma * value + beta);

// The colour of SCALE at a share from 0 to 1.
function mixed(share) {
  const place = share < 0.5 ? 0 : 1;
  const part = (share - SCALE[place][0]) * 2;
  const channel = (stop, at) => parseInt(SCALE[stop][1].slice(at, at + 2), 16);
  const between = (at) => channel(place, at) * (1 - part) + channel(place + 1, at) * part;
  return `rgb(${[1, 3, 5].map((at) => Math.round(between(at))).join()})`;
}

function drawCurves(scatter) {
  const { fit, channels } = scatter;
  const last = Math.max(channels.length - 1, 1);
  const byToken = [points(scatter, (token) => scatter.sigma[token], "σ")];
  const byChannel = [points(scatter, (_, channel) => channel + 1, "rank")];
  if (fit) {
    const all = channels.map((_, channel) => curve(fit, fit.gamma[channel], fit.beta[channel]));
    const line = { mode: "lines", x: fit.x, showlegend: false, hoverinfo: "skip" };
    byToken.push({
      ...line,
      y: fit.x.map((_, at) => median(all.map((y) => y[at]))),
      line: { color: colours().text, width: 2.5 },
    });
    all.forEach((y, channel) =>
      byChannel.push({ ...line, y, line: { color: mixed(channel / last), width: 1.2 } }),
    );
  }
  const axes = () =>
    layout(axis("input x"), axis("output y"), {
      margin: { l: 50, r: 8, t: narrow.matches ? 40 : 8, b: 44 },
    });
  Plotly.react("by-token", byToken, axes(), config());
  Plotly.react("by-channel", byChannel, axes(), config());
}

let selected = 0;

function select(place, scroll) {
  selected = Math.min(Math.max(place, 0), sites.length - 1);
  const site = sites[selected];
  const scatter = data.scatters[selected];
  byId("site").value = String(selected);
  byId("previous").disabled = selected === 0;
  byId("next").disabled = selected === sites.length - 1;
  const affine = "an affine map in the weights of its readers";
  const told = [{ DyT: "DyT", affine }[site.now] ?? `keeps its norm: ${site.reason}`];
  if (known(alphas[selected])) told.push(`α ${significant(number(alphas[selected]))}`);
  if (site.fit_error !== null) told.push(`fit error ${significant(number(site.fit_error))}`);
  byId("about-site").textContent = told.join(" · ");
  document.querySelector("#curves .charts").hidden = !scatter;
  byId("no-points").hidden = Boolean(scatter);
  if (scatter) drawCurves(scatter);
  for (const row of document.querySelectorAll("#site-table tbody tr"))
    row.classList.toggle("selected", Number(row.dataset.place) === selected);
  if (scroll)
    byId("curves").scrollIntoView({
      behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth",
    });
}
