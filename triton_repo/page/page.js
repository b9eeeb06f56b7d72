// The page of volcast's gateway: a request, its progress, its volume.

import * as api from "./api.js";
import { $, make, short } from "./dom.js";
import * as records from "./records.js";
import * as request from "./request.js";
import * as trouble from "./trouble.js";
import { Viewer } from "./viewer.js";

const viewer = openViewer();
let models = [];
let run = null;

const model = () => models.find((one) => one.name === $("model").value);

/** What everybody sees, and, where `aloud`, what a screen reader says too. */
function tell(text, aloud = true) {
  $("state").textContent = text;
  if (aloud) $("news").textContent = text;
}

async function listModels() {
  trouble.clear();
  $("generate").disabled = true;
  try {
    models = await api.models();
    $("model").replaceChildren(...models.map(({ name }) => new Option(name, name)));
    chooseModel();
    $("generate").disabled = false;
    tell("Ready");
  } catch (error) {
    tell("No model yet");
    if (error.code === "unauthorized") $("key-form").hidden = false;
    trouble.show(error);
  }
}

function chooseModel() {
  request.show(model());
}

async function generate() {
  if (run) return;
  const body = request.read(model());
  if (!body) return;
  trouble.clear();
  run = new AbortController();
  $("generate").setAttribute("aria-disabled", "true");
  $("cancel").disabled = false;
  $("bar").removeAttribute("value");
  clearFrames();
  tell("Waiting for the server");
  // Where the form stands above the volume, bring the progress into view.
  if (matchMedia("(max-width: 60rem)").matches) $("progress").scrollIntoView();
  const began = performance.now();
  try {
    await follow(body, began);
  } catch (error) {
    $("bar").value = 0;
    if (error.name === "AbortError") tell("Cancelled");
    else {
      tell("Stopped by an error");
      trouble.show(error);
    }
  } finally {
    if (document.activeElement === $("cancel")) $("generate").focus();
    $("cancel").disabled = true;
    $("generate").removeAttribute("aria-disabled");
    run = null;
  }
}

async function follow(body, began) {
  const name = model().name;
  const { signal } = run;
  const volumes = [body.guidance].flat().length; // a sweep has one a weight
  const taken = {};
  for await (const { event, data } of api.generate(name, body, signal)) {
    if (event === "progress") {
      taken[data.sample] = data.step;
      const steps = Object.values(taken).reduce((sum, step) => sum + step, 0);
      const all = volumes * data.steps;
      $("bar").value = steps / all;
      tell(steps < all ? `Step ${steps} of ${all}` : "Decoding", false);
    } else if (event === "preview") {
      await preview(data, signal);
    } else if (event === "volume") {
      tell("Fetching the volume", false);
      const asked = data.guidance === undefined ? body : { ...body, guidance: data.guidance };
      const record = { model: name, body: asked, seed: String(data.seed), shape: data.shape, affine: data.affine };
      record.blob = await api.volume(data.url, signal);
      record.seconds = (performance.now() - began) / 1000;
      records.add(record, again);
      addFrame("final", record.blob, data.guidance);
      present(record);
    }
  }
  $("bar").value = 1;
  tell(`Done in ${((performance.now() - began) / 1000).toFixed(1)} s`);
}

async function preview({ url, step, steps }, signal) {
  try {
    addFrame(String(step), await api.volume(url, signal));
    $("news").textContent = `Preview after step ${step} of ${steps}`;
  } catch (error) {
    // Under load the gateway lets previews go first; the volume will come.
    if (error.code !== "not_found") throw error;
  }
}

/** Show a frame, and a choice by which to come back to it; `weight`: of guidance, in a sweep. */
function addFrame(label, blob, weight) {
  const input = make("input", { type: "radio", name: "frame", value: label, checked: true });
  const shown = label === "final" ? "Generated volume" : `Preview after step ${label}`;
  input.addEventListener("change", () => draw(blob, shown));
  $("frames").append(make("label", {}, input, make("span", {}, weight === undefined ? label : `w ${short(weight)}`)));
  $("frames").hidden = false;
  draw(blob, shown);
}

/** Make room for another run or volume; earlier ones stay in the list of this session. */
function clearFrames() {
  for (const id of ["frames", "download", "facts"]) $(id).hidden = true;
  $("frames").replaceChildren($("frames").firstElementChild);
}

async function draw(blob, label) {
  try {
    const opened = await viewer;
    if (!opened) return;
    $("empty").hidden = true;
    $("canvas").setAttribute("aria-label", label);
    await opened.show(blob);
  } catch (error) {
    trouble.show(error);
  }
}

/** A finished volume's file and facts. */
function present(record) {
  records.link($("download"), record);
  $("download").hidden = false;
  const voxel = [0, 1, 2].map((axis) => Math.hypot(...record.affine.slice(0, 3).map((row) => row[axis])));
  const facts = {
    Seed: record.seed,
    Asked: request.describe(record.body),
    Voxels: `${record.shape.join(" × ")} of ${voxel.map((size) => Number(size.toFixed(3))).join(" × ")} mm`,
    File: `${(record.blob.size / 1024).toFixed(0)} KiB, ${record.name}`,
  };
  $("facts").replaceChildren(
    ...Object.entries(facts).map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text))),
  );
  $("facts").hidden = false;
}

function again(record, what) {
  if (what === "repeat") {
    if (models.some(({ name }) => name === record.model)) $("model").value = record.model;
    chooseModel();
    request.repeat(record.body, record.seed);
    $("generate").focus();
    $("news").textContent = `The form holds the settings of seed ${record.seed}`;
  } else {
    // A run under way keeps its frames, and its next one is shown.
    if (run) for (const input of $("frames").querySelectorAll("input")) input.checked = false;
    else clearFrames();
    draw(record.blob, `Generated volume, seed ${record.seed}`);
    present(record);
    $("volume").focus();
  }
}

/** The viewer, or null and words in its place. */
async function openViewer() {
  try {
    return await Viewer.open();
  } catch (error) {
    for (const id of ["canvas", "sliders", "layouts"]) $(id).hidden = true;
    $("screen").classList.add("low");
    $("empty").textContent =
      `This browser cannot show volumes here (${error.message}). Generating and downloading work all the same.`;
    return null;
  }
}

$("key").value = api.key.get();
$("key-form").hidden = !api.key.get();
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key.set($("key").value.trim());
  listModels();
});
$("model").addEventListener("change", chooseModel);
$("request").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("cancel").addEventListener("click", () => run?.abort());
$("layouts").addEventListener("change", async (event) => (await viewer)?.layout(event.target.value));
listModels();
