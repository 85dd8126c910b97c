// Tokens in the text: one span each, and what else could have stood there.

const data = new WeakMap(); // span -> its tokens
const tip = document.getElementById("tip");

// One shape for both of the API's: [{token, logprob, top: [{token, logprob}]}].
export function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((each) => ({ token: each.token, logprob: each.logprob, top: each.top_logprobs }));
  }
  return logprobs.tokens.map((token, i) => ({
    token,
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs[i] ?? {})
      .map(([token, logprob]) => ({ token, logprob }))
      .sort((a, b) => b.logprob - a.logprob),
  }));
}

// Appends text, a span a token where they match. Some tokens are parts of a character, or their
// text is held back: these are given back, to come with the text they belong to.
export function append(place, text, tokens) {
  let at = 0;
  let group = [];
  for (const each of tokens) {
    if (!group.length && each.token && text.startsWith(each.token, at)) {
      place.append(span(each.token, [each]));
      at += each.token.length;
    } else {
      group.push(each);
    }
  }
  if (at === text.length) return group;
  const rest = text.slice(at);
  place.append(group.length ? span(rest, group) : rest);
  return [];
}

function span(text, tokens) {
  const made = document.createElement("span");
  made.className = "token";
  made.textContent = text;
  const least = Math.min(...tokens.map((each) => each.logprob ?? 0));
  made.style.setProperty("--doubt", `${Math.round((1 - Math.exp(least)) * 60)}%`);
  data.set(made, tokens);
  return made;
}

function show(target) {
  const tokens = data.get(target);
  tip.replaceChildren();
  tokens.slice(0, 4).forEach((each, i) => {
    if (i) tip.append(document.createElement("hr"));
    const rows = [...each.top];
    if (!rows.some((other) => other.token === each.token)) rows.push(each);
    for (const other of rows) tip.append(row(other, other.token === each.token));
  });
  tip.hidden = false;
  const box = target.getClientRects()[0] ?? target.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const below = box.bottom + 6 + height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
  tip.style.top = `${below ? box.bottom + 6 : box.top - height - 6}px`;
}

function row({ token, logprob }, own) {
  const made = document.createElement("div");
  made.className = own ? "row own" : "row";
  const probability = Math.exp(logprob ?? 0);
  const name = document.createElement("code");
  name.textContent = token.replaceAll("\n", "⏎").replaceAll(" ", "·") || "∅";
  const bar = document.createElement("div");
  bar.className = "bar";
  const fill = document.createElement("i");
  fill.style.width = `${probability * 100}%`;
  bar.append(fill);
  const share = document.createElement("b");
  share.textContent = `${(probability * 100).toFixed(probability < 0.1 ? 2 : 1)} %`;
  made.append(name, bar, share);
  return made;
}

function hide() {
  tip.hidden = true;
  for (const chosen of document.querySelectorAll(".token.chosen")) chosen.classList.remove("chosen");
}

// Pointers hover; the keyboard walks the tokens of a focused text with the arrow keys.
export function watch(messages) {
  messages.addEventListener("pointerover", (event) => {
    if (data.has(event.target)) show(event.target);
    else hide();
  });
  messages.addEventListener("pointerleave", hide);
  messages.addEventListener("scroll", hide);
  messages.addEventListener("focusout", hide);
  messages.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !event.target.classList.contains("text")) return;
    const all = [...event.target.querySelectorAll(".token")];
    if (!all.length) return;
    event.preventDefault();
    const now = all.findIndex((each) => each.classList.contains("chosen"));
    const next = all[Math.max(0, Math.min(all.length - 1, now + step))];
    hide();
    next.classList.add("chosen");
    next.scrollIntoView({ block: "nearest" });
    show(next);
  });
}
