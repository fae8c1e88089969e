// Tables that sort, and the search over sites.

// Decimals of a column, so that its points stand under each other: three digits of the median.
function decimals(rows, field) {
  const sizes = rows
    .map((row) => Math.abs(number(row[field])))
    .filter((size) => size > 0 && Number.isFinite(size));
  return sizes.length ? Math.min(Math.max(2 - Math.floor(Math.log10(median(sizes))), 0), 6) : 0;
}

function shown(value, column, places) {
  if (value === null || value === undefined) return "";
  if (column.kind === "exact") return significant(number(value));
  if (column.kind !== "number") return String(value);
  const found = number(value);
  if (!Number.isFinite(found)) return String(value);
  const fixed = found.toFixed(places);
  return found !== 0 && (Number(fixed) === 0 || Math.abs(found) >= 1e6)
    ? found.toExponential(1)
    : fixed;
}

function compare(column, rising) {
  const numeric = ["number", "count", "exact"].includes(column.kind);
  return (a, b) => {
    const [first, second] = [a[column.field], b[column.field]];
    const missing = (value) =>
      value === null || value === "" || (numeric && Number.isNaN(Number(value)));
    if (missing(first) || missing(second)) return missing(first) - missing(second); // last, either way
    const order = numeric
      ? Number(first) - Number(second) || 0
      : String(first).localeCompare(String(second), "en", { numeric: true });
    return rising ? order : -order;
  };
}

class Table {
  constructor(table, { columns, rows }, kept, cell) {
    Object.assign(this, { rows, kept, cell, sorted: null, rising: true });
    const told = (value) => value !== null && value !== undefined && value !== "";
    // A column without any value is left out.
    this.columns = columns.filter(({ field }) => rows.some((row) => told(row[field])));
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
        if (this.columns[place] === column)
          other.setAttribute("aria-sort", this.rising ? "ascending" : "descending");
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
      const cell = this.body
        .appendChild(element("tr"))
        .appendChild(element("td", this.rows.length ? "Nothing matches." : "None.", "empty"));
      cell.colSpan = Math.max(this.columns.length, 1);
    }
    return rows.length;
  }

  line(row) {
    const line = element("tr", undefined, row.now);
    if (row.place) line.dataset.place = row.place - 1;
    line.classList.toggle(
      "selected",
      row.place - 1 === selected && Boolean(data.scatters[selected]),
    );
    this.columns.forEach((column, place) => {
      const text = shown(row[column.field], column, this.places[place]);
      const cell = line.appendChild(
        element(
          "td",
          undefined,
          text.length > 40 && column.kind === "text" ? "text wide" : column.kind,
        ),
      );
      cell.append(this.cell(column, row, text));
    });
    return line;
  }
}

function siteCell(column, row, text) {
  if (column.kind !== "site") return text;
  const drawn = data.scatters[row.place - 1];
  const button = element(drawn ? "button" : "span");
  // Long paths break between names.
  for (const part of text.split(/(?<=[._/])/)) button.append(part, element("wbr"));
  if (!drawn) return button;
  button.type = "button";
  button.addEventListener("click", () => select(row.place - 1, true));
  return button;
}

function wanted(row) {
  const state = byId("state").value;
  const words = byId("search").value.toLowerCase().split(/\s+/);
  const text = data.sites.columns
    .map((column) => row[column.field] ?? "")
    .join(" ")
    .toLowerCase();
  return (!state || row.now === state) && words.every((word) => text.includes(word));
}
