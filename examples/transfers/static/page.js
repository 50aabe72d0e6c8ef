"use strict";

const SECONDS = 60, LATEST = 12;
const $ = (id) => document.getElementById(id);
const accounts = new Map(); // by number: {name, balance, bar, shown}
const rates = Array(SECONDS).fill(0);
let total = 0, gaps = 0, thisSecond = 0;

async function fetchJson(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

// Balances: read once, then moved along with the events. After a gap: read again.

async function readAccounts() {
  for (const { id, name, balance } of await fetchJson("accounts")) {
    if (!accounts.has(id)) {
      const item = document.createElement("li");
      const label = document.createElement("span");
      label.textContent = name;
      const bar = document.createElement("span");
      bar.className = "bar";
      bar.append(document.createElement("i"));
      const shown = document.createElement("output");
      item.append(label, bar, shown);
      $("accounts").append(item);
      accounts.set(id, { name, bar: bar.firstChild, shown });
    }
    accounts.get(id).balance = balance;
  }
  showAccounts();
}

function showAccounts() {
  const most = Math.max(1, ...[...accounts.values()].map((a) => a.balance));
  let sum = 0;
  for (const account of accounts.values()) {
    sum += account.balance;
    account.bar.style.width = `${(100 * account.balance) / most}%`;
    account.shown.textContent = account.balance.toLocaleString("en");
  }
  $("sum").textContent = `together ${sum.toLocaleString("en")}`;
}

function addLatest(text, amount, kind = "") {
  const item = document.createElement("li");
  item.className = kind;
  item.append(text);
  if (amount !== undefined) {
    const shown = document.createElement("b");
    shown.textContent = amount;
    item.append(shown);
  }
  $("latest").prepend(item);
  while ($("latest").children.length > LATEST) $("latest").lastChild.remove();
}

function onTransfer({ source, target, amount }) {
  total += 1;
  thisSecond += 1;
  $("total").textContent = total.toLocaleString("en");
  const from = accounts.get(source), to = accounts.get(target);
  if (!from || !to) return;
  from.balance -= amount;
  to.balance += amount;
  addLatest(`${from.name} → ${to.name}`, amount);
}

async function onGap() {
  gaps += 1;
  $("gaps").textContent = gaps;
  $("gap").hidden = false;
  addLatest("something may be missing here", undefined, "gap");
  setTimeout(() => { $("gap").hidden = true; }, 15000);
  await readAccounts();
}

// The feed. EventSource connects again by itself.

function listen() {
  const feed = new EventSource("events");
  const say = (text, kind) => { $("link").textContent = text; $("link").className = `chip ${kind}`; };
  feed.addEventListener("ready", () => { say("live", "live"); readAccounts().catch(console.warn); });
  feed.addEventListener("transfer", (event) => onTransfer(JSON.parse(event.data)));
  feed.addEventListener("gap", () => { onGap().catch(console.warn); });
  feed.onerror = () => say("connection lost", "lost");
}

// Once a second: the chart, and what only the service knows.

function makeChart() {
  const style = getComputedStyle(document.documentElement);
  const soft = style.getPropertyValue("--soft"), line = style.getPropertyValue("--line");
  const blue = style.getPropertyValue("--blue").trim();
  const axis = { stroke: soft, grid: { stroke: line, width: 1 }, ticks: { show: false } };
  const chart = new uPlot({
    width: $("chart").clientWidth, height: 180, legend: { show: false },
    cursor: { show: false }, scales: { y: { range: (_, __, most) => [0, Math.max(5, most * 1.1)] } },
    series: [{}, { stroke: blue, fill: `${blue}22`, width: 2, points: { show: false } }],
    axes: [{ ...axis, size: 28, values: (_, times) => times.map(clock) }, { ...axis, size: 40 }],
  }, chartData(), $("chart"));
  addEventListener("resize", () => chart.setSize({ width: $("chart").clientWidth, height: 180 }));
  return chart;
}

function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en", { hour12: false, minute: "2-digit", second: "2-digit" });
}

function chartData() {
  const now = Math.floor(Date.now() / 1000);
  return [rates.map((_, i) => now - SECONDS + 1 + i), rates];
}

async function everySecond(chart) {
  rates.push(thisSecond);
  rates.shift();
  $("rate").textContent = thisSecond;
  thisSecond = 0;
  chart.setData(chartData());
  showAccounts();
  const status = await fetchJson("status");
  $("pool").textContent = `${status.pool_used} of ${status.pool_size}`;
  $("held").textContent = status.held_back;
}

const chart = makeChart();
setInterval(() => { everySecond(chart).catch(console.warn); }, 1000);
listen();
