// What the gateway offers, as functions. Every error is an ApiError.

import { packed } from "./files.js";

const KEY = "volcast-key";

export class ApiError extends Error {
  /** `code`: the gateway's, or "unreachable"; `retryAfter`: seconds, or null. */
  constructor({ code, message, request_id: requestId }, retryAfter = null) {
    super(message);
    Object.assign(this, { code, requestId, retryAfter });
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** The models of `GET /v1/models`. */
export async function models() {
  return (await (await call("/v1/models")).json()).models;
}

/** The `.nii.gz` behind a volume's or preview's url, a Blob. */
export async function volume(url, signal) {
  return reach((await call(url, { signal })).blob());
}

/** The events of one request as `{event, data}`, until "end"; `body` may hold Files. Aborting `signal` cancels the request at the server. */
export async function* generate(model, body, signal) {
  const response = await call(`/v1/models/${encodeURIComponent(model)}/generate`, {
    method: "POST",
    headers: { Accept: "text/event-stream", "Content-Type": "application/json" },
    body: JSON.stringify(await read(body)),
    signal,
  });
  for await (const { event, data } of events(response.body)) {
    if (event === "error") throw new ApiError(data.error, data.retry_s);
    yield { event, data };
    if (event === "end") return;
  }
  const requestId = response.headers.get("X-Request-Id");
  throw new ApiError({ code: "unreachable", message: "The answer ended too early.", request_id: requestId });
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const response = await reach(fetch(path, { ...options, headers, cache: "no-store" }));
  if (response.ok) return response;
  const text = await reach(response.text());
  const after = Number(response.headers.get("Retry-After")) || null;
  let error;
  try {
    error = JSON.parse(text).error;
  } catch {
    // A proxy in between may answer with a page of its own.
    const requestId = response.headers.get("X-Request-Id");
    error = { code: "internal", message: `Status ${response.status}`, request_id: requestId };
  }
  throw new ApiError(error, after);
}

async function read(body) {
  try {
    return await packed(body);
  } catch (error) {
    throw new ApiError({ code: "invalid", message: error.message });
  }
}

async function reach(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError({ code: "unreachable", message: error.message });
  }
}

/** Server-sent events out of a stream of bytes; EventSource can neither POST nor send a key. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reach(reader.read());
      if (done) return;
      text = (text + value).replaceAll("\r\n", "\n");
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const found = { event: "message", data: [] };
        for (const line of block.split("\n")) {
          const [, name, content] = /^(event|data): ?(.*)$/.exec(line) ?? [];
          if (name === "event") found.event = content;
          if (name === "data") found.data.push(content);
        }
        if (found.data.length) yield { event: found.event, data: JSON.parse(found.data.join("\n")) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
