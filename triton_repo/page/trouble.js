// Errors in plain words.

import { $, make } from "./dom.js";

const TITLES = {
  invalid: "The model cannot do this",
  unauthorized: "The server asks for an API key",
  too_large: "This request is too large",
  rate_limited: "Too many requests from this key",
  unavailable: "The server is busy or starting",
  cancelled: "The request was cancelled",
  not_found: "It is no longer there",
  internal: "The server failed",
  unreachable: "The server cannot be reached",
};

/** Show `error` (an ApiError, or a fault of the page), and move the focus to it or to the API key. */
export function show(error) {
  const title = TITLES[error.code] ?? "Something went wrong on this page";
  // "[request] steps=0: need 1..1000": the bracket is for logs.
  const message = error.message.replace(/^\[[^\]]*\] */, "");
  const parts = [make("h2", {}, title), make("p", {}, message)];
  if (error.retryAfter) parts.push(make("p", {}, `Try again in ${Math.ceil(error.retryAfter)} s.`));
  if (error.requestId) parts.push(make("p", { className: "hint" }, "Request id ", make("code", {}, error.requestId)));
  $("error").replaceChildren(...parts);
  $("error").hidden = false;
  (error.code === "unauthorized" ? $("key") : $("error")).focus();
}

export function clear() {
  $("error").hidden = true;
  $("error").replaceChildren();
}
