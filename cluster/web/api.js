// The server, as the page uses it. Addresses are relative, so any route prefix will do.

// Where the server asks for a key, so does the page; the tab keeps it, and nothing else does.

const KEY = "tensorray-key";
const lost = []; // who wants to know that the key is missing or wrong

let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch { /* a browser that keeps nothing */ }

export const hasKey = () => key !== "";
export const onRefusedKey = (act) => { lost.push(act); };
export function useKey(value) {
  key = value;
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch { /* it lasts until the page is loaded again */ }
}

function headers(more = {}) {
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function refusal(response) {
  if (response.status === 401) for (const act of lost) act();
  const text = await response.text();
  try {
    return new Error(JSON.parse(text).error.message);
  } catch {
    return new Error(`${response.status} ${response.statusText} ${text.slice(0, 200)}`);
  }
}

export async function get(path) {
  const response = await fetch(path, { headers: headers(), signal: AbortSignal.timeout(8000) });
  if (!response.ok) throw await refusal(response);
  return response;
}

// Posts a request and gives the answer's server-sent events, parsed, as they come.
export async function* stream(path, body, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Error(parsed.error.message);
      yield parsed;
    }
  }
}
