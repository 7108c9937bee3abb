/** The server: requests with the key, errors in one shape. The key lives in this tab only. */

import { readEvents } from "./sse.js";

const KEY = "mdm-api-key";

/** What the server says is wrong; `status` is 0 if it could not be reached. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, code = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
  }

  static of(status, detail) {
    return new ApiError(detail.message, { status, param: detail.param, code: detail.code });
  }
}

export function storedKey() {
  return sessionStorage.getItem(KEY);
}

export function storeKey(key) {
  if (!/^[\x21-\x7e]+$/.test(key)) {
    throw new ApiError("An API key has no spaces and only plain ASCII characters.");
  }
  sessionStorage.setItem(KEY, key);
}

/** Send a request; the response if it is a success. Throws ApiError, or AbortError if aborted. */
async function send(path, { body, signal } = {}) {
  const headers = {};
  const key = storedKey();
  if (key !== null) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const text = await response.text();
  let detail;
  try {
    detail = JSON.parse(text).error;
  } catch {
    detail = undefined; // not ours: a proxy before the server
  }
  if (detail === undefined) detail = { message: `${response.status} ${response.statusText}` };
  throw ApiError.of(response.status, detail);
}

export async function getJson(path, signal) {
  return (await send(path, { signal })).json();
}

export async function postJson(path, body, signal) {
  return (await send(path, { body, signal })).json();
}

/** The events of a streamed answer. Throws ApiError for an error among them, or a cut-off stream. */
export async function* postEvents(path, body, signal) {
  const response = await send(path, { body, signal });
  let ended = false;
  try {
    for await (const event of readEvents(response)) {
      if (event.error !== undefined) throw ApiError.of(response.status, event.error);
      ended = event.done !== undefined;
      yield event;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(`The answer broke off: ${error.message}`);
  }
  if (!ended) throw new ApiError("The answer broke off before its end.");
}
