// The playground: a conversation, or completions where the model has no chat template.

import { stream } from "./api.js";
import { append, tokensOf, watch } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const messages = $("messages");
const prompt = $("prompt");
const settings = $("settings");
const field = (name) => settings.elements[name];

const STORED = "tensorray-settings";
const TOP = 5; // alternatives a token

let turns = []; // {role, content, element}
let running = null; // the AbortController of the answer in the making
let chatPossible = true;

const mode = () => (chatPossible ? field("mode").value : "completion");

// Told what is served: the form starts with what the model's makers recommend, and what fits.
export function describe({ chat, defaults, max_model_len: context }) {
  for (const [name, value] of Object.entries(defaults)) {
    if (name === "top_k") field(name).placeholder = value || "all";
    else if (field(name)) field(name).defaultValue = value;
  }
  field("max_tokens").defaultValue = Math.max(1, Math.min(512, Math.floor(context / 4)));
  reflect();
  if (chat === chatPossible) return;
  chatPossible = chat;
  for (const radio of field("mode")) radio.disabled = !chat;
  if (!chat) field("mode").value = "completion";
  $("no-template").hidden = chat;
  reflect();
}

// --- settings ---

function reflect() {
  for (const label of settings.querySelectorAll(".slide")) {
    label.querySelector(".value").textContent = label.querySelector("input").value;
  }
  const completing = mode() === "completion";
  $("system-field").hidden = completing;
  prompt.placeholder = completing ? "Text to go on from" : "Write a message";
  messages.classList.toggle("shaded", field("shade").checked);
  greet();
}

function store() {
  const kept = {};
  for (const each of settings.elements) {
    if (!each.name || (each.type === "radio" && !each.checked)) continue;
    kept[each.name] = each.type === "checkbox" ? each.checked : each.value;
  }
  try {
    localStorage.setItem(STORED, JSON.stringify(kept));
  } catch { /* a browser that keeps nothing */ }
}

function restore() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch { /* start afresh */ }
  for (const [name, value] of Object.entries(kept)) {
    const found = field(name);
    if (!found) continue;
    if (found.type === "checkbox") found.checked = value;
    else found.value = value;
  }
}

// What the form asks for; what is left empty is left to the server.
function sampling() {
  const asked = {};
  for (const name of ["temperature", "top_p", "min_p", "repetition_penalty", "top_k", "max_tokens",
    "presence_penalty", "frequency_penalty", "seed"]) {
    if (field(name).value !== "") asked[name] = Number(field(name).value);
  }
  const stop = field("stop").value.split("\n").filter(Boolean);
  if (stop.length) asked.stop = stop;
  return asked;
}

// --- conversation ---

function greet() {
  const shown = messages.querySelector(".empty");
  if (turns.length) return shown?.remove();
  const text = mode() === "chat" ? "Say something to the model." : "Write the beginning of a text; the model goes on.";
  const made = shown ?? element("div", "empty");
  made.replaceChildren(element("strong", "", "Playground"), text);
  if (!shown) messages.append(made);
}

function element(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.textContent = text;
  return made;
}

function button(label, act) {
  const made = element("button", "quiet", label);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

function add(role, content = "") {
  const made = element("article", `message ${role}`);
  made.setAttribute("aria-label", role === "user" ? "You" : "Model");
  const text = element("div", "text", content);
  made.append(text);
  if (role !== "user") {
    text.tabIndex = 0;
    made.append(element("footer"));
  }
  const turn = { role, content, element: made };
  turns.push(turn);
  messages.append(made);
  greet();
  messages.scrollTop = messages.scrollHeight;
  return turn;
}

// Where what the model thinks is shown: folded, before its answer.
function reasoning(turn) {
  const there = turn.element.querySelector(".reasoning div");
  if (there) return there;
  const made = element("details", "reasoning");
  const text = element("div");
  made.append(element("summary", "", "Reasoning"), text);
  turn.element.prepend(made);
  return text;
}

function drop(turn) {
  for (const gone of turns.splice(turns.indexOf(turn))) gone.element.remove();
  greet();
}

function request() {
  const asked = { ...sampling(), stream: true, stream_options: { include_usage: true } };
  if (mode() === "completion") {
    if (field("logprobs").checked) asked.logprobs = TOP;
    return ["v1/completions", { ...asked, prompt: turns.at(-1).content }];
  }
  if (field("logprobs").checked) Object.assign(asked, { logprobs: true, top_logprobs: TOP });
  const said = turns.filter((turn) => turn.role !== "error");
  const talk = said.map(({ role, content }) => ({ role, content }));
  const system = field("system").value.trim();
  if (system) talk.unshift({ role: "system", content: system });
  return ["v1/chat/completions", { ...asked, messages: talk }];
}

async function answer() {
  const [path, body] = request();
  const began = performance.now();
  let first = 0;
  let last = 0;
  let count = 0;
  let usage = null;
  let reason = "";
  const turn = add("assistant");
  const text = turn.element.querySelector(".text");
  if (body.prompt !== undefined) text.append(element("span", "prompt-part", body.prompt));
  turn.element.classList.add("running");
  running = new AbortController();
  busy(true);
  let held = [];
  try {
    for await (const chunk of stream(path, body, running.signal)) {
      if (chunk.usage) usage = chunk.usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      const piece = choice.delta ? choice.delta.content ?? "" : choice.text;
      const thought = choice.delta?.reasoning_content ?? "";
      const tokens = tokensOf(choice.logprobs);
      if (piece || thought || tokens.length) {
        last = performance.now();
        first ||= last;
        count += tokens.length || 1;
      }
      reason = choice.finish_reason ?? reason;
      const end = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 40;
      turn.content += piece;
      if (thought) held = append(reasoning(turn), thought, [...held, ...tokens]);
      if (piece || !thought) held = append(text, piece, thought ? held : [...held, ...tokens]);
      rate(turn, usage?.completion_tokens ?? count, began, first, last, "");
      if (end) messages.scrollTop = messages.scrollHeight;
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else {
      if (!turn.content) drop(turn);
      add("error", error.message);
      again(turns.at(-1));
    }
  } finally {
    running = null;
    turn.element.classList.remove("running");
    busy(false);
  }
  if (!turns.includes(turn)) return;
  rate(turn, usage?.completion_tokens ?? count, began, first, last, reason);
  again(turn);
}

function rate(turn, tokens, began, first, last, reason) {
  const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  if (tokens > 1 && last > first) parts.push(`${((tokens - 1) / (last - first) * 1000).toFixed(1)} tokens/s`);
  if (first) parts.push(`first after ${Math.round(first - began)} ms`);
  const ends = { length: "ended at max tokens", stopped: "stopped" };
  if (ends[reason]) parts.push(ends[reason]);
  turn.element.querySelector("footer").textContent = parts.join(" · ");
}

function again(turn) {
  const footer = turn.element.querySelector("footer");
  if (turn.role === "assistant") {
    footer.append(button("Copy", () => navigator.clipboard?.writeText(turn.content)));
  }
  footer.append(button(turn.role === "error" ? "Try again" : "Regenerate", () => {
    if (running) return;
    drop(turn);
    if (turns.length) answer();
  }));
}

function busy(yes) {
  $("stop").hidden = !yes;
  $("send").hidden = yes;
  messages.setAttribute("aria-busy", yes);
}

function send() {
  if (running || !prompt.value.trim()) return;
  if (mode() === "completion" && turns.length) drop(turns[0]);
  add("user", prompt.value);
  if (mode() === "completion") turns[0].element.hidden = true; // it begins the answer's text
  else prompt.value = "";
  grow();
  answer();
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

export function start() {
  restore();
  reflect();
  watch(messages);
  settings.addEventListener("input", () => { reflect(); store(); });
  settings.addEventListener("reset", () => setTimeout(() => {
    if (!chatPossible) field("mode").value = "completion";
    reflect();
    store();
  }));
  settings.addEventListener("submit", (event) => event.preventDefault());
  $("more").addEventListener("click", () => {
    $("more").setAttribute("aria-expanded", $("aside").classList.toggle("shown"));
  });
  prompt.addEventListener("input", grow);
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => {
    running?.abort();
    if (turns.length) drop(turns[0]);
    prompt.focus();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
}
