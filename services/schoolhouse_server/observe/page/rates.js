// Rates from the differences between reports of a replica, by the replica's own clock.

const WINDOW_S = 300; // how long points are kept
const SHARE_S = 30; // the time over which shares of jobs are computed
export const SILENT_S = 10; // a replica whose clock has stood still for this long counts as silent

const total = (values) => Object.values(values).reduce((a, b) => a + b, 0);
const keyOf = (teacher, id) => JSON.stringify([teacher, id]);

export class History {
  constructor() {
    this.replicas = new Map();
  }

  // Takes an answer of /api/state that came at `now`, in seconds.
  add(state, now) {
    const present = new Set();
    for (const { teacher, replicas } of state.teachers) {
      for (const { id, load } of replicas) {
        const key = keyOf(teacher, id);
        present.add(key);
        if (!this.replicas.has(key)) this.replicas.set(key, { teacher, id, points: [], load, heardAt: now });
        else this.#advance(this.replicas.get(key), load, now);
      }
    }
    for (const [key, known] of this.replicas) {
      known.points = known.points.filter((point) => point.at > now - WINDOW_S);
      for (const point of known.points) if (point.at <= now - SHARE_S) point.jobRows = null;
      if (!present.has(key) && !known.points.length) this.replicas.delete(key);
    }
  }

  of(teacher, id) {
    return this.replicas.get(keyOf(teacher, id));
  }

  // The last rates of a replica; undefined if it is silent.
  latest(teacher, id, now) {
    const point = this.of(teacher, id)?.points.at(-1);
    return point && point.at > now - SILENT_S ? point : undefined;
  }

  // Rows of each job of a teacher, and of all jobs, in the last 30 s, and the seconds over which they were counted.
  jobRows(teacher) {
    const rows = new Map();
    let all = 0;
    let seconds = 0;
    for (const known of this.replicas.values()) {
      if (known.teacher !== teacher) continue;
      const points = known.points.filter((point) => point.jobRows);
      seconds = Math.max(seconds, points.reduce((sum, point) => sum + point.seconds, 0));
      for (const point of points) {
        for (const [job, n] of point.jobRows) {
          rows.set(job, (rows.get(job) ?? 0) + n);
          all += n;
        }
      }
    }
    return { rows, all, seconds };
  }

  #advance(known, load, now) {
    const before = known.load;
    const seconds = load.uptime_s - before.uptime_s;
    if (seconds === 0) return; // it is the same report
    known.load = load;
    known.heardAt = now;
    if (seconds > 0) known.points.push(pointOf(before, load, seconds, now)); // a smaller uptime means a restart
  }
}

function pointOf(before, load, seconds, at) {
  const grown = (field) => Math.max(load[field] - before[field], 0);
  const forwards = grown("forwards");
  const rows = grown("rows");
  const earlier = new Map(before.jobs.map((job) => [job.job, job.rows]));
  return {
    at,
    seconds,
    rowsPerS: rows / seconds,
    requestsPerS: grown("served") / seconds,
    busy: Math.min(Math.max((load.stage_s.forward ?? 0) - (before.stage_s.forward ?? 0), 0) / seconds, 1),
    rowsPerForward: forwards ? rows / forwards : null,
    delayS: load.queue_delay_s ?? 0,
    waiting: load.queued + load.in_flight,
    errorsPerS: Math.max(total(load.errors) - total(before.errors), 0) / seconds,
    jobRows: new Map(load.jobs.map((job) => [job.job, Math.max(job.rows - (earlier.get(job.job) ?? 0), 0)])),
  };
}
