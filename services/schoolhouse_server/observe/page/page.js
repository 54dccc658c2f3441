// Fetches /api/state every second and shows it. Names come from clients, so they are inserted only as text.

import { Chart, node, short } from "./chart.js";
import { History } from "./rates.js";
import { drawTables } from "./tables.js";

const EVERY_MS = 1000;
const TIMEOUT_MS = 5000;
const AWAY_S = 4; // without an answer for this long, the page says that the server does not answer
const QUIET_S = 10; // without a request for this long, the page says that there is no traffic
const MAX_SERIES = 8; // with more replicas, there is one line for each teacher instead
const CARRY_S = 5; // in sums, a replica's last rates are used for this long

const CHARTS = [
  [new Chart("Throughput", "rows/s", 1), (point) => point.rowsPerS, "sum"],
  [new Chart("Queueing delay", "ms", 1), (point) => point.delayS * 1000, "mean"],
  [new Chart("Device busy", "%", 100, 100), (point) => point.busy * 100, "mean"],
  [new Chart("Batch occupancy", "rows per forward", 1), (point) => point.rowsPerForward, "mean"],
  [new Chart("In flight and queued", "requests", 1), (point) => point.waiting, "sum"],
  [new Chart("Errors", "per second", 1), (point) => point.errorsPerS, "sum"],
];

const byId = (id) => document.getElementById(id);
const clock = () => performance.now() / 1000;
const history = new History();
const colors = new Map(); // colors of series by name, so that a line keeps its color when others come and go
let state = null;
let heardAt = clock();
let trafficAt = clock();

async function ask() {
  try {
    const answer = await fetch("api/state", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    state = await answer.json();
    heardAt = clock();
    history.add(state, heardAt);
  } catch {
    // show() says for how long there was no answer
  }
  try {
    show();
  } finally {
    setTimeout(ask, EVERY_MS);
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
  const chosen = byId("teacher").value;
  const teachers = state.teachers.filter((one) => chosen === "" || one.teacher === chosen);
  drawTiles(teachers);
  drawCharts(teachers);
  drawTables(teachers, history, heardAt);
}

// Offers the present teachers for choice.
function choose() {
  const select = byId("teacher");
  const names = state.teachers.map((one) => one.teacher).sort();
  const shown = [...select.options].slice(1).map((option) => option.value);
  if (names.length === shown.length && names.every((name, i) => name === shown[i])) return;
  const chosen = select.value;
  select.replaceChildren(node("option", { value: "" }, "all"), ...names.map((name) => node("option", { value: name }, name)));
  select.value = names.includes(chosen) ? chosen : "";
}

function drawTiles(teachers) {
  const replicas = teachers.flatMap(({ teacher, replicas }) => replicas.map((one) => ({ teacher, ...one })));
  const rates = replicas.map(({ teacher, id }) => history.latest(teacher, id, heardAt)).filter(Boolean);
  const sum = (items, value) => items.reduce((all, item) => all + value(item), 0);
  const wanted = sum(teachers, (one) => one.wanted);
  const serving = replicas.filter((one) => one.state === "serving").length;
  const waiting = sum(replicas, ({ load }) => load.queued + load.in_flight);
  const tiles = [
    ["Throughput", short(sum(rates, (point) => point.rowsPerS)), "rows/s"],
    ["Requests", short(sum(rates, (point) => point.requestsPerS)), "per second"],
    ["Replicas serving", serving, `of ${wanted} wanted`],
    ["Sessions", sum(replicas, ({ load }) => load.sessions), "open"],
    ["Waiting", waiting, "in flight or queued"],
    ["Errors", short(sum(rates, (point) => point.errorsPerS)), "per second"],
  ];
  byId("tiles").replaceChildren(
    ...tiles.map(([name, value, unit]) => node("div", {}, node("dt", {}, name), node("dd", {}, `${value} `, node("small", {}, unit)))),
  );
  if (waiting || rates.some((point) => point.requestsPerS > 0)) trafficAt = heardAt;
  const quiet = Math.round(heardAt - trafficAt);
  const notices = teachers.filter((one) => !one.replicas.some((replica) => replica.state === "serving"))
    .map((one) => `No replica of ${one.teacher} serves.`);
  if (replicas.length && quiet >= QUIET_S) notices.push(`No traffic: no request for ${quiet} s.`);
  if (!teachers.length) notices.push("There are no teachers yet.");
  byId("notice").hidden = !notices.length;
  byId("notice").textContent = notices.join(" ");
}

function drawCharts(teachers) {
  const names = new Set(teachers.map((one) => one.teacher));
  const known = [...history.replicas.values()].filter((one) => names.has(one.teacher) && one.points.length);
  const groups = new Map();
  for (const one of known) {
    const name = known.length > MAX_SERIES ? one.teacher : `${one.teacher} / ${one.id}`;
    groups.set(name, [...(groups.get(name) ?? []), one]);
  }
  for (const name of colors.keys()) if (!groups.has(name)) colors.delete(name);
  for (const name of groups.keys()) if (!colors.has(name)) colors.set(name, freeColor());
  for (const [chart, value, how] of CHARTS) {
    const series = [...groups].map(([name, replicas]) => ({ name, color: colors.get(name), points: pointsOf(replicas, value, how) }));
    chart.draw(series, heardAt);
  }
  byId("legend").replaceChildren(...[...groups.keys()].map((name) => node("li", { class: `c${colors.get(name)}` }, name)));
}

function freeColor() {
  const used = [...colors.values()];
  const times = (color) => used.filter((one) => one === color).length;
  return [...Array(MAX_SERIES).keys()].reduce((a, b) => (times(b) < times(a) ? b : a));
}

// The points of one replica, or the sum or mean over several.
function pointsOf(replicas, value, how) {
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
    return [at, found.length ? (how === "sum" ? sum : sum / found.length) : null];
  });
}

byId("charts").append(...CHARTS.map(([chart]) => chart.element));
byId("teacher").addEventListener("change", show);
for (const [chart] of CHARTS) chart.draw([], heardAt);
ask();
