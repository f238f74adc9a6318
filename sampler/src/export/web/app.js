// The live page. It sends requests only to this agent. Values that tenants choose (names, images, ids) become text, never markup.
"use strict";

const POLL_MS = 1000;
const HISTORY_MS = 60000;
// A longer time without data is a gap in a chart, not a slope.
const GAP_MS = 5000;
const TOKEN = "gpu-sampler-token";

const $ = (id) => document.getElementById(id);
const ui = { live: null, paused: false, sort: "share", down: true, filter: "", shown: false, waits: false };

// ---- helpers ----

function el(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const DASH = "–";
const known = (value) => value !== null && value !== undefined;
const percent = (ratio) => (known(ratio) ? `${(ratio * 100).toFixed(0)}\u00a0%` : DASH);

function bytes(value) {
  if (!known(value)) return DASH;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let n = 0;
  while (value >= 1024 && n < units.length - 1) [value, n] = [value / 1024, n + 1];
  return `${value.toFixed(n === 0 || value >= 100 ? 0 : 1)}\u00a0${units[n]}`;
}

function seconds(value) {
  if (!known(value)) return DASH;
  if (value < 100) return `${value.toFixed(1)}\u00a0s`;
  if (value < 6000) return `${Math.round(value)}\u00a0s`;
  return value < 360000 ? `${(value / 3600).toFixed(1)}\u00a0h` : `${Math.round(value / 3600)}\u00a0h`;
}

// The display name of a container or another user.
function nameOf(user) {
  if (user.pod || user.namespace) return [user.namespace, user.pod, user.container].filter(Boolean).join("/");
  if (user.kind === "host") return "host processes";
  if (user.kind === "unknown") return "unknown processes";
  if (user.kind === "_other") return "others";
  return user.name || user.container || (user.container_id || user.id || "?").slice(0, 12);
}

// ---- requests ----

const token = () => sessionStorage.getItem(TOKEN);

class RequestError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (token()) headers.Authorization = `Bearer ${token()}`;
  const response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(10000), ...options, headers });
  if (response.ok) return response;
  const text = (await response.text()).trim();
  let message = text.slice(0, 300);
  try {
    message = JSON.parse(text).error || message;
  } catch {
    // The error is plain text.
  }
  throw new RequestError(response.status, message || `HTTP ${response.status}`);
}

const post = (path, body) =>
  request(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body || {}) });

// A link cannot send the token, so the file is fetched and then saved. This includes reports: displayed from here, a report would be
// subject to the policy of this page, and blank.
async function save(path, name) {
  const response = await request(path, { signal: AbortSignal.timeout(600000) });
  const url = URL.createObjectURL(await response.blob());
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

// ---- history of the past minute ----

const histories = new Map();

function remember(key, time, value) {
  let history = histories.get(key);
  // A counter that decreased belongs to a restarted container. After that, and after a clock was set back, the chart starts again.
  const last = history && history[history.length - 1];
  if (!history || last.time > time || (value.total !== undefined && value.total < last.total)) {
    history = [];
    histories.set(key, history);
  }
  if (!history.length || history[history.length - 1].time < time) history.push({ time, ...value });
  while (history[0].time < time - HISTORY_MS) history.shift();
  return history;
}

function forget(time) {
  for (const [key, history] of histories) {
    if (history[history.length - 1].time < time - HISTORY_MS) histories.delete(key);
  }
}

const SVG = "http://www.w3.org/2000/svg";

function spark(label) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "spark");
  svg.setAttribute("viewBox", "0 0 100 24");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  for (const kind of ["area", "line"]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", kind);
    svg.append(path);
  }
  return svg;
}

// The right edge is now; the height is 0 to 1.
function draw(svg, history, now) {
  let [line, area, run] = ["", "", []];
  const flush = () => {
    if (run.length === 1) run.push([Math.min(100, run[0][0] + 0.8), run[0][1]]);
    if (run.length) {
      const points = run.map(([x, y]) => `${x.toFixed(2)} ${y.toFixed(2)}`).join("L");
      line += `M${points}`;
      area += `M${run[0][0].toFixed(2)} 23.5L${points}L${run[run.length - 1][0].toFixed(2)} 23.5Z`;
    }
    run = [];
  };
  let last = null;
  for (const { time, value } of history) {
    if (!known(value) || (last !== null && time - last > GAP_MS)) flush();
    if (known(value)) run.push([100 - ((now - time) / HISTORY_MS) * 100, 23 - Math.min(1, Math.max(0, value)) * 22]);
    last = time;
  }
  flush();
  svg.children[0].setAttribute("d", area);
  svg.children[1].setAttribute("d", line);
}

// Increase of a counter per second over the past minute; null until it was observed for two seconds.
function rate(history, value = (point) => point.total) {
  const [first, last] = [history[0], history[history.length - 1]];
  const span = (last.time - first.time) / 1000;
  return span >= 2 ? Math.max(0, value(last) - value(first)) / span : null;
}

// ---- GPUs ----

const cards = new Map();

function card() {
  const part = { busy: el("b"), spark: spark("utilization, past minute"), model: el("span"), title: document.createTextNode("") };
  const fields = {};
  const list = el("dl");
  for (const [key, name] of [
    ["memory", "memory"], ["power", "power"], ["coactive", "shared"], ["unattributed", "unattributed"],
  ]) {
    fields[key] = el("dd");
    list.append(el("dt", { textContent: name }), fields[key]);
  }
  part.fill = el("span");
  part.uuid = el("p", { className: "uuid" });
  part.fields = fields;
  part.node = el("article", { className: "card gpu" },
    el("h3", {}, part.title, part.model),
    el("div", { className: "busy" }, part.busy, part.spark),
    el("div", { className: "meter" }, part.fill), list, part.uuid);
  return part;
}

function unattributedReasons(gpu) {
  if (!gpu.unattributed_seconds) return DASH;
  const all = Object.entries(gpu.unattributed_seconds).filter(([, s]) => s >= 0.05).sort((a, b) => b[1] - a[1]);
  return all.length ? all.map(([reason, s]) => `${reason.replaceAll("_", " ")} ${seconds(s)}`).join(", ") : "0 s";
}

function showGpus(live, now) {
  const seen = new Set();
  for (const gpu of live.gpus) {
    seen.add(gpu.uuid);
    let part = cards.get(gpu.uuid);
    if (!part) {
      part = card();
      cards.set(gpu.uuid, part);
      $("gpus").append(part.node);
    }
    const history = remember(`gpu ${gpu.uuid}`, now, { value: gpu.utilization_ratio });
    setText(part.title, gpu.gpu_uuid ? `GPU ${gpu.index} · MIG` : `GPU ${gpu.index}`);
    setText(part.model, gpu.gone ? `${gpu.model} · gone` : gpu.model);
    part.node.classList.toggle("gone", gpu.gone);
    setText(part.busy, gpu.is_leaf ? percent(gpu.utilization_ratio) : "MIG");
    part.busy.title = known(gpu.share_stderr_ratio)
      ? `standard error of a share of one half over 10 s: ${(gpu.share_stderr_ratio * 100).toFixed(1)} points` : "";
    part.fill.style.width = `${(gpu.utilization_ratio || 0) * 100}%`;
    draw(part.spark, history, now);
    const memory = gpu.is_leaf ? `${bytes(gpu.memory_used_bytes)} of ${bytes(gpu.memory_total_bytes)}` : "see its MIG devices";
    setText(part.fields.memory, memory);
    const watts = known(gpu.power_watts) ? `${gpu.power_watts.toFixed(0)} W` : DASH;
    const celsius = known(gpu.temperature_celsius) ? `${gpu.temperature_celsius.toFixed(0)} °C` : DASH;
    setText(part.fields.power, `${watts}, ${celsius}`);
    setText(part.fields.coactive, percent(gpu.coactive_ratio));
    setText(part.fields.unattributed, unattributedReasons(gpu));
    setText(part.uuid, gpu.uuid);
    part.uuid.title = gpu.uuid;
  }
  for (const [uuid, part] of cards) {
    if (seen.has(uuid)) continue;
    part.node.remove();
    cards.delete(uuid);
  }
  const empty = $("gpus-empty");
  empty.hidden = live.gpus.length > 0;
  setText(empty, live.degraded.length
    ? "No GPU is detected; see the problems above."
    : "No GPU is detected yet. gpu-sampler doctor reports the state of the driver.");
}

// ---- containers ----

const lines = new Map();

function line() {
  const part = { name: el("b"), more: el("small"), gpu: el("td", { "data-label": "GPU" }), fill: el("span") };
  part.share = document.createTextNode("");
  part.error = el("small");
  part.spark = spark("share, past minute");
  part.seconds = el("td", { className: "number", "data-label": "GPU-seconds" });
  part.memory = el("td", { className: "number", "data-label": "Memory" });
  part.pressure = el("td", { className: "number", "data-label": "Pressure" });
  part.rate = el("b");
  part.by = el("small");
  part.node = el("tr", {},
    el("td", { className: "name" }, part.name, part.more),
    part.gpu,
    el("td", { className: "number share", "data-label": "Share of the past 10 s" }, part.share, part.error,
      el("div", { className: "meter" }, part.fill)),
    el("td", { className: "spark", "data-label": "Past minute" }, part.spark),
    part.seconds, part.memory, part.pressure,
    el("td", { className: "by", "data-label": "Contention with" }, part.rate, part.by));
  return part;
}

function contention(user, history) {
  const all = rate(history);
  if (all === null || all < 0.005) return { all, by: [] };
  const by = user.contended_by.map((other, n) => ({
    name: nameOf(other),
    rate: rate(history, (point) => point.by.get(other.container_id || other.kind) || 0) || 0,
    n,
  }));
  by.sort((a, b) => b.rate - a.rate || a.n - b.n);
  return { all, by: by.filter((other) => other.rate >= 0.005) };
}

const ORDER = {
  name: (row) => row.name,
  gpu: (row) => `${String(row.user.index).padStart(4, "0")} ${row.user.uuid}`,
  // At the displayed precision.
  share: (row) => Math.round((known(row.user.duty_cycle_percent) ? row.user.duty_cycle_percent : -1) * 10),
  seconds: (row) => row.user.gpu_seconds,
  memory: (row) => (known(row.user.memory_used_bytes) ? row.user.memory_used_bytes : -1),
  pressure: (row) => (row.user.waits && known(row.user.waits.pressure_ratio) ? Math.round(row.user.waits.pressure_ratio * 100) : -1),
  waiting: (row) => Math.round((row.contention.all || 0) * 100),
};

function sorted(rows) {
  const key = ORDER[ui.sort];
  const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  const sign = ui.down ? -1 : 1;
  return rows.sort((a, b) => sign * compare(key(a), key(b)) || compare(a.name, b.name) || compare(a.key, b.key));
}

function matches(row) {
  const { user } = row;
  const text = [row.name, user.name, user.image, user.container_id, user.id, user.uuid, `gpu ${user.index}`, user.runtime,
    user.kind, user.owner, user.job_name, user.partition];
  const all = text.filter(Boolean).join(" ").toLowerCase();
  return ui.filter.toLowerCase().split(/\s+/).every((word) => all.includes(word));
}

function showLine(part, row, now) {
  const { user } = row;
  setText(part.name, row.name);
  part.name.title = `cgroup ${user.id}`;
  const isContainer = user.kind === "container";
  const more = [!isContainer && user.kind, user.image, isContainer && user.container_id && user.container_id.slice(0, 12),
    user.job_name, user.owner, user.partition && `partition ${user.partition}`, user.assigned && "assigned", user.gone && "ended"];
  setText(part.more, more.filter(Boolean).join(" · "));
  part.more.title = user.container_id;
  part.node.classList.toggle("gone", user.gone);
  setText(part.gpu, user.uuid.startsWith("MIG") ? `${user.index} MIG` : known(user.index) ? String(user.index) : DASH);
  part.gpu.title = user.uuid;
  const share = user.duty_cycle_percent;
  setText(part.share, known(share) ? `${share.toFixed(1)} %` : DASH);
  setText(part.error, known(user.duty_cycle_stderr) ? ` ± ${user.duty_cycle_stderr.toFixed(1)}` : "");
  part.fill.style.width = `${known(share) ? Math.min(100, share) : 0}%`;
  draw(part.spark, row.history, now);
  setText(part.seconds, seconds(user.gpu_seconds));
  part.seconds.title = `± ${user.gpu_seconds_stderr.toFixed(2)} s, from ${user.samples} samples`;
  setText(part.memory, bytes(user.memory_used_bytes));
  const { waits } = user;
  part.pressure.hidden = !ui.waits;
  setText(part.pressure, percent(waits && waits.pressure_ratio));
  part.pressure.title = waits ? `waited ${seconds(waits.wait_seconds)} of ${seconds(waits.probed_seconds)} with wait probes` : "";
  const pressure = user.contended_by.filter((other) => other.pressure_ratio > 0)
    .map((other) => `${nameOf(other)} ${percent(other.pressure_ratio)}`);
  if (waits && known(waits.pressure_stderr_ratio)) part.pressure.title += `; ± ${percent(waits.pressure_stderr_ratio)} (standard error)`;
  if (waits && pressure.length) part.pressure.title += `; pressure by ${pressure.join(", ")}`;
  const { all, by } = row.contention;
  const isContended = known(all) && all >= 0.005;
  setText(part.rate, isContended ? `${all.toFixed(2)} s/s` : "");
  const names = by.slice(0, 3).map((other) => (by.length > 1 ? `${other.name} ${other.rate.toFixed(2)}` : other.name));
  if (by.length > 3) names.push(`${by.length - 3} more`);
  setText(part.by, isContended ? names.join(", ") : known(all) ? "none" : DASH);
  const sum = user.contended_by.map((other) => `${nameOf(other)} ${seconds(other.seconds)}`);
  part.by.title = sum.length ? `since the agent started: ${sum.join(", ")}` : "";
}

function showUsers(live, now) {
  const all = live.users.map((user) => {
    const key = `${user.container_id} ${user.id} ${user.uuid}`;
    const by = new Map(user.contended_by.map((other) => [other.container_id || other.kind, other.seconds]));
    const value = known(user.duty_cycle_percent) ? user.duty_cycle_percent / 100 : null;
    const history = remember(`user ${key}`, now, { value, total: user.contention_seconds, by });
    return { key, user, history, name: nameOf(user), contention: contention(user, history) };
  });
  // The column exists only where wait probes are on.
  ui.waits = live.users.some((user) => user.waits);
  $("users").querySelector("th[data-sort=pressure]").hidden = !ui.waits;
  const rows = sorted(all.filter(matches));
  const body = $("users").tBodies[0];
  const kept = new Set(rows.map((row) => row.key));
  for (const [key, part] of lines) {
    if (kept.has(key)) continue;
    part.node.remove();
    lines.delete(key);
  }
  rows.forEach((row, n) => {
    let part = lines.get(row.key);
    if (!part) {
      part = line();
      lines.set(row.key, part);
    }
    showLine(part, row, now);
    if (body.rows[n] !== part.node) body.insertBefore(part.node, body.rows[n] || null);
  });
  $("users").classList.toggle("bare", rows.length === 0);
  const count = new Set(live.users.map((user) => user.container_id)).size;
  setText($("users-count"), rows.length < all.length ? `${rows.length} of ${all.length} rows` : count ? String(count) : "");
  const empty = $("users-empty");
  empty.hidden = rows.length > 0;
  setText(empty, all.length
    ? "No user matches the filter; clear the filter to see all."
    : "No container, job or unit has used a GPU since the agent started. One appears here when the driver first reports " +
      "one of its processes, or when the kubelet assigns a GPU to it.");
}

function showSort() {
  for (const head of document.querySelectorAll("th[data-sort]")) {
    if (head.dataset.sort === ui.sort) head.setAttribute("aria-sort", ui.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
}

// ---- problems and connection state ----

function banners(list) {
  const box = $("banners");
  const text = JSON.stringify(list);
  // Updated only on changes: otherwise a screen reader would be interrupted each second.
  if (box.dataset.shown === text) return;
  box.dataset.shown = text;
  box.replaceChildren(...list.map(({ what, message, bad }) =>
    el("p", { className: bad ? "banner bad" : "banner" }, el("b", { textContent: what }), message)));
}

function pill(text, kind) {
  const node = $("state");
  node.hidden = false;
  node.className = `pill ${kind}`;
  setText(node, text);
}

const announce = (text) => setText($("announcement"), text);

function show(live) {
  const now = Date.parse(live.time);
  forget(now);
  setText($("node"), live.node || location.host);
  document.title = `${live.node || location.host} · gpu-sampler`;
  setText($("version"), `· agent ${live.version}`);
  banners(live.degraded);
  showGpus(live, now);
  showUsers(live, now);
}

let isUnreachable = false;

function failed(error) {
  if (error.status === 401) return login(token() ? "The agent rejected this token." : "");
  const reason = error.status ? `${error.message}` : "it is not running, or the network is down";
  const what = `The agent at ${location.host} does not respond`;
  banners([{ what, message: `${reason}. This page retries; run gpu-sampler doctor on that machine for the cause.`, bad: true }]);
  pill("unreachable", "unreachable");
  if (!isUnreachable) announce(what);
  isUnreachable = true;
}

function login(problem) {
  sessionStorage.removeItem(TOKEN);
  for (const id of ["app", "state", "links"]) $(id).hidden = true;
  const form = $("login");
  const first = form.hidden;
  form.hidden = false;
  $("login-problem").hidden = !problem;
  setText($("login-problem"), problem);
  if (first) $("token").focus();
}

async function poll() {
  if (ui.paused || document.hidden || !$("login").hidden) return;
  try {
    const live = await (await request("/api/v1/live")).json();
    if (isUnreachable) announce("The agent responds again");
    isUnreachable = false;
    $("app").hidden = false;
    // A link cannot carry the token.
    $("links").hidden = Boolean(token());
    if (ui.paused) return;
    pill("live", "");
    ui.live = live;
    show(live);
  } catch (error) {
    $("app").hidden = false;
    failed(error);
  }
}

async function every(pause, work) {
  for (;;) {
    await work();
    await new Promise((done) => setTimeout(done, pause()));
  }
}

// ---- sessions ----

const sessionLines = new Map();
const isRunning = (session) => session.state === "armed" || session.state === "recording";

function sessionLine(id) {
  const path = `/api/v1/sessions/${encodeURIComponent(id)}`;
  const part = { id, title: el("b"), more: el("small"), state: el("span"), fill: el("span"), progress: el("small"), size: el("td", { className: "number", "data-label": "Size" }) };
  const link = (text, href, name, newTab) => {
    const node = el("a", { href, textContent: text });
    if (newTab) [node.target, node.rel] = ["_blank", "noopener"];
    else node.download = name;
    node.addEventListener("click", (event) => {
      if (!token()) return;
      event.preventDefault();
      problem(null);
      save(href, name).catch(problem);
    });
    return node;
  };
  part.stop = el("button", { type: "button", textContent: "Stop" });
  part.stop.addEventListener("click", async () => {
    part.stop.disabled = true;
    try {
      await post(`${path}/stop`);
      problem(null);
      announce("The session was stopped");
    } catch (error) {
      problem(error);
    }
    part.stop.disabled = false;
    await sessions();
  });
  // Deleting takes two clicks, so that a misplaced click does no harm.
  part.remove = el("button", { type: "button", textContent: "Delete" });
  part.remove.addEventListener("click", async () => {
    if (!part.confirmation) {
      part.confirmation = setTimeout(() => setConfirming(part, false), 4000);
      setConfirming(part, true);
      return;
    }
    setConfirming(part, false);
    try {
      await request(path, { method: "DELETE" });
      problem(null);
      announce("The session was deleted");
    } catch (error) {
      problem(error);
    }
    await sessions();
  });
  part.report = link("Report", `${path}/report?format=html`, `gpu-session-${id}.html`, true);
  part.file = link("Download", `${path}/file`, `gpu-session-${id}.gpus`, false);
  for (const node of [part.stop, part.report, part.file, part.remove]) node.setAttribute("aria-label", `${node.textContent}: session ${id}`);
  part.node = el("tr", {},
    el("td", { className: "name" }, part.title, part.more),
    el("td", { "data-label": "State" }, part.state),
    el("td", { className: "progress", "data-label": "Progress" }, part.progress, el("div", { className: "meter" }, part.fill)),
    part.size,
    el("td", { className: "actions" }, el("div", {}, part.stop, part.report, part.file, part.remove)));
  return part;
}

function showSession(part, session) {
  const { state, duration_seconds: lasts, elapsed_seconds: elapsed } = session;
  setText(part.title, session.started ? new Date(session.started).toLocaleString() : "Not started");
  const more = [session.id, session.trigger && `condition ${session.trigger}`, session.error];
  setText(part.more, more.filter(Boolean).join(" · "));
  part.state.className = `state ${state}`;
  part.node.classList.toggle("failed", state === "failed");
  setText(part.state, state);
  const ratio = state === "finished" ? 1 : known(elapsed) && lasts ? Math.min(1, elapsed / lasts) : 0;
  part.fill.style.width = `${ratio * 100}%`;
  const progress = { armed: "waiting for its condition", finished: seconds(elapsed), failed: DASH };
  setText(part.progress, progress[state] || `${seconds(elapsed)} of ${seconds(lasts)}`);
  setText(part.size, bytes(session.size_bytes));
  part.stop.hidden = !isRunning(session);
  part.report.hidden = part.file.hidden = !known(session.started);
  part.remove.hidden = isRunning(session);
}

function setConfirming(part, isConfirming) {
  if (!isConfirming) {
    clearTimeout(part.confirmation);
    part.confirmation = 0;
  }
  setText(part.remove, isConfirming ? "Confirm" : "Delete");
  part.remove.setAttribute("aria-label", `${isConfirming ? "Confirm deletion" : "Delete"}: session ${part.id}`);
  part.remove.classList.toggle("confirm", isConfirming);
}

function problem(error) {
  const node = $("record-problem");
  node.hidden = !error;
  setText(node, error ? error.message : "");
}

async function sessions() {
  if (document.hidden || $("app").hidden) return;
  const empty = $("sessions-empty");
  try {
    const all = await (await request("/api/v1/sessions")).json();
    // Newest first, after the sessions that have not started.
    all.sort((a, b) => Number(known(a.started)) - Number(known(b.started)) || String(b.started).localeCompare(String(a.started)));
    const body = $("sessions").tBodies[0];
    const kept = new Set(all.map((session) => session.id));
    for (const [id, part] of sessionLines) {
      if (kept.has(id)) continue;
      part.node.remove();
      sessionLines.delete(id);
    }
    all.forEach((session, n) => {
      const part = sessionLines.get(session.id) || sessionLine(session.id);
      sessionLines.set(session.id, part);
      if (part.lastState && part.lastState !== session.state) announce(`Session ${session.id}: ${session.state}`);
      part.lastState = session.state;
      showSession(part, session);
      if (body.rows[n] !== part.node) body.insertBefore(part.node, body.rows[n] || null);
    });
    ui.isRecording = all.some(isRunning);
    $("record").hidden = false;
    setText(empty, "No sessions yet. A session records every sample of every GPU with its users, including a lookback before the start.");
    empty.hidden = all.length > 0;
    $("sessions").classList.toggle("bare", all.length === 0);
  } catch (error) {
    ui.isRecording = false;
    if (error.status === 404) {
      ui.isSessionApiMissing = true;
      $("record").hidden = true;
      setText(empty, "This agent does not record sessions.");
      $("sessions").classList.add("bare");
      empty.hidden = false;
    }
    // Any other failure also affects the live table, which reports it.
  }
}

async function start(event) {
  event.preventDefault();
  $("start").disabled = true;
  const body = { duration_seconds: Number($("duration").value), lookback_seconds: Number($("lookback").value) };
  const trigger = $("trigger").value.trim();
  if (trigger) body.trigger = trigger;
  try {
    await post("/api/v1/sessions", body);
    problem(null);
    announce(trigger ? "The session is waiting for its condition" : "The session has started");
  } catch (error) {
    problem(error);
  }
  $("start").disabled = false;
  await sessions();
}

// ---- user input ----

document.addEventListener("DOMContentLoaded", () => {
  const redraw = () => ui.live && show(ui.live);
  $("login").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(TOKEN, $("token").value.trim());
    $("token").value = "";
    $("login").hidden = true;
    poll().then(sessions);
  });
  $("filter").addEventListener("input", () => {
    ui.filter = $("filter").value.trim();
    redraw();
  });
  $("pause").addEventListener("click", () => {
    ui.paused = !ui.paused;
    $("pause").setAttribute("aria-pressed", String(ui.paused));
    setText($("pause"), ui.paused ? "Resume" : "Pause");
    if (ui.paused) pill("paused", "paused");
    else poll();
  });
  for (const head of document.querySelectorAll("th[data-sort]")) {
    head.firstElementChild.addEventListener("click", () => {
      const sort = head.dataset.sort;
      // Names sort from A, numbers from the largest.
      ui.down = ui.sort === sort ? !ui.down : sort !== "name" && sort !== "gpu";
      ui.sort = sort;
      showSort();
      redraw();
    });
  }
  $("record").addEventListener("submit", start);
  document.addEventListener("visibilitychange", poll);
  showSort();
  every(() => POLL_MS, poll);
  every(() => (ui.isSessionApiMissing ? 60000 : ui.isRecording || $("app").hidden ? POLL_MS : 4000), sessions);
});
