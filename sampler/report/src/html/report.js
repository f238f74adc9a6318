// Draws the timelines. All text is inserted as text, never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SHOWN = 20;
  const STACKED = 9;

  // Decodes runs such as "-x3 0x12 49"; "-" is unknown.
  const series = (runs) => {
    const out = [];
    if (!runs) return out;
    for (const run of runs.split(" ")) {
      const [value, times] = run.split("x");
      const number = value === "-" ? null : Number(value);
      for (let i = Number(times || 1); i > 0; i--) out.push(number);
    }
    return out;
  };

  const make = (parent, name, className, text) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };
  const shape = (parent, name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    parent.append(element);
    return element;
  };

  const percent = (value) => (value === null || value === undefined ? "not observed" : value > 0 && value < 0.5 ? "<0.5 %" : `${value} %`);
  const memory = (mib) => (mib === null || mib === undefined ? "-" : mib >= 1024 ? `${(mib / 1024).toFixed(1)} GiB` : `${mib} MiB`);
  const clock = (seconds, parts) => new Date(data.start + seconds * 1000).toISOString().slice(11, parts);

  // The stepped area between two series; empty where the upper one is unknown.
  const area = (low, high, n) => {
    let path = "";
    for (let from = 0; from < n; from++) {
      if (high[from] === null || high[from] === undefined || high[from] <= low[from]) continue;
      let to = from;
      while (to < n && high[to] !== null && high[to] > low[to]) to++;
      path += `M${from} ${100 - low[from]}`;
      for (let i = from; i < to; i++) if (i === from || high[i] !== high[i - 1]) path += `${i > from ? `H${i}` : ""}V${100 - high[i]}`;
      path += `H${to}`;
      for (let i = to - 1; i >= from; i--) if (i === to - 1 || low[i] !== low[i + 1]) path += `${i < to - 1 ? `H${i + 1}` : ""}V${100 - low[i]}`;
      path += "Z";
      from = to;
    }
    return path;
  };

  const ticks = (timeline, most) => {
    const length = timeline.n * timeline.window;
    const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];
    const step = steps.find((seconds) => length / seconds <= most) || 86400;
    const all = [];
    const first = data.start / 1000 + timeline.first;
    for (let at = Math.ceil(first / step) * step; at <= first + length + 1e-6; at += step) {
      const seconds = at - data.start / 1000;
      all.push([((seconds - timeline.first) / length) * 100, clock(seconds, step % 60 === 0 ? 16 : 19)]);
    }
    return all;
  };

  class Chart {
    constructor(root) {
      this.root = root;
      this.timeline = data.timelines[Number(root.dataset.timeline)];
      const timeline = this.timeline;
      this.n = timeline.n;
      if (!this.n) return;
      this.busy = series(timeline.busy);
      this.memory = series(timeline.memory);
      // Collapsed lanes are decoded when they are shown.
      this.lanes = timeline.lanes.map((lane) => ({ ...lane, ...data.users[lane.user] }));
      this.rows = [];
      this.shown = 0;
      // With many users, each share is small; one scale for all lanes keeps them comparable.
      this.full = [5, 10, 25, 50, 100].find((percent) => timeline.peak <= percent) || 100;
      root.tabIndex = 0;
      root.setAttribute("role", "group");
      root.setAttribute("aria-label", `Timeline of ${timeline.name}. Arrow keys move through time and users.`);
      this.whole();
      this.body = make(root, "div");
      this.show(SHOWN);
      this.axis();
      this.overlay();
      if (this.lanes.length > SHOWN) this.button();
      this.live = make(root, "div", "live");
      this.live.setAttribute("aria-live", "polite");
      this.listen();
    }

    decode(lane) {
      lane.share = lane.share || series(lane.shares);
      lane.used = lane.used || series(lane.memory);
      if (lane.waits) lane.wait = lane.wait || series(lane.waits);
      return lane;
    }

    row(parent, className, label, total) {
      const row = make(parent, "div", `row ${className}`);
      row.append(label);
      const svg = shape(row, "svg", { viewBox: `0 0 ${this.n} 100`, preserveAspectRatio: "none", "aria-hidden": "true" });
      make(row, "span", "total", total);
      return [row, svg];
    }

    // The lane of the GPU, with the stacked shares of its first users.
    whole() {
      const label = make(null, "span", "label");
      make(label, "span", "", "GPU busy");
      const scale = make(label, "span", "scale");
      for (const text of ["100 %", "50", "0"]) make(scale, "span", "", text);
      const known = this.busy.filter((value) => value !== null);
      const mean = known.length ? known.reduce((a, b) => a + b, 0) / known.length : 0;
      const [row, svg] = this.row(this.root, "whole", label, known.length ? `${mean.toFixed(0)} % busy` : "");
      let low = new Array(this.n).fill(0);
      for (const lane of this.lanes.slice(0, STACKED)) {
        const shares = this.decode(lane).share;
        const high = low.map((value, i) => Math.min(100, value + (shares[i] || 0)));
        shape(svg, "path", { d: area(low, high, this.n), class: `c${lane.colour}` });
        low = high;
      }
      shape(svg, "path", { d: area(low, this.busy, this.n), class: "rest" });
      const limit = 100 - data.saturation;
      shape(svg, "line", { x1: 0, x2: this.n, y1: limit, y2: limit, class: "limit" });
      this.rows.push({ row, lane: null });
    }

    show(count) {
      for (const lane of this.lanes.slice(this.shown, count)) {
        const label = make(null, "span", "label");
        make(label, "i", `key c${lane.colour}`);
        make(label, "bdi", "", lane.name).title = lane.name;
        const [row, svg] = this.row(this.body, "", label, lane.total);
        const low = new Array(this.n).fill(0);
        const high = this.decode(lane).share.map((value) => (value === null ? null : (value / this.full) * 100));
        shape(svg, "path", { d: area(low, high, this.n), class: `c${lane.colour}` });
        this.rows.push({ row, lane });
        if (lane.wait) this.waiting(lane);
      }
      this.shown = Math.max(this.shown, Math.min(count, this.lanes.length));
    }

    // The lane of waiting, under that of its user; grey where the user had no probes.
    waiting(lane) {
      const label = make(null, "span", "label");
      make(label, "i", "key waited");
      make(label, "span", "", "waited");
      const [row, svg] = this.row(this.body, "waits", label, lane.waited || "");
      for (let from = 0; from < this.n; from++) {
        if (lane.wait[from] !== null) continue;
        let to = from;
        while (to < this.n && lane.wait[to] === null) to++;
        shape(svg, "rect", { x: from, width: to - from, height: 100, class: "unprobed" });
        from = to;
      }
      const high = lane.wait.map((value) => (value === null ? null : Math.min(100, value)));
      shape(svg, "path", { d: area(new Array(this.n).fill(0), high, this.n), class: "waited" });
      this.rows.push({ row, lane, isWaits: true });
    }

    axis() {
      const axis = make(this.root, "div", "axis");
      this.ticks = ticks(this.timeline, this.root.offsetWidth < 600 ? 4 : 8);
      for (const [left, text] of this.ticks) make(axis, "span", "", text).style.left = `${left}%`;
      make(axis, "span", "utc", "UTC");
      this.foot = axis;
      const waits = this.lanes.some((lane) => lane.waits) ? " A lane of waiting has the whole time at full height, and is grey without probes." : "";
      if (this.full < 100 || waits) this.hint = make(this.root, "p", "hint", `Full height of a user's lane is ${this.full} % of the GPU.${waits}`);
    }

    overlay() {
      const layer = make(this.root, "div", "layer");
      const put = (className, from, to) => {
        const element = make(layer, "div", className);
        element.style.left = `${(from / this.n) * 100}%`;
        if (to !== undefined) element.style.width = `${((to - from) / this.n) * 100}%`;
        return element;
      };
      for (const [left] of this.ticks) if (left > 0.5 && left < 99.5) put("grid", (left / 100) * this.n);
      for (let from = 0; from < this.n; from++) {
        if (this.busy[from] !== null) continue;
        let to = from;
        while (to < this.n && this.busy[to] === null) to++;
        put("gap", from, to);
        from = to;
      }
      for (const [at, text] of this.timeline.marks) put("mark", (at - this.timeline.first) / this.timeline.window).title = text;
      this.cursor = put("cursor", 0);
      this.cursor.hidden = true;
      this.layer = layer;
      this.tip = make(this.root, "div", "tip");
      this.tip.hidden = true;
      this.size();
    }

    // The layer ends at the axis.
    size() {
      this.layer.style.bottom = "auto";
      this.layer.style.height = `${this.foot.offsetTop - 8}px`;
    }

    button() {
      const all = this.lanes.length;
      const button = make(null, "button", "more", `Show all ${all} users`);
      button.type = "button";
      (this.hint || this.foot).after(button);
      button.addEventListener("click", () => {
        this.show(all);
        button.remove();
        this.size();
        this.root.focus();
      });
    }

    listen() {
      const root = this.root;
      root.addEventListener("pointermove", (event) => this.point(event));
      root.addEventListener("pointerdown", (event) => this.point(event));
      root.addEventListener("pointerleave", () => this.hide());
      root.addEventListener("blur", () => this.hide());
      root.addEventListener("keydown", (event) => this.key(event));
    }

    point(event) {
      const box = this.layer.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width;
      const at = this.rows.findIndex(({ row }) => {
        const bounds = row.getBoundingClientRect();
        return event.clientY >= bounds.top && event.clientY < bounds.bottom;
      });
      if (x < 0 || x >= 1 || at < 0) return this.hide();
      this.go(Math.floor(x * this.n), at);
    }

    key(event) {
      if (event.target !== this.root || event.altKey || event.ctrlKey || event.metaKey) return;
      const far = event.shiftKey ? 10 : 1;
      let [window, at] = [this.window ?? 0, this.at ?? 0];
      if (event.key === "ArrowRight") window += far;
      else if (event.key === "ArrowLeft") window -= far;
      else if (event.key === "ArrowDown") at += 1;
      else if (event.key === "ArrowUp") at -= 1;
      else if (event.key === "Home") window = 0;
      else if (event.key === "End") window = this.n - 1;
      else if (event.key === "Escape") return this.hide();
      else return;
      event.preventDefault();
      this.go(Math.max(0, Math.min(this.n - 1, window)), Math.max(0, Math.min(this.rows.length - 1, at)));
      this.live.textContent = this.tip.innerText.replaceAll("\n", ", ");
    }

    go(window, at) {
      if (this.window === window && this.at === at && !this.tip.hidden) return;
      this.rows[this.at ?? 0]?.row.classList.remove("at");
      [this.window, this.at] = [window, at];
      const { row, lane } = this.rows[at];
      if (lane) row.classList.add("at");
      this.cursor.hidden = false;
      this.cursor.style.left = `${((window + 0.5) / this.n) * 100}%`;
      this.fillTooltip(window, lane);
      const left = this.layer.offsetLeft + ((window + 0.5) / this.n) * this.layer.offsetWidth;
      const right = left > this.root.offsetWidth / 2;
      this.tip.style.left = right ? "auto" : `${left + 14}px`;
      this.tip.style.right = right ? `${this.root.offsetWidth - left + 14}px` : "auto";
      this.tip.style.top = `${row.offsetTop + (lane ? 30 : 12)}px`;
    }

    fillTooltip(window, lane) {
      const tip = this.tip;
      tip.textContent = "";
      tip.hidden = false;
      const line = (name, value, className, colour) => {
        const paragraph = make(tip, "p", className);
        const head = make(paragraph, "span");
        if (colour !== undefined) make(head, "i", `key c${colour}`);
        make(head, "bdi", "", name);
        make(paragraph, "span", "", value);
      };
      const seconds = this.timeline.first + window * this.timeline.window;
      line(`${clock(seconds, this.timeline.window % 1 ? 23 : 19)} UTC`, `+${seconds.toFixed(this.timeline.window % 1 ? 1 : 0)} s`, "time");
      const waited = () => lane && lane.wait && line("waited", lane.wait[window] === null ? "no probes" : percent(lane.wait[window]), "");
      if (this.busy[window] === null && !(lane && lane.share[window])) {
        make(tip, "p", "", "Not observed");
        waited();
        return;
      }
      if (lane) {
        line(lane.name, percent(lane.share[window]), "", lane.colour);
        waited();
        if (lane.used.length) line("user memory", memory(lane.used[window]), "time");
      } else {
        const active = this.rows.filter(({ lane, isWaits }) => lane && !isWaits && lane.share[window] > 0).map(({ lane }) => lane);
        active.sort((a, b) => b.share[window] - a.share[window]);
        for (const user of active.slice(0, 6)) line(user.name, percent(user.share[window]), "", user.colour);
        if (active.length > 6) make(tip, "p", "time", `and ${active.length - 6} more`);
        if (!active.length) make(tip, "p", "", "Idle");
      }
      line("GPU busy", percent(this.busy[window]), "time");
      line("GPU memory", memory(this.memory[window]), "time");
    }

    hide() {
      this.tip.hidden = true;
      this.cursor.hidden = true;
      this.rows[this.at ?? 0]?.row.classList.remove("at");
    }
  }

  for (const root of document.querySelectorAll(".chart")) new Chart(root);

  // Tooltips of the matrix of GPU time, with the names of row and column; that of waiting has them in the markup.
  for (const table of document.querySelectorAll(".matrix:not(.waiting)")) {
    const names = [...table.querySelectorAll("tbody th bdi")].map((one) => one.textContent);
    for (const cell of table.querySelectorAll("td[data-row]")) {
      cell.title = `${names[cell.dataset.column]} received ${cell.textContent} GPU-seconds while ${names[cell.dataset.row]} was active and the GPU saturated`;
    }
    table.querySelectorAll("thead th").forEach((one, at) => (one.title = names[at]));
  }

  // Collapsed sections are expanded for printing.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of opened) one.open = false;
  });
})();
