// Files in the form: pickers, and their content as the gateway takes it.

import { make, short } from "./dom.js";

/** A labelled picker of one NIfTI file of which `most` bytes in base64 may be sent; `changed` gets the File, or undefined. */
export function picker({ label, hint, most, ...properties }, changed = () => {}) {
  const { id } = properties;
  const told = make("p", { id: `${id}-hint`, className: "hint" }, hint);
  const input = make("input", { ...properties, type: "file", accept: ".nii,.nii.gz,.gz,application/gzip", "aria-describedby": told.id });
  const remove = make("button", { type: "button", hidden: true, "aria-label": `Remove: ${label}` }, "Remove");
  input.addEventListener("change", () => {
    const file = input.files[0];
    const large = file && (file.size * 4) / 3 > most;
    input.setCustomValidity(large ? `A file of up to ${short((most * 3) / 4 / 2 ** 20)} MiB` : "");
    remove.hidden = !file;
    changed(file);
  });
  remove.addEventListener("click", () => {
    put(input, undefined);
    input.focus();
  });
  return make("div", { className: "field" }, make("label", { for: id }, label), make("div", { className: "file" }, input, remove), told);
}

/** Have the picker's `input` hold `file`, or nothing. */
export function put(input, file) {
  const holder = new DataTransfer();
  if (file) holder.items.add(file);
  input.files = holder.files;
  input.dispatchEvent(new Event("change"));
}

/** `value` with each File in it replaced by its content in base64. */
export async function packed(value) {
  if (value instanceof File) return base64(value);
  if (value === null || typeof value !== "object" || Array.isArray(value)) return value;
  const pairs = Object.entries(value).map(async ([name, one]) => [name, await packed(one)]);
  return Object.fromEntries(await Promise.all(pairs));
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read; choose it again`));
    reader.readAsDataURL(file);
  });
}
