// What the page shows, and how numbers and names become text.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const sites = data.sites.rows;
const byId = (id) => document.getElementById(id);
// Non-finite numbers come as text ("NaN", "Infinity").
const number = (value) => (value === null || value === undefined ? null : Number(value));
const known = (value) => number(value) !== null && Number.isFinite(number(value));
// Plotly reads a little HTML in its labels; names are text.
const plain = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

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
  return size !== 0 && (size < 1e-4 || size >= 1e5)
    ? value.toExponential(1)
    : String(Number(value.toPrecision(3)));
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length % 2
    ? sorted[(sorted.length - 1) / 2]
    : (sorted[sorted.length / 2 - 1] + sorted[sorted.length / 2]) / 2;
}
