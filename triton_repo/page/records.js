// The volumes of this session: look again, download, repeat.

import { $, make } from "./dom.js";
import { describe } from "./request.js";

const MOST = 12;
/** Volumes kept in the browser's memory. */

/** Add a volume to the list. `record`: `{model, body, seed, blob}`; `again(record, what)`: "show" or "repeat". */
export function add(record, again) {
  record.href = URL.createObjectURL(record.blob);
  const weight = record.body.guidance === undefined ? "" : `_guidance-${record.body.guidance}`;
  record.name = `${record.model}_seed-${record.seed}_steps-${record.body.steps}${weight}.nii.gz`;
  const seed = `seed ${record.seed}`;
  const button = (text, what) => {
    const made = make("button", { type: "button", "aria-label": `${text}: ${seed}` }, text);
    made.addEventListener("click", () => again(record, what));
    return made;
  };
  const download = make("a", { className: "button", "aria-label": `Download: ${seed}` }, "Download");
  link(download, record);
  const item = make(
    "li", {},
    make("div", {}, make("p", {}, "Seed ", make("code", {}, record.seed)), make("p", { className: "hint" }, describe(record.body))),
    make("div", { className: "actions" }, button("Show", "show"), download, button("Repeat", "repeat")),
  );
  item.addEventListener("forget", () => URL.revokeObjectURL(record.href));
  $("records").prepend(item);
  while ($("records").children.length > MOST) {
    $("records").lastElementChild.dispatchEvent(new Event("forget"));
    $("records").lastElementChild.remove();
  }
  $("session").hidden = false;
}

/** Make `anchor` download `record`'s file. */
export function link(anchor, record) {
  anchor.href = record.href;
  anchor.download = record.name;
}
