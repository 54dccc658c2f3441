// A line chart of the last minutes, in SVG. All text is inserted as text, never as markup.

const SPANS_S = [60, 120, 300]; // spans of the time axis; the smallest that holds all points is used
const TICK_S = { 60: 15, 120: 30, 300: 60 };
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [400, 190, 44, 10, 12, 34];
const GAP_S = 6; // the line breaks between points that are further apart than this
const SVG = "http://www.w3.org/2000/svg";

export function node(name, attributes = {}, ...children) {
  const svg = ["svg", "line", "path", "text", "circle", "g"].includes(name);
  const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit * 0.99995) return trimmed(value / unit) + "\u202f" + letter;
  }
  return trimmed(value);
}

function trimmed(value) {
  const size = Math.abs(value);
  return String(Number(value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3)));
}

// The distance of the grid lines: the smallest of 1, 2, 5 times a power of ten of which at most four reach `top`.
function stepTo(top) {
  const rough = top / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((n) => n * power).find((step) => step >= rough * 0.9999);
}

export class Chart {
  // `least` is the smallest top of the axis, so that noise near zero does not fill the chart.
  constructor(title, unit, least, most, help) {
    Object.assign(this, { title, unit, least, most, series: [], now: 0, spanS: SPANS_S[0], pointer: null });
    this.svg = node("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    this.tip = node("div", { class: "tip", hidden: "" });
    const caption = node("figcaption", {}, title, node("small", {}, unit));
    this.element = node("figure", { class: "chart", title: help }, caption, this.svg, this.tip);
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.#point(null));
  }

  // Shows `series`, each `{name, color, points: [[at, value or null], ...]}`, up to `now`.
  draw(series, now) {
    Object.assign(this, { series, now });
    const first = Math.min(now, ...series.map(({ points }) => points[0]?.[0] ?? now));
    this.spanS = SPANS_S.find((span) => span >= now - first) ?? SPANS_S.at(-1);
    const values = series.flatMap(({ points }) => points.map(([, value]) => value ?? 0));
    const step = stepTo(Math.min(Math.max(this.least, ...values), this.most));
    const highest = Math.max(this.least, ...values);
    this.top = Math.min(Math.ceil((highest / step) * 0.9999) * step, this.most);
    this.svg.replaceChildren(...this.#axes(step), ...series.map((one) => this.#line(one)), ...this.#cursor());
    const last = series.map(({ name, points }) => `${name} ${short(points.at(-1)?.[1])}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.title} in ${this.unit}, last ${this.spanS} s. Now: ${last || "nothing"}`);
  }

  #x(at) {
    return LEFT + (1 - (this.now - at) / this.spanS) * (WIDTH - LEFT - RIGHT);
  }

  #y(value) {
    return TOP + (1 - Math.min(value / this.top, 1)) * (HEIGHT - TOP - BOTTOM);
  }

  #axes(step) {
    const made = [];
    for (let value = 0; value <= this.top * 1.0001; value += step) {
      const y = this.#y(value);
      made.push(node("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y, class: value ? "grid" : "base" }));
      made.push(node("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, short(value)));
    }
    const unitS = this.spanS > 120 ? 60 : 1;
    for (let ago = 0; ago <= this.spanS; ago += TICK_S[this.spanS]) {
      const label = ago ? `−${ago / unitS}` : "now";
      made.push(node("text", { x: this.#x(this.now - ago), y: HEIGHT - BOTTOM + 15, "text-anchor": ago ? "middle" : "end" }, label));
    }
    const middle = (LEFT + WIDTH - RIGHT) / 2;
    const unit = unitS === 1 ? "seconds" : "minutes";
    made.push(node("text", { x: middle, y: HEIGHT - 4, "text-anchor": "middle" }, unit));
    return made;
  }

  #line({ color, points }) {
    let path = "";
    let before = null;
    for (const [at, value] of points) {
      if (value === null || at < this.now - this.spanS) continue;
      const joins = before !== null && at - before < GAP_S;
      path += `${joins ? "L" : "M"}${this.#x(at).toFixed(1)} ${this.#y(value).toFixed(1)}${joins ? "" : "h.01"}`;
      before = at;
    }
    return node("path", { class: `series c${color}`, d: path });
  }

  #point(event) {
    if (event === null) this.pointer = null;
    else {
      const box = this.svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width) * WIDTH;
      this.pointer = Math.min(Math.max((share - LEFT) / (WIDTH - LEFT - RIGHT), 0), 1);
    }
    this.draw(this.series, this.now);
  }

  // The values at the pointer.
  #cursor() {
    this.tip.hidden = true;
    if (this.pointer === null) return [];
    const wanted = this.now - (1 - this.pointer) * this.spanS;
    const near = ({ points }) => points.reduce((a, b) => (a && Math.abs(a[0] - wanted) < Math.abs(b[0] - wanted) ? a : b), null);
    const found = this.series.map((one) => [one, near(one)]).filter(([, point]) => point && Math.abs(point[0] - wanted) < GAP_S);
    if (!found.length) return [];
    const ago = Math.round(this.now - found[0][1][0]);
    const rows = found.map(([{ name, color }, [, value]]) => node("div", { class: `c${color}` }, `${name}: ${short(value)} ${this.unit}`));
    this.tip.replaceChildren(node("span", {}, ago ? `${ago} s ago` : "now"), ...rows);
    this.tip.hidden = false;
    this.tip.style.top = "36px";
    this.tip.style[this.pointer > 0.5 ? "left" : "right"] = "54px";
    this.tip.style[this.pointer > 0.5 ? "right" : "left"] = "auto";
    const x = this.#x(found[0][1][0]);
    const dots = found.filter(([, [, value]]) => value !== null);
    return [
      node("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }),
      ...dots.map(([{ color }, [at, value]]) => node("circle", { class: `dot c${color}`, cx: this.#x(at), cy: this.#y(value), r: 4 })),
    ];
  }
}
