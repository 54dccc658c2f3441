// Fetches /api/panels every second and draws it. Names come from clients, so they are inserted only as text.

import { Chart, node } from "./chart.js";

const EVERY_MS = 1000;
const TIMEOUT_MS = 5000;
const AWAY_S = 4; // without an answer for this long, the page says that the server does not answer
const QUIET_S = 10; // without a request for this long, the page says that there is no traffic
const WINDOW_S = 300; // how long points are kept
const MAX_SERIES = 8; // with more replicas, there is one line for each teacher instead
const CARRY_S = 5; // in sums, a replica's last rates are used for this long

const byId = (id) => document.getElementById(id);
const clock = () => performance.now() / 1000;
const known = new Map(); // each replica's teacher, id and points, which are the values of all charts
const colors = new Map(); // colors of series by name, so that a line keeps its color when others come and go
let charts = [];
let state = null;
let heardAt = clock();
let trafficAt = clock();

async function ask() {
  try {
    await hear();
  } catch {
    // show() says for how long there was no answer
  }
  try {
    show();
  } finally {
    setTimeout(ask, EVERY_MS);
  }
}

async function hear() {
  const chosen = encodeURIComponent(byId("teacher").value);
  const answer = await fetch(`api/panels?teacher=${chosen}`, { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  state = await answer.json();
  heardAt = clock();
  if (state.busy) trafficAt = heardAt;
  for (const [teacher, id, report, values] of state.series) {
    const key = JSON.stringify([teacher, id]);
    if (!known.has(key)) known.set(key, { teacher, id, points: [] });
    const one = known.get(key);
    if (one.report !== report) one.points.push({ at: heardAt, values }); // otherwise it is the same report
    one.report = report;
  }
  for (const [key, one] of known) {
    one.points = one.points.filter((point) => point.at > heardAt - WINDOW_S);
    if (!one.points.length) known.delete(key);
  }
  if (!charts.length) {
    charts = state.charts.map(([title, unit, most, , help]) => new Chart(title, unit, most ?? 1, most ?? Infinity, help));
    byId("charts").append(...charts.map((chart) => chart.element));
  }
}

function show() {
  const silence = Math.round(clock() - heardAt);
  const away = silence >= AWAY_S;
  document.body.classList.toggle("away", away);
  byId("alert").hidden = !away;
  byId("alert").textContent = `No answer from the server for ${silence} s. What is shown is older than that.`;
  byId("news").textContent = away ? `no answer for ${silence} s` : state ? "live" : "waiting for the server";
  if (state === null || away) return;
  choose();
  drawTiles();
  drawCharts(byId("teacher").value);
  for (const [id, table] of Object.entries(state.tables)) drawTable(id, table);
}

// Offers the present teachers for choice.
function choose() {
  const select = byId("teacher");
  const names = state.teachers;
  const shown = [...select.options].slice(1).map((option) => option.value);
  if (names.length === shown.length && names.every((name, i) => name === shown[i])) return;
  const chosen = select.value;
  select.replaceChildren(node("option", { value: "" }, "all"), ...names.map((name) => node("option", { value: name }, name)));
  select.value = names.includes(chosen) ? chosen : "";
}

function drawTiles() {
  byId("tiles").replaceChildren(
    ...state.tiles.map(([name, value, unit, title]) =>
      node("div", { title }, node("dt", {}, name), node("dd", {}, `${value} `, node("small", {}, unit)))),
  );
  const quiet = Math.round(heardAt - trafficAt);
  const notices = quiet >= QUIET_S ? [...state.notices, `No traffic: no request for ${quiet} s.`] : state.notices;
  byId("notice").hidden = !notices.length;
  byId("notice").textContent = notices.join(" ");
}

function drawTable(id, { columns, rows, note }) {
  const kind = ({ number, rank }, i) => (number ? "number" : rank || i > 1 ? "" : "name");
  const heads = columns.map((one, i) => node("th", { scope: "col", class: kind(one, i), title: one.help }, one.title));
  const cell = ([text, style], i) => {
    const share = columns[i].title === "share" && text.endsWith("%");
    const bar = share ? node("progress", { max: 100, value: parseFloat(text), "aria-hidden": "true" }) : "";
    return node("td", { class: `${kind(columns[i], i)} ${style}` }, text, bar);
  };
  const shown = rows.map((row) => node("tr", {}, ...row.map(cell)));
  if (note) shown.push(node("tr", {}, node("td", { class: "empty", colspan: columns.length }, note)));
  byId(id).replaceChildren(node("thead", {}, node("tr", {}, ...heads)), node("tbody", {}, ...shown));
}

function drawCharts(teacher) {
  const replicas = [...known.values()].filter((one) => teacher === "" || one.teacher === teacher);
  const groups = new Map();
  for (const one of replicas) {
    const name = replicas.length > MAX_SERIES ? one.teacher : `${one.teacher} / ${one.id}`;
    groups.set(name, [...(groups.get(name) ?? []), one]);
  }
  for (const name of colors.keys()) if (!groups.has(name)) colors.delete(name);
  for (const name of groups.keys()) if (!colors.has(name)) colors.set(name, freeColor());
  charts.forEach((chart, i) => {
    const value = (point) => point.values[i];
    const points = (replicas) => pointsOf(replicas, value, state.charts[i][3]);
    chart.draw([...groups].map(([name, replicas]) => ({ name, color: colors.get(name), points: points(replicas) })), heardAt);
  });
  byId("legend").replaceChildren(...[...groups.keys()].map((name) => node("li", { class: `c${colors.get(name)}` }, name)));
}

function freeColor() {
  const used = [...colors.values()];
  const times = (color) => used.filter((one) => one === color).length;
  return [...Array(MAX_SERIES).keys()].reduce((a, b) => (times(b) < times(a) ? b : a));
}

// The points of one replica, or the sum or mean over several.
function pointsOf(replicas, value, mean) {
  if (replicas.length === 1) return replicas[0].points.map((point) => [point.at, value(point)]);
  const times = [...new Set(replicas.flatMap((one) => one.points.map((point) => point.at)))].sort((a, b) => a - b);
  const next = replicas.map(() => 0);
  return times.map((at) => {
    const found = [];
    replicas.forEach(({ points }, i) => {
      while (next[i] < points.length && points[next[i]].at <= at) next[i]++;
      const last = points[next[i] - 1];
      if (last && at - last.at < CARRY_S && value(last) !== null) found.push(value(last));
    });
    const sum = found.reduce((a, b) => a + b, 0);
    return [at, found.length ? (mean ? sum / found.length : sum) : null];
  });
}

byId("teacher").addEventListener("change", () => hear().then(show, show));
ask();
