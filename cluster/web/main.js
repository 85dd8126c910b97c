// The page: views, theme, and who is served.

import { hasKey, onRefusedKey, useKey } from "./api.js";
import * as engine from "./engine.js";
import * as playground from "./playground.js";

const $ = (id) => document.getElementById(id);
const root = document.documentElement;

const tabs = [...document.querySelectorAll("[role=tab]")];
let redraw = () => {};

function open(tab) {
  for (const each of tabs) {
    const chosen = each === tab;
    each.setAttribute("aria-selected", chosen);
    each.tabIndex = chosen ? 0 : -1;
    $(each.getAttribute("aria-controls")).hidden = !chosen;
  }
  history.replaceState(null, "", tab.id === "tab-engine" ? "#engine" : location.pathname);
  redraw();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    const other = tabs[(tabs.indexOf(tab) + 1) % tabs.length];
    open(other);
    other.focus();
  });
}

const THEMES = ["auto", "light", "dark"];
const STORED = "tensorray-theme";

function theme(name) {
  root.dataset.theme = name;
  $("theme").textContent = { auto: "Theme: auto", light: "Theme: light", dark: "Theme: dark" }[name];
}

function stored() {
  try {
    return localStorage.getItem(STORED);
  } catch {
    return null;
  }
}

theme(THEMES.includes(stored()) ? stored() : "auto");
$("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
  theme(next);
  try {
    localStorage.setItem(STORED, next);
  } catch { /* a browser that keeps nothing */ }
});

// --- the API key ---

const unlock = $("unlock");
const reflectKey = () => { $("lock").hidden = !hasKey(); };

onRefusedKey(() => {
  if (unlock.open) return;
  $("unlock-error").hidden = !hasKey();
  $("unlock-error").textContent = "That is not a key of this server's.";
  useKey("");
  reflectKey();
  unlock.showModal();
});
unlock.addEventListener("cancel", (event) => event.preventDefault()); // there is nothing behind it
$("unlock-form").addEventListener("submit", () => {
  const field = $("unlock-form").elements.key;
  useKey(field.value.trim());
  field.value = "";
  reflectKey();
  engine.lookNow();
});
$("lock").addEventListener("click", () => {
  useKey("");
  location.reload();
});
reflectKey();

playground.start();
redraw = engine.start((status) => {
  $("model").textContent = status.models[0];
  $("model").title = `${status.models.join(", ")}: context of ${status.max_model_len} tokens, Tensorray ${status.version}`;
  document.title = `${status.models[0]} · Tensorray`;
  playground.describe(status);
});
if (location.hash === "#engine") open($("tab-engine"));
