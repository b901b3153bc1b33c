// The charts: what is drawn, how the shared time axis moves, what a pointer or an arrow key reads.
// Called by page.js with a History; knows no network. Data reaches the DOM through textContent alone.

import * as format from "./format.js";

const uPlot = window.uPlot;
const HEIGHT = 168;
const SYNC = "time";
const NARROWEST = 320;
const GAP = 12;
const FIRST_VALIDATION_CHARTS = 6;

const CHARTS = [
  {
    id: "loss", title: "Loss", write: format.number, canLog: true, marks: true,
    lines: [
      { column: "loss", label: "train", color: "--c1", faint: true },
      { smooth: "loss", label: "smoothed", color: "--c1" },
    ],
  },
  {
    id: "grad-norm", title: "Gradient norm", write: format.number, canLog: true, log: true, threshold: "gradient_norm",
    lines: [{ column: "grad_norm", label: "peak before clipping", color: "--c2" }],
  },
  {
    id: "throughput", title: "Throughput", write: (v) => format.number(v, 4), floor: 0,
    lines: [{ column: "samples_per_second", label: "samples/s", color: "--c3", gaps: true }],
  },
  {
    id: "step-time", title: "Step time", write: format.duration, axis: format.duration, canLog: true, floor: 0,
    threshold: "step_time",
    lines: [{ column: "step_time_seconds", label: "median of recent steps", color: "--c4" }],
  },
  {
    id: "learning-rate", title: "Learning rate", write: format.number, floor: 0,
    lines: [{ column: "learning_rate", label: "first group", color: "--c5" }],
  },
  {
    id: "machine", title: "Machine", write: format.percent, axis: (v) => format.percent(v, 0), floor: 0, ceiling: 1,
    lines: [
      { column: "cpu_ratio", label: "CPU", color: "--c1", gaps: true },
      { column: "memory_ratio", label: "memory", color: "--c2", gaps: true },
      { column: "gpu_ratio", label: "GPUs busy", color: "--c3", gaps: true, optional: true },
      { column: "gpu_memory_ratio", label: "fullest GPU memory", color: "--c4", gaps: true, optional: true },
    ],
  },
];

const isLoss = (name) => /(^|[_\s-])loss$/i.test(name);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** One chart: its figure, its legend that doubles as a readout, and the uPlot inside. */
class Chart {
  constructor(board, spec) {
    this.board = board;
    this.spec = spec;
    this.log = Boolean(spec.log);
    this.lines = [];
    this.shape = "";
    this.figure = element("figure", "chart");
    this.figure.id = `chart-${spec.id}`;
    const head = element("figcaption", "chart-head");
    this.title = element("h3", "", spec.title);
    this.where = element("span", "chart-where");
    head.append(this.title, this.where);
    if (spec.canLog) head.append(this.logButton());
    this.legend = element("ul", "chart-legend");
    this.plot = element("div", "plot");
    this.plot.tabIndex = 0;
    this.plot.setAttribute("role", "application");
    this.plot.addEventListener("keydown", (event) => this.onKey(event));
    this.plot.addEventListener("blur", () => this.board.point(null));
    this.plot.addEventListener("dblclick", () => this.board.show({ kind: "all" }));
    this.figure.append(head, this.legend, this.plot);
  }

  logButton() {
    const button = element("button", "toggle", "log");
    button.type = "button";
    const tell = () => {
      button.setAttribute("aria-pressed", String(this.log));
      button.setAttribute("aria-label", `${this.spec.title}: logarithmic scale`);
    };
    button.addEventListener("click", () => {
      this.log = !this.log;
      tell();
      this.shape = "";
      this.update();
    });
    tell();
    return button;
  }

  /** Lines that have something to show; an optional one appears with its first value. */
  presentLines() {
    const { history } = this.board;
    const lines = this.spec.lines.filter((line) => !line.optional || history.has(line.column));
    if (this.spec.id !== "loss") return lines;
    const losses = history.validationNames.filter(isLoss);
    return [
      ...lines,
      ...losses.map((name, i) => ({
        validation: name, label: `validation ${name}`, color: i % 2 ? "--c4" : "--c2", points: true,
      })),
    ];
  }

  values(line) {
    const { history } = this.board;
    if (line.smooth) return history.smoothed(line.smooth);
    if (line.validation) return history.validationColumn(line.validation);
    return history.column(line.column);
  }

  update() {
    this.lines = this.presentLines();
    const shape = `${this.log} ${this.lines.map((line) => line.label).join("\n")} ${this.board.theme}`;
    let columns = this.lines.map((line) => this.values(line));
    // A logarithm has no place for zero and below: these become gaps.
    if (this.log) columns = columns.map((column) => column.map((v) => (v !== null && v > 0 ? v : null)));
    this.data = [this.board.history.time, ...columns];
    if (shape !== this.shape) {
      this.shape = shape;
      this.build();
    } else {
      this.uplot.setData(this.data);
    }
    this.read();
  }

  build() {
    this.uplot?.destroy();
    this.legend.replaceChildren(
      ...this.lines.map((line) => {
        const item = element("li");
        const swatch = element("span", line.faint ? "swatch faint" : "swatch");
        swatch.style.backgroundColor = this.board.color(line.color);
        item.append(swatch, element("span", "name", line.label), element("span", "reading", format.NONE));
        return item;
      }),
    );
    this.uplot = new uPlot(this.options(), this.data, this.plot);
  }

  options() {
    const { board, spec } = this;
    const axis = {
      stroke: board.color("--quiet"),
      font: "11px system-ui, sans-serif",
      grid: { stroke: board.color("--grid"), width: 1 },
      ticks: { show: false },
    };
    const line = (one) => ({
      label: one.label,
      stroke: board.color(one.color, one.faint ? 0.38 : 1),
      width: one.faint ? 1 : 1.6,
      spanGaps: !one.gaps,
      points: one.points ? { show: true, size: 5, fill: board.color(one.color) } : { size: 4 },
    });
    return {
      width: Math.max(120, this.plot.clientWidth),
      height: HEIGHT,
      padding: [6, 26, 0, 0], // the last tick's label is written half beyond the axis
      legend: { show: false },
      scales: {
        x: { time: false, range: () => board.window() },
        y: { distr: this.log ? 3 : 1, range: (_, low, high) => this.range(low, high) },
      },
      series: [{}, ...this.lines.map(line)],
      axes: [
        {
          ...axis, size: 22, gap: 6, space: 64,
          incrs: [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800],
          values: (_, splits, __, ___, step) => splits.map((at) => format.tick(at, step)),
        },
        {
          ...axis, size: 58, gap: 6, space: 30,
          grid: { ...axis.grid, filter: (_, splits) => (this.log ? splits.map((v) => (isPowerOfTen(v) ? v : null)) : splits) },
          values: (_, splits) => splits.map((v) => (v === null ? "" : (spec.axis ?? format.short)(v))),
        },
      ],
      cursor: {
        y: false,
        drag: { x: true, y: false, setScale: false },
        points: { size: 7, width: 1.5 },
        // Only the position travels between charts; each decides on its own what a drag means.
        sync: { key: SYNC, setSeries: false, filters: { pub: (type) => !/^(mousedown|mouseup|dblclick)$/.test(type) } },
      },
      hooks: {
        setCursor: [() => this.read()],
        setSelect: [(u) => this.onSelect(u)],
        drawClear: [(u) => this.drawMarks(u)],
        draw: [(u) => this.drawThreshold(u)],
      },
    };
  }

  range(low, high) {
    const { spec } = this;
    const limit = this.limit();
    if (low === null || high === null || low === undefined) return this.log ? [0.1, 10] : [0, 1];
    if (this.log) {
      // The limit belongs into view when it is near enough to matter: within three powers of ten.
      if (limit > 0 && limit / high < 1e3) high = Math.max(high, limit * 1.3);
      return [oneDigit(low / 1.1, Math.floor), oneDigit(high * 1.1, Math.ceil)];
    }
    if (spec.ceiling !== undefined) return [spec.floor, Math.max(spec.ceiling, high)];
    if (limit !== null && high > limit * 0.4) high = Math.max(high, limit * 1.05);
    const pad = (high - low || Math.abs(high) || 1) * 0.08;
    return [spec.floor !== undefined && low >= spec.floor ? spec.floor : low - pad, high + pad];
  }

  limit() {
    return this.spec.threshold ? this.board.thresholds.get(this.spec.threshold) ?? null : null;
  }

  drawThreshold(u) {
    const limit = this.limit();
    if (limit === null) return;
    const { min, max } = u.scales.y;
    if (!(limit > min && limit < max)) return;
    const y = Math.round(u.valToPos(limit, "y", true)) + 0.5;
    const { ctx, bbox } = u;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = this.board.color("--bad");
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([5 * devicePixelRatio, 4 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(bbox.left, y);
    ctx.lineTo(bbox.left + bbox.width, y);
    ctx.stroke();
    ctx.font = `${10.5 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.textAlign = "right";
    const room = y - bbox.top > 16 * devicePixelRatio;
    ctx.textBaseline = room ? "bottom" : "top";
    const text = `alert above ${(this.spec.axis ?? format.short)(limit)}`;
    ctx.fillText(text, bbox.left + bbox.width - 4, y + (room ? -2 : 3) * devicePixelRatio);
    ctx.restore();
  }

  /** Behind the lines: when alerts began, and on the loss chart where checkpoints were committed. */
  drawMarks(u) {
    const { ctx, bbox } = u;
    const bottom = bbox.top + bbox.height;
    const place = (at) => {
      const x = u.valToPos(at, "x", true);
      return x >= bbox.left && x <= bbox.left + bbox.width ? Math.round(x) + 0.5 : null;
    };
    ctx.save();
    ctx.strokeStyle = this.board.color("--bad", 0.45);
    ctx.lineWidth = devicePixelRatio;
    for (const at of this.board.alertTimes) {
      const x = place(at);
      if (x === null) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bottom);
      ctx.stroke();
    }
    if (this.spec.marks) {
      ctx.fillStyle = this.board.color("--quiet");
      const size = 4 * devicePixelRatio;
      for (const at of this.board.checkpointTimes) {
        const x = place(at);
        if (x === null) continue;
        ctx.beginPath();
        ctx.moveTo(x - size, bottom);
        ctx.lineTo(x + size, bottom);
        ctx.lineTo(x, bottom - size * 1.5);
        ctx.fill();
      }
    }
    ctx.restore();
  }

  /** Puts values into the legend: those under the cursor, or the newest while nothing is pointed at. */
  read() {
    if (!this.data || !this.uplot) return;
    const { history } = this.board;
    const pointed = this.uplot.cursor.idx ?? null;
    const inside = pointed !== null && this.uplot.cursor.left >= 0;
    const readings = this.legend.querySelectorAll(".reading");
    this.lines.forEach((line, i) => {
      const column = this.data[i + 1];
      const value = inside ? nearest(column, pointed, line.points ? Infinity : 0) : newest(column);
      setText(readings[i], this.spec.write(value));
    });
    let where = "";
    if (inside && history.time[pointed] !== undefined) {
      where = `step ${format.integer(history.column("step")[pointed])} · ${format.clock(history.time[pointed])}`;
    }
    setText(this.where, where);
    const label = `${this.spec.title} over time, ${history.length} points, ${this.reading()}. Arrow keys read single points.`;
    if (!inside) this.plot.setAttribute("aria-label", label);
  }

  reading() {
    const readings = this.legend.querySelectorAll(".reading");
    return this.lines.map((line, i) => `${line.label} ${readings[i].textContent}`).join(", ");
  }

  onSelect(u) {
    if (u.select.width < 4) return;
    const min = u.posToVal(u.select.left, "x");
    const max = u.posToVal(u.select.left + u.select.width, "x");
    this.board.show({ kind: "fixed", min, max });
  }

  onKey(event) {
    const { time } = this.board.history;
    if (time.length === 0) return;
    const [low, high] = this.board.window();
    const shown = time.map((at, i) => [at, i]).filter(([at]) => at >= low && at <= high).map(([, i]) => i);
    const first = shown[0];
    const last = shown[shown.length - 1];
    const leap = event.shiftKey ? 10 : 1;
    const now = this.board.pointed ?? last + (event.key === "ArrowLeft" ? 1 : 0);
    const target = { ArrowLeft: now - leap, ArrowRight: now + leap, Home: first, End: last, Escape: null }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    this.board.point(target === null ? null : Math.min(last, Math.max(first, target)));
    if (target !== null) this.board.say(`${this.where.textContent}: ${this.reading()}`);
  }
}

/** Rounds to one significant digit: the axis counts its ticks from the end of a logarithmic scale. */
function oneDigit(value, round) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return Number((round(value / unit) * unit).toPrecision(1));
}

const isPowerOfTen = (value) => value > 0 && Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-9;

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function newest(column) {
  for (let i = column.length - 1; i >= 0; i -= 1) if (column[i] !== null) return column[i];
  return null;
}

/** The value at an index or the last one before it, at most `reach` points back. */
function nearest(column, index, reach) {
  for (let i = index; i >= 0 && index - i <= reach; i -= 1) if (column[i] !== null) return column[i];
  return null;
}

/** All charts of the page on one time axis. */
export class Board {
  /**
   * @param grid element that receives the figures
   * @param history the History all charts draw from
   * @param say function that reads a sentence to a screen reader
   * @param onView called with the view after each change
   */
  constructor(grid, history, say, onView) {
    this.grid = grid;
    this.history = history;
    this.say = say;
    this.onView = onView;
    this.view = { kind: "all" };
    this.thresholds = new Map();
    this.alertTimes = [];
    this.checkpointTimes = [];
    this.pointed = null;
    this.theme = 0;
    this.made = 0;
    this.charts = CHARTS.map((spec) => this.add(spec));
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", () => {
      this.theme += 1;
      this.update();
    });
    new ResizeObserver(() => this.resize()).observe(grid);
  }

  /** Makes a chart and puts it after another one, or at the end. */
  add(spec, after = null) {
    const chart = new Chart(this, spec);
    if (after) after.figure.after(chart.figure);
    else this.grid.append(chart.figure);
    return chart;
  }

  color(name, alpha = 1) {
    const value = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    if (alpha === 1) return value;
    return `${value}${Math.round(alpha * 255).toString(16).padStart(2, "0")}`;
  }

  /** Start and end of the time shown, in epoch seconds. */
  window() {
    const { time } = this.history;
    if (this.view.kind === "fixed") return [this.view.min, this.view.max];
    if (time.length === 0) return [0, 1];
    const end = time[time.length - 1];
    const start = this.view.kind === "last" ? Math.max(end - this.view.seconds, time[0]) : time[0];
    return [start, Math.max(end, start + 1)];
  }

  show(view) {
    this.view = view;
    for (const { uplot } of this.charts) uplot?.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.update();
    this.onView(view);
  }

  /** Redraws everything from the history. */
  update() {
    this.addValidationCharts();
    for (const chart of this.charts) chart.update();
  }

  // Validation metrics beside losses have scales of their own, so each gets a chart of its own.
  addValidationCharts() {
    const wanted = this.history.validationNames.filter((name) => !isLoss(name)).slice(0, FIRST_VALIDATION_CHARTS);
    const have = this.charts.filter((chart) => chart.spec.validation).map((chart) => chart.spec.validation);
    for (const name of wanted.filter((one) => !have.includes(one))) {
      this.made += 1;
      const spec = {
        id: `validation-${this.made}`, title: `Validation: ${name}`, write: format.number, validation: name,
        lines: [{ validation: name, label: name, color: "--c2", points: true }],
      };
      const last = this.charts.findLastIndex((chart) => chart.spec.validation || chart.spec.id === "loss");
      this.charts.splice(last + 1, 0, this.add(spec, this.charts[last]));
    }
    for (const chart of this.charts.filter((one) => one.spec.validation && !wanted.includes(one.spec.validation))) {
      chart.uplot?.destroy();
      chart.figure.remove();
      this.charts.splice(this.charts.indexOf(chart), 1);
    }
    if (this.charts.length !== this.arranged) this.arrange();
  }

  /** Chooses the number of columns so that rows are as equal as they can be; a shorter last row grows wider. */
  arrange() {
    const most = Math.max(1, Math.floor((this.grid.clientWidth + GAP) / (NARROWEST + GAP)));
    const rows = Math.ceil(this.charts.length / most);
    this.grid.style.setProperty("--columns", String(Math.ceil(this.charts.length / rows)));
    this.arranged = this.charts.length;
  }

  /** Moves the cursor of every chart to one point of the history, or takes it away. */
  point(index) {
    this.pointed = index;
    for (const { uplot } of this.charts) {
      if (!uplot) continue;
      const left = index === null ? -10 : uplot.valToPos(this.history.time[index], "x");
      uplot.setCursor({ left, top: index === null ? -10 : uplot.over.clientHeight / 2 });
    }
  }

  resize() {
    this.arrange();
    for (const { uplot, plot } of this.charts) {
      const width = plot.clientWidth;
      if (uplot && width > 0 && width !== uplot.width) uplot.setSize({ width, height: HEIGHT });
    }
  }
}
