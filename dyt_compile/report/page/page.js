// The page put together; figures are drawn once plotly.js is there.
function list(id, entries) {
  for (const [name, value] of entries) byId(id).append(element("dt", name), element("dd", value));
}

function build() {
  byId("model").textContent = data.model;
  byId("headline").textContent = data.headline;
  byId("about-recovery").textContent = data.recovery?.about ?? "";
  for (const { label, value, note } of data.cards) {
    const card = byId("cards").appendChild(element("div", undefined, "card"));
    card.append(
      element("div", label, "label"),
      element("div", value, "value"),
      element("div", note, "note"),
    );
  }
  sites.forEach((site, place) => byId("site").append(new Option(site.name, String(place))));
  list("seconds", data.seconds);
  list("environment", data.environment);
  const table = new Table(byId("site-table"), data.sites, wanted, siteCell);
  for (const [id, rows] of [
    ["refit-table", data.refits],
    ["quantized-table", data.quantized],
    ["refusal-table", data.refusals],
  ])
    new Table(
      byId(id),
      rows,
      () => true,
      (_, __, text) => text,
    );
  const filter = () => {
    byId("count").textContent = `${table.fill()} of ${sites.length}`;
  };
  byId("search").addEventListener("input", filter);
  byId("state").addEventListener("change", filter);
  filter();
  byId("site").addEventListener("change", (event) => select(Number(event.target.value)));
  byId("previous").addEventListener("click", () => select(selected - 1));
  byId("next").addEventListener("click", () => select(selected + 1));
  byId("frontier").hidden = !data.cost?.frontier.length;
  byId("against").addEventListener("change", drawCost);
  byId("curves").hidden = !data.scatters.some(Boolean);
  byId("refits").hidden = !data.refits.rows.length;
  byId("quantized").hidden = !data.quantized.rows.length;
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
for (const changed of [matchMedia("(prefers-color-scheme: dark)"), narrow])
  changed.addEventListener("change", draw);
