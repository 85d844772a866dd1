// The API of the server that the page came from. A key is kept until the browser's tab is closed, and sent as a header.
import { ask, el, field, find } from "./dom.js";

const KEY = "nestlearn-key";

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    Object.assign(this, { name: "ApiError", status, code: error.code });
  }
}

let asking = null;

/** Ask for the key; resolves to whether one was given. Requests that need it at once share the question. */
export function askForKey() {
  const input = el("input", { type: "password", autocomplete: "off", spellcheck: "false", required: true });
  const about = sessionStorage.getItem(KEY) ? "The server does not accept the key any more." : "This server needs a key.";
  asking ??= ask("Key", [el("p", {}, about), field("Key", input, "It begins with nl-. This tab forgets it when it is closed.")])
    .then((given) => {
      if (given) sessionStorage.setItem(KEY, input.value.trim());
      return given;
    })
    .finally(() => (asking = null));
  return asking;
}

async function request(method, path, { body, signal } = {}) {
  for (;;) {
    const headers = {};
    const key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    const raw = body instanceof Blob;
    if (body !== undefined) headers["Content-Type"] = raw ? "application/octet-stream" : "application/json";
    const content = body === undefined || raw ? body : JSON.stringify(body);
    let response;
    try {
      response = await fetch(path, { method, headers, body: content, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer. Is it still running?");
    }
    find("key").hidden = !key;
    if (response.ok) return response;
    // Another request may have got a key meanwhile.
    if (response.status === 401 && (sessionStorage.getItem(KEY) !== key || (await askForKey()))) continue;
    throw await errorOf(response);
  }
}

async function errorOf(response) {
  try {
    return new ApiError(response.status, (await response.json()).error);
  } catch {
    return new ApiError(response.status, { message: `The server answered with status ${response.status}.` });
  }
}

/** The JSON that answers a request. */
export async function call(method, path, body) {
  return (await request(method, path, { body })).json();
}

/** The content of a file of the server. */
export async function blob(path) {
  return (await request("GET", path)).blob();
}

/** The objects of a stream of events. An error inside of it is thrown. */
export async function* events(path, body, signal) {
  const response = await request("POST", path, { body: { ...body, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let whole = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done && whole) return;
      if (done) throw new Error("The answer broke off. The server may have stopped.");
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        whole = data === "[DONE]";
        if (whole) continue;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(response.status, event.error);
        yield event;
      }
    }
  } catch (error) {
    throw error instanceof TypeError ? new Error("The connection to the server broke off.") : error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const path = (name, rest = "") => `v1/sessions/${encodeURIComponent(name)}${rest}`;

/** All sessions, page by page. */
export async function allSessions() {
  const found = [];
  let after = "";
  for (;;) {
    const page = await call("GET", `v1/sessions?limit=100${after}`);
    found.push(...page.data);
    if (!page.has_more) return found;
    after = `&after=${encodeURIComponent(page.last_id)}`;
  }
}
