// The tables of replicas, jobs and errors.

import { node, short } from "./chart.js";
import { SILENT_S } from "./rates.js";

const MAX_ROWS = 100;

const percent = (share) => (share === null ? "–" : `${(share * 100).toFixed(share < 0.0995 ? 1 : 0)} %`);
const number = (text) => node("td", { class: "number" }, text);
const name = (text) => node("td", { class: "name" }, text || "–");

export function drawTables(teachers, history, now) {
  const replicas = teachers.flatMap(({ teacher, replicas }) => replicas.map((one) => ({ teacher, ...one })));
  fill("replicas", REPLICA_HEADS, replicas.map((one) => replicaRow(one, history, now)), "no replica yet");
  fill("jobs", JOB_HEADS, teachers.flatMap((one) => jobRows(one, history)), "no job yet");
  fill("errors", ERROR_HEADS, errorRows(replicas), "no request has failed");
}

function fill(id, heads, rows, nothing) {
  const titles = heads.map(([title, unit, kind]) => node("th", { scope: "col", class: kind ?? "" }, title, unit ? node("small", {}, unit) : ""));
  const shown = rows.slice(0, MAX_ROWS);
  const note = rows.length > MAX_ROWS ? `and ${rows.length - MAX_ROWS} more` : rows.length ? "" : nothing;
  if (note) shown.push(node("tr", {}, node("td", { class: "empty", colspan: heads.length }, note)));
  document.getElementById(id).replaceChildren(node("thead", {}, node("tr", {}, ...titles)), node("tbody", {}, ...shown));
}

const REPLICA_HEADS = [
  ["Teacher"], ["Replica"], ["State"], ["Revision"], ["Address"], ["Throughput", "rows/s", "number"], ["Busy", "of a device", "number"],
  ["Delay", "ms", "number"], ["Rows per forward", "of the limit", "number"], ["In flight", "and queued", "number"],
  ["Sessions", "", "number"], ["Cache", "hits", "number"],
];

function replicaRow({ teacher, id, state, revision, address, load }, history, now) {
  const point = history.latest(teacher, id, now);
  const silent = Math.round(now - (history.of(teacher, id)?.heardAt ?? now));
  const limit = load.batch_limit_rows ? ` of ${short(load.batch_limit_rows)}` : "";
  const asked = load.cached + load.missed;
  return node("tr", {},
    name(teacher), name(id),
    silent >= SILENT_S ? node("td", { class: "silent" }, `no news for ${silent} s`) : node("td", { class: state }, state),
    node("td", {}, revision.slice(0, 12) || "–"), node("td", {}, address || location.hostname),
    number(short(point?.rowsPerS)), number(percent(point?.busy ?? null)), number(short((load.queue_delay_s ?? 0) * 1000)),
    number(point?.rowsPerForward ? short(point.rowsPerForward) + limit : "–"),
    number(`${load.in_flight} + ${load.queued}`), number(String(load.sessions)), number(percent(asked ? load.cached / asked : null)),
  );
}

const JOB_HEADS = [
  ["Teacher"], ["Job"], ["Weight", "", "number"], ["Sessions", "", "number"], ["In flight", "queued included", "number"], ["Throughput", "rows/s", "number"],
  ["Share", "of rows", "number"], ["Rows", "in all", "number"], ["Waits", "", "number"], ["Errors", "", "number"],
];

// One row for each job of a teacher, summed over its replicas; the busiest jobs come first.
function jobRows({ teacher, replicas }, history) {
  const { rows, all, seconds } = history.jobRows(teacher);
  const jobs = new Map();
  for (const one of replicas.flatMap(({ load }) => load.jobs)) {
    const job = jobs.get(one.job) ?? { job: one.job, weight: 0, sessions: 0, in_flight: 0, rows: 0, waits: 0, errors: 0 };
    job.weight = Math.max(job.weight, one.weight ?? 0);
    for (const field of ["sessions", "in_flight", "rows", "waits", "errors"]) job[field] += one[field];
    jobs.set(one.job, job);
  }
  const recent = (job) => rows.get(job.job) ?? 0;
  const sorted = [...jobs.values()].sort((a, b) => recent(b) - recent(a) || b.sessions - a.sessions || b.rows - a.rows);
  return sorted.map((job) => {
    const share = all ? recent(job) / all : null;
    const bar = share === null ? "" : node("progress", { max: 1, value: share, "aria-hidden": "true" });
    return node("tr", { class: job.sessions ? "" : "ended" },
      name(teacher), name(job.job), number(short(job.weight)), number(job.sessions ? String(job.sessions) : "ended"),
      number(String(job.in_flight)), number(seconds ? short(recent(job) / seconds) : "–"),
      node("td", { class: "number" }, percent(share), bar), number(short(job.rows)), number(short(job.waits)), number(short(job.errors)),
    );
  });
}

const ERROR_HEADS = [["Teacher"], ["Replica"], ["Error"], ["Requests", "since the replica's start", "number"]];

function errorRows(replicas) {
  return replicas.flatMap(({ teacher, id, load }) =>
    Object.entries(load.errors).sort().map(([error, n]) => node("tr", {}, name(teacher), name(id), node("td", {}, error), number(short(n)))),
  );
}
