// The page of all runs: asks the sidecar's /v1 with the token, and writes what it says as text, never as markup.

const REFRESH_MS = 2000;
const SLOW_EVERY_MS = 15000;
const MAX_RUNS = 200;
const MAX_DETAILS = 24; // of live runs, whose step is asked for
const MAX_SLOW_RUNS = 5;
const ACTIONS = [
  ["checkpoint", "Checkpoint"],
  ["profile", "Profile"],
  ["dump_stacks", "Dump stacks"],
  ["pause", "Pause"],
  ["resume", "Resume"],
];
const GOOD = new Set(["done", "running", "finished", "committed"]);
const BAD = new Set(["failed", "rejected", "expired", "undelivered", "unacknowledged"]);

const $ = (id) => document.getElementById(id);
const NONE = "–";
let token = sessionStorage.getItem("obsinfra-token") ?? "";
let timer = 0;
let slowAt = -Infinity;
let slow = [];
// A message about an alert leads to `?run=RUN#slow-steps`.
const runOfSlow = new URLSearchParams(location.search).get("run");
let asked = location.hash.slice(1);
const awaited = new Map(); // id of a command given here → its name for the reader

class Refused extends Error {}

async function ask(path, body) {
  const request = { headers: { Authorization: `Bearer ${token}` }, cache: "no-store", credentials: "omit" };
  if (body !== undefined) {
    request.method = "POST";
    request.headers["Content-Type"] = "application/json";
    request.body = JSON.stringify(body);
  }
  const answer = await fetch(`v1/${path}`, request);
  if (answer.status === 401) throw new Refused("The sidecar does not know this token.");
  const document = await answer.json().catch(() => null);
  if (!answer.ok) throw new Error(document?.detail ?? `the sidecar answers ${answer.status}`);
  return document;
}

// ---- writing ----------------------------------------------------------------------------------------

const moment = (seconds) =>
  Number.isFinite(seconds) ? new Date(seconds * 1000).toISOString().slice(0, 19).replace("T", " ") : NONE;
const number = (value) => (value === null || value === undefined ? NONE : String(value));
const took = (seconds) =>
  seconds >= 60 ? `${(seconds / 60).toFixed(1)} m` : seconds >= 1 ? `${seconds.toFixed(2)} s` : `${(seconds * 1e3).toFixed(1)} ms`;
const toneOf = (outcome) => (GOOD.has(outcome) ? "good" : BAD.has(outcome) ? "bad" : "");

// Rows are kept by their key and only changed where they differ, so that focus and selection stay.
function fill(table, entries) {
  const body = table.tBodies[0];
  const old = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  entries.forEach(({ key, cells }, index) => {
    let row = old.get(key);
    old.delete(key);
    if (!row) {
      row = document.createElement("tr");
      row.dataset.key = key;
      for (const cell of cells) {
        const place = document.createElement(cell.head ? "th" : "td");
        if (cell.head) place.scope = "row";
        place.className = cell.class ?? "";
        // On a phone a row is a card: each cell says by itself what it is.
        place.dataset.label = table.tHead.rows[0].cells[row.cells.length].textContent;
        row.append(place);
        if (cell.make) place.append(cell.make());
      }
    }
    cells.forEach((cell, at) => write(row.cells[at], cell));
    if (body.rows[index] !== row) body.insertBefore(row, body.rows[index] ?? null);
  });
  for (const row of old.values()) row.remove();
}

// Setting what is there already would still be work for the browser.
function put(target, name, value) {
  if (target[name] !== value) target[name] = value;
}

function write(place, cell) {
  if (cell.change) {
    cell.change(place);
    return;
  }
  put(place, "textContent", cell.text);
  if (place.classList.contains("none") !== (cell.text === NONE)) place.classList.toggle("none");
  if (cell.tone !== undefined) put(place.dataset, "tone", cell.tone);
}

const text = (value, more = {}) => ({ text: value === "" ? NONE : String(value), ...more });
const num = (value) => text(number(value), { class: "num" });

function badge(run) {
  return {
    make: () => {
      const mark = document.createElement("span");
      mark.className = "badge";
      return mark;
    },
    change: (place) => {
      put(place.firstChild.dataset, "state", run.state);
      put(place.firstChild, "textContent", run.state);
    },
  };
}

const LOOPBACK = /^(localhost|127(\.\d+){3}|\[::1\])$/;

// A run's own page is beside its /metrics; only http addresses are followed. Without one: why not.
function pageOf(run) {
  if (!run.live) return { note: "its page ended with it" };
  try {
    const url = new URL("./", run.metrics_urls["0"]);
    if (!["http:", "https:"].includes(url.protocol)) return { note: "no page" };
    // A loopback address means the reader's own machine, and there is no such page there.
    const elsewhere = LOOPBACK.test(url.hostname) && !LOOPBACK.test(location.hostname);
    return elsewhere ? { note: `its page opens on ${run.host} alone, at ${url.host}` } : { href: url.href, note: "" };
  } catch {
    return { note: "no page" };
  }
}

function link(run) {
  return {
    class: "name",
    make: () => {
      const both = document.createElement("div");
      both.append(document.createElement("a"), document.createElement("span"));
      both.firstChild.className = "strong";
      both.firstChild.rel = "noreferrer";
      both.lastChild.className = "under quiet";
      return both;
    },
    change: (place) => {
      const [anchor, under] = place.firstChild.children;
      const { href, note } = pageOf(run);
      put(anchor, "textContent", run.id);
      if (href !== undefined) put(anchor, "href", href);
      else if (anchor.hasAttribute("href")) anchor.removeAttribute("href");
      put(under, "textContent", note);
    },
  };
}

// One column for both: what has ended takes no commands, what runs has no end.
function buttonsOrEnd(run) {
  return {
    class: "tell",
    make: () => {
      const both = document.createElement("div");
      const group = document.createElement("div");
      group.className = "buttons";
      group.setAttribute("role", "group");
      group.setAttribute("aria-label", `Tell ${run.id}`);
      for (const [action, name] of ACTIONS) {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = name;
        button.dataset.action = action;
        button.setAttribute("aria-label", `${name}: ${run.id}`);
        button.addEventListener("click", () => give(run.id, action, name, button));
        group.append(button);
      }
      both.append(group, document.createElement("span"));
      return both;
    },
    change: (place) => {
      const [group, end] = place.firstChild.children;
      put(group, "hidden", !run.live);
      put(end, "textContent", run.reason || (run.live ? "" : NONE));
    },
  };
}

function tell(words, bad = false) {
  $("told").textContent = words;
  $("told").classList.toggle("bad", bad);
}

// ---- doing ------------------------------------------------------------------------------------------

async function give(run, action, name, button) {
  // Not `disabled`: that would take the focus from whoever pressed it by keyboard.
  if (button.getAttribute("aria-disabled") === "true") return;
  button.setAttribute("aria-disabled", "true");
  tell(`${name}: ${run} is being told …`);
  try {
    const made = await ask(`runs/${encodeURIComponent(run)}/commands`, { action, reason: "asked on the page", who: "page" });
    awaited.set(made.id, `${name}: ${run}`);
    await refresh();
  } catch (error) {
    if (error instanceof Refused) close(error.message);
    else tell(`${name}: ${run}: ${error.message}`, true);
  } finally {
    button.removeAttribute("aria-disabled");
  }
}

function settle(commands) {
  for (const command of commands) {
    const name = awaited.get(command.id);
    if (name === undefined) continue;
    const step = command.step === null ? "" : ` at step ${command.step}`;
    tell(`${name} – ${command.outcome}${step}${command.error ? `: ${command.error}` : ""}`, BAD.has(command.outcome));
    if (command.outcome !== "waiting") awaited.delete(command.id);
  }
}

async function slowOf(runs) {
  if (performance.now() - slowAt < SLOW_EVERY_MS) return slow;
  slowAt = performance.now();
  const found = await Promise.all(
    runs.filter((run) => runOfSlow === null || run.id === runOfSlow).slice(0, MAX_SLOW_RUNS).map(async (run) =>
      (await ask(`runs/${encodeURIComponent(run.id)}/slow_steps`)).map((step) => ({ run: run.id, ...step })),
    ),
  );
  slow = found.flat().sort((a, b) => b.at - a.at).slice(0, 20);
  return slow;
}

async function draw() {
  const [all, alerts, commands] = await Promise.all([ask("runs"), ask("alerts"), ask("journal")]);
  const runs = all.sort((a, b) => b.live - a.live || (a.started < b.started ? 1 : a.started > b.started ? -1 : 0));
  const live = runs.filter((run) => run.live);
  const details = await Promise.all(live.slice(0, MAX_DETAILS).map((run) => ask(`runs/${encodeURIComponent(run.id)}`)));
  const steps = new Map(details.map((run) => [run.id, run.step]));
  const slowSteps = await slowOf(runs);
  const shown = runs.slice(0, MAX_RUNS);

  fill($("runs"), shown.map((run) => ({
    key: run.id,
    cells: [
      badge(run), link(run), text(run.model, { class: "name" }), num(steps.get(run.id)), buttonsOrEnd(run),
      text(run.started.slice(0, 19).replace("T", " "), { class: "when" }), text(run.host, { class: "name" }),
      num(run.world_size), num(run.restarts),
    ],
  })));
  put($("runs-note"), "textContent", runs.length > shown.length ? `the newest ${shown.length} of ${runs.length}` : "");
  put($("runs-ended"), "hidden", live.length === runs.length);
  fill($("firing"), alerts.firing.map((one) => ({
    key: JSON.stringify([one.run, one.alert, one.starts_at, one.summary]),
    cells: [
      text(one.severity, { class: `severity ${["critical", "warning", "info"].includes(one.severity) ? one.severity : ""}` }),
      text(one.alert, { class: "strong" }), text(one.run, { class: "name" }), text(moment(one.starts_at), { class: "when" }),
      text(one.next_step ? `${one.next_step} at ${moment(one.next_at)}` : "", { class: "when" }), text(one.summary, { class: "wide" }),
    ],
  })));
  const worst = ["critical", "warning", "info"].find((name) => alerts.firing.some((one) => one.severity === name));
  put($("alerts-section").dataset, "worst", worst ?? "");
  fill($("commands"), commands.map((one) => ({
    key: one.id,
    cells: [
      text(moment(one.received_at), { class: "when" }), text(one.run, { class: "name" }), text(one.action, { class: "strong" }),
      text(one.outcome, { tone: toneOf(one.outcome) }), num(one.step), text(one.source, { class: "name" }),
      text([one.reason, one.error].filter(Boolean).join("; "), { class: "wide" }),
    ],
  })));
  fill($("heard"), alerts.heard.map((one, index) => ({
    key: JSON.stringify([one.received_at, one.alert, one.run, one.decision, one.action, alerts.heard.length - index]),
    cells: [
      text(moment(one.received_at), { class: "when" }), text(one.alert, { class: "strong" }), text(one.run, { class: "name" }),
      text(one.status), text(one.decision), text(one.action),
    ],
  })));
  if (runOfSlow !== null) put($("slow-note"), "textContent", `of ${runOfSlow}, from their traces`);
  fill($("slow"), slowSteps.map((one) => ({
    key: `${one.run}/${one.rank}/${one.step}/${one.at}`,
    cells: [
      text(one.run, { class: "name" }), num(one.step), num(one.rank), text(moment(one.at), { class: "when" }),
      text(took(one.seconds), { class: "num" }),
      text(Object.entries(one.phases).slice(0, 3).map(([name, seconds]) => `${name} ${took(seconds)}`).join(", "), { class: "phases" }),
      text(one.trace_id, { class: "quiet trace" }),
    ],
  })));
  $("facts").replaceChildren(...[`${live.length} live`, `${runs.length} in all`, `alerts acted on: ${alerts.firing.length}`].map((fact) => {
    const item = document.createElement("li");
    item.textContent = fact;
    return item;
  }));
  settle(commands);
}

let under_way = null;

function refresh() {
  under_way ??= turn().finally(() => {
    under_way = null;
  });
  return under_way;
}

async function turn() {
  clearTimeout(timer);
  try {
    await draw();
    open();
  } catch (error) {
    if (error instanceof Refused) {
      close(error.message);
      return;
    }
    show("lost", "failed");
    $("connection").textContent = `The sidecar cannot be asked (${error.message}); what is shown is from before. Trying again.`;
  }
  timer = setTimeout(() => document.hidden || refresh(), REFRESH_MS);
}

function show(words, state) {
  if ($("state").textContent !== words) $("state").textContent = words;
  $("state").dataset.state = state;
}

function open() {
  show("watching", "running");
  $("connection").textContent = "";
  $("door").hidden = true;
  put($("main"), "hidden", false);
  $(asked)?.scrollIntoView(); // once: only now is it there
  asked = "";
  $("forget").hidden = false;
}

function close(words) {
  clearTimeout(timer);
  token = "";
  sessionStorage.removeItem("obsinfra-token");
  show("closed", "paused");
  $("connection").textContent = words;
  $("main").hidden = true;
  $("forget").hidden = true;
  $("door").hidden = false;
  for (const table of document.querySelectorAll("main table")) table.tBodies[0].replaceChildren();
  $("facts").replaceChildren();
  awaited.clear();
  slowAt = -Infinity;
  slow = [];
  tell("");
  $("token").focus();
}

$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = $("token").value.trim();
  $("token").value = "";
  if (!/^[!-~]+$/.test(given)) {
    close("A token is of visible ASCII letters, without spaces.");
    return;
  }
  token = given;
  sessionStorage.setItem("obsinfra-token", token);
  refresh();
});
$("forget").addEventListener("click", () => close(""));
document.addEventListener("visibilitychange", () => document.hidden || !token || refresh());

if (token) refresh();
else close("");
