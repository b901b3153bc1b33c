// The live page: asks /api/live once a second and writes what it says. Every text goes through textContent,
// so that nothing a run, a host or an alert is called can become markup.

import { Board } from "./charts.js";
import * as format from "./format.js";
import { History } from "./history.js";

const VERSION = 1;
const POLL_MS = 1000;
const POLL_HIDDEN_MS = 15000;
const ANSWER_MS = 8000;
const ENDED = new Set(["finished", "stopped", "failed"]);

const PHASE_COLORS = {
  data: "--c4", rollout: "--c5", forward: "--c1", backward: "--c3", optimizer: "--c6",
  checkpoint: "--c2", validation: "--c7", other: "--c8",
};
const STATE_COLORS = { running: "#2e8b57", failed: "#c8372d", starting: "#3b7dd8", stopping: "#c98a00" };
const LOST_NAMES = { outside_step: "outside steps", data: "data wait" };
const SEVERITIES = ["critical", "warning", "info"];

const byId = (id) => document.getElementById(id);
const known = (value) => value !== null && value !== undefined;
const epochOf = (value) => (typeof value === "string" ? Date.parse(value) / 1000 : value);

function write(target, text) {
  const node = typeof target === "string" ? byId(target) : target;
  if (node.textContent !== text) node.textContent = text;
}

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

/** Rebuilds a node's children only when what they show has changed, so that selections and focus stay. */
const shown = new Map();
function fill(id, content, build) {
  const text = JSON.stringify(content);
  if (shown.get(id) === text) return;
  shown.set(id, text);
  byId(id).replaceChildren(...content.map(build));
}

const history = new History();
const board = new Board(byId("chart-grid"), history, (text) => write("reader", text), (view) => {
  byId("zoom-out").hidden = view.kind !== "fixed";
  for (const radio of document.querySelectorAll("#range input")) {
    radio.checked = view.kind === "all" ? radio.value === "all" : view.kind === "last" && Number(radio.value) === view.seconds;
  }
});

byId("range").addEventListener("change", (event) => {
  const { value } = event.target;
  board.show(value === "all" ? { kind: "all" } : { kind: "last", seconds: Number(value) });
});
byId("zoom-out").addEventListener("click", () => board.show({ kind: "all" }));

// ---- what the page says ------------------------------------------------------------------------

function showIdentity({ run, uptime_seconds: uptime, now }) {
  write("state", run.state);
  byId("state").dataset.state = run.state;
  write("model", run.model);
  write("run-id", run.id);
  const facts = [
    [run.device, run.precision].filter(known).join(" · "),
    known(run.host) ? `host ${run.host}` : "",
    known(run.rank) ? `rank ${run.rank} of ${run.world_size}` : "",
    known(run.pid) ? `pid ${run.pid}` : "",
    known(run.started) ? `started ${format.moment(epochOf(run.started), now)}` : "",
    known(uptime) ? `up ${format.age(uptime)}` : "",
    known(run.resumed_from_step) ? `resumed from step ${format.integer(run.resumed_from_step)}` : "",
  ];
  fill("facts", facts.filter(Boolean), (text) => make("li", "", text));
}

const LOOPBACK = /^(localhost|127(\.\d+){3}|\[::1\])$/;

/** Leads to the sidecar's page of all runs; what stood there last stays, also when the trainer is gone. */
function showAllRuns({ all_runs_page: page, run }) {
  let url = null;
  try {
    url = known(page) ? new URL(page) : null;
  } catch {
    // A sidecar that was told a wrong address of itself: no link.
  }
  if (url !== null && !/^https?:$/.test(url.protocol)) url = null;
  // A loopback address means the reader's own machine, and there is no such page there.
  const elsewhere = url !== null && LOOPBACK.test(url.hostname) && !LOOPBACK.test(location.hostname);
  byId("all-runs").hidden = url === null || elsewhere;
  if (url !== null && !elsewhere) byId("all-runs").href = url.href;
  write("all-runs-note", elsewhere ? `the page of all runs opens on ${run.host} alone, at ${url.host}` : "");
}

function showProgress({ run, progress }) {
  const { epoch, epochs, step, steps_per_epoch: perEpoch, samples, eta_seconds: eta } = progress;
  const total = epochs > 0 && perEpoch > 0 ? epochs * perEpoch : null;
  const ratio = total !== null && known(step) ? Math.min(1, step / total) : null;
  const bar = byId("progress");
  byId("progress-fill").style.width = `${(ratio ?? 0) * 100}%`;
  if (ratio === null) bar.removeAttribute("aria-valuenow");
  else bar.setAttribute("aria-valuenow", (ratio * 100).toFixed(1));
  // Epochs are counted from 0 inside; people count the one they are in.
  const current = known(epoch) ? (epochs > 0 ? Math.min(epoch + 1, epochs) : epoch + 1) : null;
  const facts = [
    `epoch ${format.integer(current)}${epochs > 0 ? ` of ${format.integer(epochs)}` : ""}`,
    `step ${format.integer(step)}${total === null ? "" : ` of ${format.integer(total)}`}`,
    ratio === null ? "" : format.percent(ratio),
    samples > 0 ? `${format.integer(samples)} samples` : "",
    known(eta) && !ENDED.has(run.state) ? `${format.age(eta)} left` : "",
  ].filter(Boolean);
  bar.setAttribute("aria-valuetext", facts.join(", "));
  fill("progress-facts", facts, (text) => make("li", "", text));
  document.title = `${ratio === null ? `step ${format.integer(step)}` : format.percent(ratio, 0)} · ${run.state} · ${run.model}`;
}

function showNumbers({ latest, goodput, checkpoints, now, uptime_seconds: uptime }) {
  write("loss", format.number(latest.loss));
  const validation = Object.entries(latest.validation ?? {});
  const few = validation.slice(0, 3).map(([name, value]) => `${name} ${format.number(value)}`).join(", ");
  write("loss-note", few && `validation: ${few}`);
  write("grad-norm", format.number(latest.grad_norm));
  const limit = board.thresholds.get("gradient_norm");
  write("grad-norm-note", known(limit) ? `alert above ${format.short(limit)}` : "before clipping");
  byId("grad-norm").classList.toggle("bad", known(limit) && latest.grad_norm > limit);
  write("throughput", format.number(latest.samples_per_second));
  write("throughput-note", "over the last 10 s");
  write("step-time", format.duration(latest.step_time_seconds));
  write("step-time-note", "median of recent steps");
  write("learning-rate", format.number(latest.learning_rate, 3));
  write("learning-rate-note", known(latest.loss_scale) && latest.loss_scale !== 1 ? `loss scale ${format.number(latest.loss_scale)}` : "");
  write("goodput", format.percent(goodput.ratio));
  const lost = Object.values(goodput.lost_seconds ?? {}).reduce((sum, value) => sum + (value ?? 0), 0);
  write("goodput-note", known(uptime) ? `${format.age(lost)} of ${format.age(uptime)} lost` : "");
  const [last] = checkpoints;
  write("checkpoint-age", last ? `${format.age(now - last.at)} ago` : "none");
  write("checkpoint-note", last ? `${last.kind} at step ${format.integer(last.step)}` : "");
  const further = Object.entries(latest.train ?? {});
  byId("further-row").hidden = further.length === 0;
  fill("further", further, ([name, value]) => {
    const pair = make("div");
    pair.append(make("dt", "", name), make("dd", "", format.number(value)));
    return pair;
  });
}

function row(cells) {
  const made = make("tr");
  for (const [text, className] of cells) made.append(make("td", className ?? "", text));
  return made;
}

function table(id, rows, build) {
  byId(`${id}-empty`).hidden = rows.length > 0;
  byId(`${id}-scroll`).hidden = rows.length === 0;
  const text = JSON.stringify(rows);
  if (shown.get(id) === text) return;
  shown.set(id, text);
  byId(id).querySelector("tbody").replaceChildren(...rows.map(build));
  // On a phone a row is a card: each cell says by itself what it is.
  const heads = [...byId(id).tHead.rows[0].cells].map((head) => head.textContent);
  for (const cell of byId(id).querySelectorAll("tbody td")) cell.dataset.label = heads[cell.cellIndex];
}

const measured = (value, unit) => `${format.short(value)}${unit ? ` ${unit}` : ""}`;

let announced = null;
function showAlerts({ alerts, alert_mode: mode, now }) {
  const rank = (alert) => (alert.state === "firing" ? 0 : 10) + SEVERITIES.indexOf(alert.severity);
  const sorted = [...alerts].sort((a, b) => rank(a) - rank(b) || a.since - b.since);
  write(
    "alert-mode",
    { sidecar: "a sidecar is watching: it acts, the trainer reports", "in-process": "no sidecar: the trainer acts on its own alerts" }[mode] ?? "",
  );
  byId("alerts-section").dataset.worst = sorted.find((alert) => alert.state === "firing")?.severity ?? "none";
  byId("alerts-section").classList.toggle("none", sorted.length === 0);
  table("alerts", sorted, (alert) => {
    const labels = Object.entries(alert.labels ?? {}).map(([name, value]) => `${name} ${value}`).join(", ");
    const made = row([
      [alert.severity, `severity ${SEVERITIES.includes(alert.severity) ? alert.severity : "info"}`],
      [labels ? `${alert.name} (${labels})` : alert.name, "strong"],
      [alert.state],
      [measured(alert.value, alert.unit), "num"],
      [measured(alert.threshold, alert.unit), "num"],
      [format.moment(alert.since, now)],
      [alert.summary, "wide"],
    ]);
    made.dataset.state = alert.state;
    return made;
  });
  const firing = sorted.filter((alert) => alert.state === "firing");
  const sentence = firing.map((alert) => `${alert.severity} alert ${alert.name}: ${alert.summary}`).join(". ");
  // Said once per change: a reader must not hear the same alert every second.
  if (announced !== null || sentence) {
    if (sentence !== announced) write("announcer", sentence || "No alert is firing any more.");
    announced = sentence;
  }
}

function showTables({ checkpoints, commands, now }) {
  table("checkpoints", checkpoints, (one) =>
    row([
      [format.integer(one.step), "num"], [one.kind], [format.moment(one.at, now)],
      [format.bytes(one.bytes), "num"], [format.duration(one.seconds), "num"],
    ]),
  );
  table("commands", commands, (one) => {
    const made = row([
      [format.moment(epochOf(one.at), now)], [one.action, "strong"], [one.state, "outcome"],
      [format.integer(one.step), "num"], [one.source ?? "", "name"], [one.reason ?? "", "wide"],
    ]);
    made.dataset.outcome = one.state;
    return made;
  });
}

function showPhases({ phases, goodput, uptime_seconds: uptime }) {
  const spent = Object.entries(phases).filter(([, seconds]) => seconds > 0);
  const total = spent.reduce((sum, [, seconds]) => sum + seconds, 0);
  const color = (name) => board.color(PHASE_COLORS[name] ?? "--c8");
  write("phases-total", total > 0 ? `${format.duration(total)} accounted for` : "");
  fill("phase-bar", spent.map(([name, seconds]) => [name, seconds / total, color(name)]), ([name, share, paint]) => {
    const part = make("div");
    part.style.width = `${share * 100}%`;
    part.style.backgroundColor = paint;
    part.title = `${name} ${format.percent(share)}`;
    return part;
  });
  byId("phase-bar").setAttribute(
    "aria-label",
    `Wall time by phase: ${spent.map(([name, seconds]) => `${name} ${format.percent(seconds / total)}`).join(", ") || "none yet"}`,
  );
  fill("phase-legend", spent.map(([name, s]) => [name, format.duration(s), format.percent(s / total), color(name)]), (one) => {
    const item = make("li");
    const swatch = make("span", "swatch");
    [, , , swatch.style.backgroundColor] = one;
    item.append(swatch, make("span", "name", one[0]), make("span", "num", one[1]), make("span", "num quiet", one[2]));
    return item;
  });
  const lost = Object.entries(goodput.lost_seconds ?? {}).map(([cause, seconds]) => ({
    name: LOST_NAMES[cause] ?? cause, ratio: uptime > 0 ? (seconds ?? 0) / uptime : 0, text: format.duration(seconds),
  }));
  bars("lost", lost);
}

/** Named horizontal bars: a share of 1 as length, the value as text. */
function bars(id, rows) {
  fill(id, rows, ({ name, ratio, text, note, level }) => {
    const item = make("li");
    if (known(ratio)) {
      const track = make("span", "track");
      const part = make("span", level ?? "");
      part.style.width = `${Math.max(0, Math.min(1, ratio)) * 100}%`;
      track.append(part);
      item.append(make("span", "name", name), track, make("span", "num", text));
    } else {
      item.append(make("span", "name", name), make("span", "track none"), make("span", "num", text));
    }
    if (note) item.append(make("span", "under", note));
    return item;
  });
}

const level = (ratio, key) => {
  const limit = board.thresholds.get(key);
  return known(limit) && ratio * 100 > limit ? "bad" : "";
};

function showMachine({ host, gpus, run }) {
  write("machine-host", run.host ?? "");
  bars("host", [
    { name: "CPU", ratio: host.cpu_ratio, text: format.percent(host.cpu_ratio), level: level(host.cpu_ratio, "cpu"),
      note: `this process: ${format.number(host.process_cpu_ratio, 3)} cores` },
    { name: "Memory", ratio: host.memory_ratio, text: format.percent(host.memory_ratio), level: level(host.memory_ratio, "memory"),
      note: `${format.bytes(host.memory_used_bytes)} of ${format.bytes(host.memory_limit_bytes)}, this process ${format.bytes(host.resident_bytes)}` },
    { name: "Disk", text: `${format.bytes(host.disk_free_bytes)} free` },
  ]);
  const onGpu = /cuda|gpu|rocm|hip/i.test(run.device ?? "");
  byId("gpus-empty").hidden = gpus.length > 0;
  write("gpus-empty", onGpu ? `NVML reports no GPU, although the run computes on ${run.device}.` : `No GPU: this run computes on ${run.device ?? "an unknown device"}.`);
  fill("gpus", gpus, (gpu) => {
    const card = make("article", "gpu");
    card.append(make("h4", "", `${gpu.device} · ${gpu.name}`));
    const list = make("ul", "bars");
    const memory = known(gpu.memory_used_bytes) && gpu.memory_total_bytes > 0 ? gpu.memory_used_bytes / gpu.memory_total_bytes : null;
    list.append(
      ...[
        ["busy", gpu.utilization_ratio, format.percent(gpu.utilization_ratio, 0), ""],
        ["memory", memory, `${format.bytes(gpu.memory_used_bytes)} of ${format.bytes(gpu.memory_total_bytes)}`, level(memory, "gpu_memory")],
      ].map(([name, ratio, text, grade]) => {
        const item = make("li");
        const track = make("span", "track");
        const part = make("span", grade);
        part.style.width = `${Math.min(1, ratio ?? 0) * 100}%`;
        track.append(part);
        item.append(make("span", "name", name), track, make("span", "num", text));
        return item;
      }),
    );
    card.append(list);
    card.append(make("p", "quiet", `${format.short(gpu.temperature_celsius)} °C · ${format.short(gpu.power_watts)} W`));
    return card;
  });
}

let iconShown = "";
function showIcon(state, worst) {
  const paint = worst === "critical" ? STATE_COLORS.failed : STATE_COLORS[state] ?? "#7a828c";
  if (paint === iconShown) return;
  iconShown = paint;
  const drawing = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><circle cx="8" cy="8" r="6" fill="${paint}"/></svg>`;
  byId("icon").href = `data:image/svg+xml,${encodeURIComponent(drawing)}`;
}

function learnThresholds({ thresholds, alerts }) {
  for (const [key, value] of Object.entries(thresholds ?? {})) if (known(value)) board.thresholds.set(key, value);
  const keys = { GradientExplosion: "gradient_norm", SlowStep: "step_time", HighCPU: "cpu", HighMemory: "memory" };
  for (const { name, threshold } of alerts) if (keys[name] && known(threshold)) board.thresholds.set(keys[name], threshold);
}

function show(answer) {
  learnThresholds(answer);
  board.alertTimes = answer.alerts.filter((alert) => alert.state === "firing").map((alert) => alert.since);
  board.checkpointTimes = answer.checkpoints.map((one) => one.at);
  showIdentity(answer);
  showAllRuns(answer);
  showProgress(answer);
  showNumbers(answer);
  showAlerts(answer);
  showPhases(answer);
  showMachine(answer);
  showTables(answer);
  showIcon(answer.run.state, byId("alerts-section").dataset.worst);
  board.update();
  write("updated", `as of ${format.clock(answer.now)}`);
}

// ---- asking ------------------------------------------------------------------------------------

let last = null;
let lastHeard = null;
let timer = null;
let asking = false;

function connection(text, kind) {
  write("connection", text);
  byId("connection").dataset.kind = kind;
  document.documentElement.classList.toggle("stale", kind !== "");
}

function lost(error) {
  // Browsers word a refused connection each in their own way, always as a TypeError.
  const reasons = { TimeoutError: `no answer within ${ANSWER_MS / 1000} s`, TypeError: "no connection" };
  const reason = reasons[error.name] ?? error.message;
  if (last && ENDED.has(last.run.state)) {
    connection(`The run has ended (${last.run.state}) and its trainer is gone. This is the last it said, at ${format.clock(lastHeard)}.`, "ended");
  } else if (lastHeard !== null) {
    const since = format.clock(lastHeard);
    connection(`Trainer not answering since ${since} (${reason}). Last known state: ${last.run.state}. Trying again; \`obsinfra status\` tells what became of it.`, "lost");
    document.title = `not answering · ${last.run.model}`;
  } else {
    connection(`The trainer does not answer (${reason}). Trying again.`, "lost");
  }
}

async function ask() {
  const response = await fetch(`api/live?since=${history.next}`, { signal: AbortSignal.timeout(ANSWER_MS), cache: "no-store" });
  if (!response.ok) throw new Error(`it answered ${response.status}`);
  const answer = await response.json();
  if (answer.version !== VERSION) throw new Error(`it speaks version ${answer.version} of this page's language: reload the page`);
  return answer;
}

async function poll() {
  if (asking) return;
  asking = true;
  clearTimeout(timer);
  let answer = null;
  try {
    answer = await ask();
  } catch (error) {
    lost(error);
  }
  asking = false;
  timer = setTimeout(poll, document.hidden ? POLL_HIDDEN_MS : POLL_MS);
  if (answer) take(answer);
}

function take(answer) {
  // Another process answers at this address: what was drawn so far is not its history, ask for all of it.
  if (last && !answer.reset && (last.run.id !== answer.run.id || last.run.pid !== answer.run.pid)) {
    history.clear();
    last = null;
    poll();
    return;
  }
  const start = performance.now();
  try {
    history.apply(answer);
    last = answer;
    lastHeard = Date.now() / 1000;
    show(answer);
    connection("", "");
  } catch (error) {
    connection(`The trainer answers, but this page cannot show it: ${error.message}.`, "lost");
    console.error(error);
  }
  // After the charts, which draw in microtasks of their own. For developer tools and benchmarks/bench_page.py.
  queueMicrotask(() => {
    performance.clearMeasures("update");
    performance.measure("update", { start, end: performance.now() });
  });
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll();
});
poll();
