// The form: what a model can be asked, and what the user asks.

import { $, make, plain, short } from "./dom.js";
import { picker, put } from "./files.js";

const MOST_SEED = 2n ** 64n - 1n;
const STRENGTH = 0.5;
/** Unless another is given: the server's own, 1, would leave nothing of an image. */

const PARTS = { condition: "conditions", negative: "negative" };
/** What of the body is conditions, and where in the form they are. */

const CHOICE = ["temperature", "top_k", "top_p"];
/** How a token model draws tokens. */

/** Fill the form for `model`, an entry of `GET /v1/models`. */
export function show(model) {
  const { shape, spacing_mm: spacing } = model.volume;
  const grid = `${shape.join(" × ")} voxels of ${spacing.map(short).join(" × ")} mm`;
  $("model-hint").textContent = [model.description, grid].filter(Boolean).join("\n");
  const { limits } = model;
  // A model has the settings that it has limits of.
  for (const id of ["denoising", "more"]) offer($(id), limits.steps);
  for (const element of [$("choice"), $("choice-hint")]) offer(element, limits.temperature);
  for (const name of CHOICE.filter((name) => limits[name])) {
    limit($(name), limits[name]);
    $(name).value = "";
    $(name).placeholder = model.default[name] ?? "all";
  }
  if (limits.steps) {
    limit($("steps"), limits.steps);
    $("steps").value = model.default.steps;
    $("steps-hint").textContent = limits.steps.join(" to ");
  }
  $("scheduler").replaceChildren(...model.schedulers.map((name) => new Option(name, name)));
  $("scheduler").value = model.default.scheduler ?? "";
  $("guidance-field").hidden = !model.guidance;
  $("guidance").value = "";
  $("conditions").replaceChildren(...model.conditions.map((one) => condition(one, model.limits)));
  $("negative").replaceChildren(...(model.guidance ? model.conditions.map((one) => condition(one, model.limits, "negative")) : []));
  $("start").replaceChildren(...(model.image ? [start(model)] : []));
  $("size").disabled = false;
  const axes = (model.default.size ?? []).map((size, axis) => {
    const label = `Axis ${axis + 1}`;
    const { minimum: min, maximum: max, multiple: step } = model.limits.size[axis];
    const input = make("input", { id: `size-${axis}`, type: "number", min, max, step, placeholder: size });
    return make("div", { className: "field" }, make("label", { for: input.id }, label), input);
  });
  $("size").replaceChildren($("size").firstElementChild, make("div", { className: "triple" }, ...axes));
}

/** The body of `POST .../generate`, with Files where it has files. Null, with the field marked and focused, if a field is wrong. */
export function read(model) {
  const form = $("request");
  const seed = $("seed").value.trim();
  const right = seed === "" || (/^\d+$/.test(seed) && BigInt(seed) <= MOST_SEED);
  $("seed").setCustomValidity(right ? "" : `A whole number from 0 to ${MOST_SEED}, or nothing`);
  const weights = $("guidance").value.trim() ? $("guidance").value.split(",").map((text) => (text.trim() ? Number(text) : NaN)) : [];
  const [low, high] = model.limits.guidance ?? [];
  const weighed = weights.every((weight) => weight >= low && weight <= high);
  $("guidance").setCustomValidity(weighed ? "" : `A number from ${low} to ${high}, several with commas between, or nothing`);
  const wrong = form.querySelector("input:invalid, textarea:invalid");
  if (wrong?.closest("details")) wrong.closest("details").open = true;
  if (!form.reportValidity()) return null;

  const steps = Number($("steps").value);
  const body = { progress_every: 1 };
  if (model.limits.steps) Object.assign(body, { steps, scheduler: $("scheduler").value });
  for (const name of CHOICE.filter((name) => model.limits[name] && $(name).value)) body[name] = Number($(name).value);
  if (seed) body.seed = seed;
  if (model.guidance && weights.length) body.guidance = weights.length > 1 ? weights : weights[0];
  const previews = Number($("previews").value);
  if (model.limits.previews && previews && weights.length < 2) body.preview_every = Math.max(1, Math.ceil(steps / (previews + 1)));
  const image = $("image")?.files[0];
  if (image) body.image = image;
  if (image && $("field-strength")) body.strength = Number($("field-strength").value) || STRENGTH;
  const mask = $("inpaint")?.files[0];
  if (mask) body.inpaint = { mask };
  const sizes = (model.default.size ?? []).map((size, axis) => Number($(`size-${axis}`).value) || size);
  if (!image && sizes.some((size, axis) => size !== model.default.size[axis])) body.size = sizes;
  const value = (input) => (input.type === "file" ? input.files[0] : JSON.parse(input.value));
  for (const part of Object.keys(PARTS)) {
    const given = inputs(part).filter((input) => input.value.trim());
    if (given.length) body[part] = Object.fromEntries(given.map((input) => [input.dataset[part], value(input)]));
  }
  return body;
}

/** Fill the form with an earlier `body` and its `seed`. */
export function repeat(body, seed) {
  for (const name of ["steps", "scheduler", ...CHOICE]) $(name).value = body[name] ?? "";
  $("guidance").value = [body.guidance ?? ""].flat().join(", ");
  $("seed").value = seed;
  for (const input of $("size").querySelectorAll("input")) input.value = "";
  (body.size ?? []).forEach((size, axis) => ($(`size-${axis}`).value = size));
  for (const part of Object.keys(PARTS)) {
    for (const input of inputs(part)) {
      const value = body[part]?.[input.dataset[part]];
      if (input.type === "file") put(input, value);
      else {
        input.value = value === undefined ? "" : JSON.stringify(value);
        input.dispatchEvent(new Event("input"));
      }
    }
  }
  $("negative-field").open = body.negative !== undefined;
  if ($("image")) put($("image"), body.image);
  if ($("field-strength")) {
    put($("inpaint"), body.inpaint?.mask);
    $("field-strength").value = body.strength ?? "";
    $("field-strength").dispatchEvent(new Event("input"));
  }
}

/** "25 steps, ddim, anterior 0.2": what was asked, in words. */
export function describe(body) {
  const words = body.steps ? [`${body.steps} steps`, body.scheduler] : [];
  for (const name of CHOICE.filter((name) => name in body)) words.push(`${plain(name)} ${short(body[name])}`);
  if (body.guidance !== undefined) words.push(`guidance ${[body.guidance].flat().map(short).join(", ")}`);
  const how = body.strength === undefined ? "in its style" : `with strength ${short(body.strength)}`;
  if (body.image) words.push(`from ${body.image.name} ${how}`);
  if (body.inpaint) words.push(`painted anew by ${body.inpaint.mask.name}`);
  for (const part of Object.keys(PARTS)) {
    for (const [name, value] of Object.entries(body[part] ?? {})) {
      words.push(`${called(name, part)} ${typeof value === "number" ? short(value) : (value.name ?? "given")}`);
    }
  }
  if (body.size) words.push(`latent ${body.size.join(" × ")}`);
  return words.join(", ") || "nothing but the seed";
}

const inputs = (part) => [...$(PARTS[part]).querySelectorAll(`[data-${part}]`)];

/** The name of a condition, or field, of a part. */
const called = (name, part) => (part === "negative" ? `negative ${plain(name)}` : plain(name));

/** One condition's group; a negative one is never required. */
function condition(given, limits, part = "condition") {
  const one = { ...given, required: given.required && part === "condition" };
  const group = make("fieldset", {}, make("legend", {}, one.description || plain(one.name)));
  const whole = one.file ? file : numbers;
  group.append(...(one.fields.length ? one.fields.map((field) => number(field, part)) : [whole(one, part, limits)]));
  return group;
}

/** An image to start from, and how far it is noised; of a model that has no such strength, one whose style to take. */
function start({ limits, volume }) {
  if (!limits.strength) {
    const hint = `NIfTI, of ${volume.shape.join(" × ")} voxels; the volume has its style`;
    const style = picker({ id: "image", label: "Image", hint, most: limits.file_bytes });
    return make("fieldset", {}, make("legend", {}, "Style of an image"), style);
  }
  const description = "how far it is noised; 1 leaves nothing of it";
  const strength = number({ name: "strength", low: 0.01, high: 1, step: 0.01, default: STRENGTH, description });
  const hint = `NIfTI, of ${volume.shape.join(" × ")} voxels or another size that the model takes; the volume lies where it does`;
  const kept = "NIfTI on the image's grid, not 0 where to paint anew; the rest stays. With ddim, ddpm and rflow";
  const mask = picker({ id: "inpaint", label: "Paint anew", hint: kept, most: limits.file_bytes }, (chosen) => {
    if (!chosen || $("field-strength").value) return;
    $("field-strength").value = 1; // from pure noise, unless something else is asked for
    $("field-strength").dispatchEvent(new Event("input"));
  });
  const image = picker({ id: "image", label: "Image", hint, most: limits.file_bytes }, (chosen) => {
    strength.hidden = mask.hidden = !chosen;
    if (!chosen) put($("inpaint"), undefined);
    $("size").disabled = Boolean(chosen); // it follows from the image
  });
  strength.hidden = mask.hidden = true;
  return make("fieldset", {}, make("legend", {}, "Start from an image"), image, mask, strength);
}

/** A condition that is a volume: a label map, or an image. */
function file(one, part, limits) {
  const labels = one.labels.map((label, value) => `${value} ${label}`).join(", ");
  const hint = `NIfTI on the model's grid${labels && `: ${labels}`}`;
  const properties = { id: `${part}-${one.name}`, label: called(one.name, part), required: one.required, [`data-${part}`]: one.name };
  return picker({ ...properties, hint, most: limits.file_bytes });
}

function number(field, part = "condition") {
  const id = `${part === "negative" ? "negative-" : ""}field-${field.name}`;
  const hint = make("p", { id: `${id}-hint`, className: "hint" });
  hint.textContent = [`${short(field.low)} to ${short(field.high)}`, field.description].filter(Boolean).join("; ");
  const fixed = typeof field.default === "number";
  const input = make("input", {
    id, type: "number", step: "any", min: field.low, max: field.high,
    placeholder: fixed ? short(field.default) : "default", "aria-describedby": hint.id, [`data-${part}`]: field.name,
  });
  const slider = make("input", {
    type: "range", min: field.low, max: field.high, step: field.step ?? (field.high - field.low) / 100,
    "aria-label": `${called(field.name, part)}, slider`,
  });
  const middle = fixed ? field.default : (field.low + field.high) / 2;
  const follow = () => {
    slider.value = input.value === "" ? middle : input.value;
    slider.classList.toggle("unset", input.value === "");
    slider.setAttribute("aria-valuetext", input.value === "" ? "default" : short(slider.value));
  };
  input.addEventListener("input", follow);
  slider.addEventListener("input", () => {
    input.value = short(slider.value);
    follow();
  });
  follow();
  const label = make("label", { for: id }, called(field.name, part));
  return make("div", { className: "field ranged" }, label, slider, input, hint);
}

/** A condition without fields takes its whole array. */
function numbers(one, part) {
  const id = `${part}-${one.name}`;
  const hint = make("p", { id: `${id}-hint`, className: "hint" }, `A number or nested lists, shape ${one.shape.join(" × ") || "of one number"}`);
  const input = make("textarea", { id, rows: 2, spellcheck: false, required: one.required, "aria-describedby": hint.id, [`data-${part}`]: one.name });
  input.addEventListener("input", () => {
    let right = true;
    try {
      JSON.parse(input.value || "0");
    } catch {
      right = false;
    }
    input.setCustomValidity(right ? "" : "A number, or lists of numbers in brackets: [[0.1, 0.2]]");
  });
  return make("div", { className: "field" }, make("label", { for: id }, called(one.name, part)), input, hint);
}

/** Show an element with what it holds, or hide it so that nothing in it is asked for. */
function offer(element, offered) {
  element.hidden = !offered;
  for (const input of element.querySelectorAll("input, select")) input.disabled = !offered;
}

function limit(input, [low, high]) {
  input.min = low;
  input.max = high;
}
