// The calls. The token is in this module's memory, nowhere else, and travels in a header, never in an address.

let token = null;
let ended = () => {};

export class Refusal extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** Who is told when the token is good no more. */
export function whenEnded(listener) {
  ended = listener;
}

export function forget() {
  token = null;
}

/** Keeps a token; gives when it ends, in seconds since 1970, as it says itself. */
export function keep(text) {
  const parts = text.trim().split(".");
  if (parts.length !== 3 || !parts.every((part) => /^[\w-]+$/.test(part))) {
    throw new Refusal(400, "This is no token: “nacre broker token” prints one, of three parts with dots between them.");
  }
  token = parts.join(".");
  try {
    return Number(JSON.parse(atob(parts[1].replaceAll("-", "+").replaceAll("_", "/"))).exp);
  } catch {
    return NaN;
  }
}

/** Asks the broker. */
export async function get(path, parameters = {}, signal = undefined) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== undefined && value !== null));
  const address = `/kbs/v0/${path}${query.size > 0 ? `?${query}` : ""}`;
  let response;
  try {
    response = await fetch(address, {
      headers: { Authorization: `Bearer ${token}` },
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
      referrerPolicy: "no-referrer",
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The broker does not answer. Is it running, and is the network there?");
  }
  let body = null;
  try {
    body = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (response.ok && body !== null) return body;
  const detail = typeof body?.detail === "string" ? body.detail : `The broker answered with status ${response.status}.`;
  if (response.status === 401) ended(detail);
  throw new Refusal(response.status, detail);
}
