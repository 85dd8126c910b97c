// The live view: what Prometheus would read, every two seconds, kept for five minutes in the page.

import { get } from "./api.js";
import { Chart } from "./chart.js";

const $ = (id) => document.getElementById(id);
const EVERY = 2000;
const KEPT = 150; // samples
const WINDOW = 15; // samples that percentiles and shares are taken over

// --- reading ---

// Prometheus' text as {name: sum over engines}, histograms as {name: {bound: count}}.
export function parse(text) {
  const values = {};
  const buckets = {};
  for (const line of text.split("\n")) {
    const match = /^tensorray:(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const [, name, labels = "", value] = match;
    const bound = /(?:^|,)le="([^"]+)"/.exec(labels);
    if (bound) {
      const into = (buckets[name.replace(/_bucket$/, "")] ??= {});
      const end = bound[1] === "+Inf" ? Infinity : Number(bound[1]);
      into[end] = (into[end] ?? 0) + Number(value);
    } else {
      values[name] = (values[name] ?? 0) + Number(value);
      if (name === "kv_cache_usage_perc") {
        const engine = /engine="([^"]*)"/.exec(labels)?.[1] ?? "";
        (values.usage ??= {})[engine] = Number(value);
      } else if (name === "kv_cache_blocks") {
        const engine = /engine="([^"]*)"/.exec(labels)?.[1] ?? "";
        (values.blocks ??= {})[engine] = Number(value);
      }
    }
  }
  return { values, buckets };
}

// A percentile of what came between two samples, in the bucket's proportion; null if nothing did.
export function percentile(later, earlier, share) {
  const bounds = Object.keys(later ?? {}).map(Number).sort((a, b) => a - b);
  const counts = bounds.map((bound) => later[bound] - (earlier?.[bound] ?? 0));
  const total = counts.at(-1);
  if (!(total > 0)) return null;
  const rank = share * total;
  const i = counts.findIndex((count) => count >= rank);
  const low = i ? bounds[i - 1] : 0;
  if (bounds[i] === Infinity) return low;
  const below = i ? counts[i - 1] : 0;
  return low + (bounds[i] - low) * (rank - below) / (counts[i] - below || 1);
}

// --- showing ---

const plain = (value) => (value >= 1000 ? `${(value / 1000).toFixed(value < 10000 ? 1 : 0)}k` : String(Math.round(value * 10) / 10));
const seconds = (value) => (value === 0 ? "0" : value < 1 ? `${+(value * 1000).toPrecision(3)} ms` : `${+value.toPrecision(3)} s`);
const percent = (value) => `${Math.round(value * 100)} %`;
const bytes = (value) => {
  if (!value) return "–";
  const i = Math.min(4, Math.floor(Math.log2(value) / 10));
  return `${+(value / 2 ** (10 * i)).toPrecision(3)} ${["B", "KiB", "MiB", "GiB", "TiB"][i]}`;
};

const CHARTS = [
  ["Sequences", ["running", "waiting"], plain, (at) => [at.values.num_requests_running, at.values.num_requests_waiting]],
  ["Tokens a second", ["generated", "prompt"], plain, (at, before) => [
    perSecond(at, before, "generation_tokens_total"), perSecond(at, before, "prompt_tokens_total")]],
  ["Batch occupancy", ["sequences a step", "tokens a step"], plain, (at, before) => [
    mean(at, before, "batch_size"), mean(at, before, "iteration_tokens_total")]],
  ["KV cache in use", ["blocks"], percent, (at) => [used(at) / (at.values.kv_cache_blocks || 1)], 1],
  ["Prefix cache hits", ["prompt tokens found"], percent, (at, _, old) => [
    ratio(at, old, "prefix_cache_hits_total", "prefix_cache_queries_total")], 1],
  ["Time to first token", ["p50", "p95", "p99"], seconds, (at, _, old) => percentiles(at, old, "time_to_first_token_seconds")],
  ["Time between tokens", ["p50", "p95", "p99"], seconds, (at, _, old) => percentiles(at, old, "inter_token_latency_seconds")],
  ["Step on the device", ["p50", "p95", "p99"], seconds, (at, _, old) => percentiles(at, old, "step_duration_seconds")],
];

const difference = (at, before, name) => Math.max(0, at.values[name] - before.values[name]);
const perSecond = (at, before, name) => (before ? difference(at, before, name) / (at.time - before.time) * 1000 : null);
function ratio(at, before, part, whole) {
  const all = before ? difference(at, before, whole) : 0;
  return all ? difference(at, before, part) / all : null;
}
const mean = (at, before, name) => ratio(at, before, `${name}_sum`, `${name}_count`);
const percentiles = (at, old, name) => [0.5, 0.95, 0.99].map((share) =>
  (old ? percentile(at.buckets[name], old.buckets[name], share) : null));
const used = (at) => Object.entries(at.values.usage ?? {})
  .reduce((sum, [engine, share]) => sum + share * at.values.blocks[engine], 0);

const history = []; // {time, values, buckets}
const lines = CHARTS.map(([, names]) => names.map(() => []));
let charts = [];
let tiles = [];

function take(sample) {
  const before = history.at(-1);
  if (before && sample.values.generation_tokens_total < before.values.generation_tokens_total) {
    history.length = 0; // another engine counts from zero
  }
  const old = history.at(-WINDOW) ?? history[0];
  CHARTS.forEach(([, , , read], chart) => {
    read(sample, history.at(-1), old).forEach((value, line) => {
      const kept = lines[chart][line];
      kept.push(Number.isFinite(value) ? value : null);
      if (kept.length > KEPT) kept.shift();
    });
  });
  history.push(sample);
  if (history.length > WINDOW) history.shift();
}

function draw() {
  const at = history.at(-1);
  if (!at || $("view-engine").hidden) return;
  const last = (chart, line) => lines[chart][line].at(-1);
  const say = (value, format) => (value === null || value === undefined ? "–" : format(value));
  const ended = at.values.request_success_total ?? 0;
  const shown = [
    ["Running", plain(at.values.num_requests_running), `+ ${plain(at.values.num_requests_waiting)} waiting`],
    ["Generated", say(last(1, 0), plain), "tokens/s"],
    ["First token", say(last(5, 0), seconds), "median"],
    ["Between tokens", say(last(6, 0), seconds), "median"],
    ["Prefix hits", say(ratio(at, { values: { prefix_cache_hits_total: 0, prefix_cache_queries_total: 0 } },
      "prefix_cache_hits_total", "prefix_cache_queries_total"), percent), "since start"],
    ["Ended", plain(ended), `${plain(at.values.num_preemptions_total ?? 0)} preempted`],
  ];
  shown.forEach(([, value, unit], i) => {
    tiles[i].value.data = `${value} `;
    tiles[i].unit.textContent = unit;
  });
  const room = Math.max(30, lines[0][0].length); // a minute at first, more as time goes on
  const span = `${+(room * EVERY / 60000).toFixed(1)} min`;
  charts.forEach((chart, i) => chart.draw(lines[i], room, span));
  const total = at.values.kv_cache_blocks || 1;
  const held = Math.round(used(at));
  const kept = at.values.kv_cache_reusable_blocks ?? 0;
  const [first, second] = $("blocks").children;
  first.style.width = `${held / total * 100}%`;
  second.style.width = `${kept / total * 100}%`;
  const legend = [["used", `${held} in use`], ["kept", `${kept} kept for reuse`], ["free", `${Math.max(0, total - held - kept)} empty`]];
  $("blocks-legend").replaceChildren(...legend.map(([name, text]) => {
    const item = document.createElement("span");
    const dot = document.createElement("i");
    dot.className = name;
    item.append(dot, text);
    return item;
  }));
  $("blocks").setAttribute("aria-label", `KV blocks: ${legend.map(([, text]) => text).join(", ")}`);
}

function cell(row, text, state = "") {
  const made = row.insertCell();
  if (!state) made.textContent = text;
  else {
    const badge = document.createElement("span");
    badge.className = "state";
    badge.dataset.state = state;
    badge.textContent = text;
    made.append(badge);
  }
}

function list(engines) {
  const body = document.createElement("tbody");
  body.id = "shards";
  for (const engine of engines) {
    for (const shard of engine.shards) {
      const row = body.insertRow();
      cell(row, engine.engine);
      cell(row, String(shard.rank));
      if (!shard.answers) cell(row, "does not answer", "down");
      else if (engine.failure) cell(row, "waits", "unknown");
      else cell(row, "serves", "up");
      cell(row, engine.device);
      cell(row, shard.pid ? String(shard.pid) : "–");
      cell(row, shard.node.slice(0, 8) || "–");
      cell(row, bytes(engine.weight_bytes));
      cell(row, bytes(engine.kv_cache_bytes));
      cell(row, bytes(shard.peak_rss_bytes));
      cell(row, seconds(engine.load_seconds));
    }
  }
  $("shards").replaceWith(body);
  const failures = engines.filter((engine) => engine.failure);
  $("failure").hidden = !failures.length;
  $("failure").textContent = failures.map((engine) => `Engine ${engine.engine}: ${engine.failure}`).join("; ");
}

function state(up, text) {
  $("state").dataset.state = up ? "up" : "down";
  if ($("state").textContent !== text) $("state").textContent = text;
}

let turn = 0;

// One look at the server. `described` is told what it serves.
async function look(described) {
  try {
    const text = await (await get("metrics")).text();
    take({ time: performance.now(), ...parse(text) });
    if (turn % 3 === 0) {
      const status = await (await get("status")).json();
      described(status);
      list(status.engines);
      const failed = status.engines.filter((engine) => engine.failure).length;
      const serving = status.engines.length - failed;
      state(serving > 0, !serving ? "not available" : failed ? `${serving} of ${status.engines.length} engines` : "ready");
    }
    turn += 1;
  } catch (error) {
    const why = error.name === "TypeError" ? "no connection" : error.message;
    state(false, $("unlock").open ? "locked" : why);
    turn = 0;
  }
  draw();
}

let again = () => {};

// At once, instead of when it is time again.
export const lookNow = () => again();

export function start(described) {
  tiles = ["Running", "Generated", "First token", "Between tokens", "Prefix hits", "Ended"].map((name) => {
    const box = document.createElement("div");
    box.className = "tile";
    const title = document.createElement("span");
    title.textContent = name;
    const figure = document.createElement("b");
    const value = document.createTextNode("– ");
    const unit = document.createElement("small");
    figure.append(value, unit);
    box.append(title, figure);
    $("tiles").append(box);
    return { value, unit };
  });
  charts = CHARTS.map(([title, names, format, , fixed]) => new Chart($("charts"), title, names, format, fixed));
  let next;
  const loop = async () => {
    clearTimeout(next);
    if (!document.hidden && !$("unlock").open) await look(described);
    next = setTimeout(loop, EVERY);
  };
  again = loop;
  loop();
  return draw;
}
