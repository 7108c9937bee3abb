/** The form as a request. Empty fields are not sent, so defaults are the server's alone. */

import { ApiError } from "./api.js";
import { byId } from "./dom.js";

const NUMBERS_OF_DIFFUSION = [
  "steps",
  "block_length",
  "threshold",
  "factor",
  "entropy_bound",
  "cfg_scale",
  "refresh",
];
const CHOICES_OF_DIFFUSION = ["remasking", "cache"];
const NUMBERS_OF_ALL = ["temperature", "top_p", "seed"];
const ESCAPES = { n: "\n", t: "\t", r: "\r", "\\": "\\" };

/** The number in a field; undefined if it is empty. Throws ApiError naming the field. */
function numberIn(name) {
  const field = byId(name);
  const wrong = (why) => new ApiError(`${name} ${why}`, { param: name });
  if (field.validity.badInput) throw wrong("is not a number");
  if (field.value === "") return undefined;
  const value = Number(field.value);
  // JSON numbers of JavaScript are exact up to here; a rounded seed would be another seed.
  if (Math.abs(value) > Number.MAX_SAFE_INTEGER) {
    throw wrong(`can be at most ${Number.MAX_SAFE_INTEGER} on this page`);
  }
  return value;
}

/** Stop strings, one a line, with \n, \t, \r and \\ as in most languages. */
export function stopStrings(text) {
  const lines = text.split("\n").filter((line) => line !== "");
  return lines.map((line) => line.replace(/\\([ntr\\])/g, (_, letter) => ESCAPES[letter]));
}

export function isHole() {
  return byId("tab-hole").getAttribute("aria-selected") === "true";
}

/** What stands before and after the new tokens, and their number, as far as the form knows. */
export function canvasOf() {
  const length = byId(isHole() ? "span" : "gen_length").valueAsNumber;
  return {
    before: byId(isHole() ? "prefix" : "prompt").value,
    after: isHole() ? byId("suffix").value : "",
    length: Number.isInteger(length) && length > 0 ? length : 0,
  };
}

/** The fields of a request, without the model. `diffusion`: also the settings of a student. */
export function requestOf({ diffusion }) {
  const body = {};
  if (isHole()) {
    body.prefix = byId("prefix").value;
    body.suffix = byId("suffix").value;
    body.span = numberIn("span");
  } else {
    body.prompt = byId("prompt").value;
    body.gen_length = numberIn("gen_length");
    if (byId("chat").checked) body.chat = true;
  }
  for (const name of NUMBERS_OF_ALL) body[name] = numberIn(name);
  if (diffusion) {
    for (const name of NUMBERS_OF_DIFFUSION) body[name] = numberIn(name);
    for (const name of CHOICES_OF_DIFFUSION) body[name] = byId(name).value || undefined;
  }
  const stop = stopStrings(byId("stop").value);
  if (stop.length > 0) body.stop = stop;
  return body; // JSON leaves out what is undefined
}

/** Move to the field an error is about. Returns whether there is one. */
export function focusField(param) {
  const name = (param ?? "").split(".")[0];
  const field = byId("ask").elements.namedItem(name);
  if (!(field instanceof HTMLElement) || field.matches(":disabled")) return false;
  const details = field.closest("details");
  if (details !== null) details.open = true;
  if (field.closest("[hidden]") !== null) return false;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-errormessage", "error");
  field.focus();
  return true;
}

export function clearInvalid() {
  for (const field of byId("ask").querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
  }
}
