// The canvas: NiiVue, its view and its sliders. Without WebGL2 there is no viewer, and `open` says so.

import { $, short } from "./dom.js";

const AXES = ["x", "y", "z"];

export class Viewer {
  #niivue;
  #library;
  #wanted = null;
  #drawing = null;

  /** A viewer on the page's canvas. Throws an Error if the browser has no WebGL2. */
  static async open() {
    if (!document.createElement("canvas").getContext("webgl2")) throw new Error("no WebGL2");
    const viewer = new Viewer();
    viewer.#library = await import("./niivue.js");
    viewer.#niivue = new viewer.#library.Niivue({
      backColor: [0, 0, 0, 1],
      clipPlaneColor: [0, 0, 0, 0],
      crosshairColor: [0.36, 0.76, 0.87, 0.9],
      crosshairWidth: 0.12,
      dragAndDropEnabled: false,
      isCornerOrientationText: true,
      // The wheel scrolls the page until the canvas is clicked.
      scrollRequiresFocus: true,
      fontColor: [0.2, 0.62, 0.78, 1],
      loadingText: "",
      logLevel: "error",
      multiplanarPadPixels: 6,
      clipPlaneHotKey: "",
      cycleClipPlaneHotKey: "",
      viewModeHotKey: "",
    });
    await viewer.#niivue.attachToCanvas($("canvas"));
    // The sliders do for the keyboard what the mouse does on the canvas.
    $("canvas").tabIndex = -1;
    viewer.#listen();
    viewer.layout($("layouts").querySelector(":checked").value);
    return viewer;
  }

  /** Show the `.nii.gz` in `blob`. Of several that come faster than they are drawn, the last is. */
  show(blob) {
    this.#wanted = blob;
    this.#drawing ??= this.#draw().finally(() => (this.#drawing = null));
    return this.#drawing;
  }

  /** "planes", "render" or "both". */
  layout(name) {
    const { SLICE_TYPE, SHOW_RENDER, MULTIPLANAR_TYPE } = this.#library;
    const both = name === "both";
    this.#niivue.opts.multiplanarShowRender = both ? SHOW_RENDER.ALWAYS : SHOW_RENDER.NEVER;
    this.#niivue.opts.multiplanarLayout = both ? MULTIPLANAR_TYPE.GRID : MULTIPLANAR_TYPE.AUTO;
    this.#niivue.setSliceType(name === "render" ? SLICE_TYPE.RENDER : SLICE_TYPE.MULTIPLANAR);
    for (const field of $("sliders").children) field.hidden = !both && field.dataset.layout !== name;
  }

  async #draw() {
    while (this.#wanted) {
      const buffer = await this.#wanted.arrayBuffer();
      this.#wanted = null;
      const name = "volume.nii.gz";
      const image = await this.#library.NVImage.loadFromUrl({ url: name, name, buffer });
      const before = this.#niivue.volumes[0];
      this.#niivue.addVolume(image);
      if (before) this.#niivue.removeVolume(before);
      else this.#ready();
      this.#niivue.createOnLocationChange();
    }
  }

  #ready() {
    for (const slider of $("sliders").querySelectorAll("input")) slider.disabled = false;
    this.#niivue.setRenderAzimuthElevation(120, 15);
    this.#niivue.setScale(0.9);
  }

  #listen() {
    this.#niivue.onLocationChange = (place) => {
      const at = AXES.map((axis, i) => `${axis} ${place.mm[i].toFixed(1)}`).join(", ");
      $("place").textContent = `At ${at} mm: value ${short(place.values[0].value)}`;
      this.#follow();
    };
    this.#niivue.onAzimuthElevationChange = () => this.#follow();
    AXES.forEach((id, axis) => {
      $(id).addEventListener("input", () => {
        const step = [0, 0, 0];
        step[axis] = Number($(id).value) - this.#voxel()[axis];
        this.#niivue.moveCrosshairInVox(...step);
      });
    });
    for (const id of ["azimuth", "elevation"]) {
      $(id).addEventListener("input", () => {
        this.#niivue.setRenderAzimuthElevation(Number($("azimuth").value), Number($("elevation").value));
      });
    }
    $("cut").addEventListener("input", () => this.#cut());
  }

  /** Cut the volume open in 3D, from the side that one sees. */
  #cut() {
    const share = Number($("cut").value) / 100;
    const { renderAzimuth, renderElevation } = this.#niivue.scene;
    this.#niivue.setClipPlane(share ? [0.6 - share, renderAzimuth + 180, renderElevation] : [2, 0, 0]);
    $("cut").setAttribute("aria-valuetext", share ? `${Math.round(100 * share)} percent` : "none");
  }

  #voxel() {
    return this.#niivue.frac2vox(this.#niivue.scene.crosshairPos);
  }

  /** Set the sliders to what the canvas shows. */
  #follow() {
    const [image] = this.#niivue.volumes;
    if (!image) return;
    const voxel = this.#voxel();
    const millimetres = this.#niivue.frac2mm(this.#niivue.scene.crosshairPos);
    AXES.forEach((id, axis) => {
      $(id).min = 0;
      $(id).max = image.dimsRAS[axis + 1] - 1;
      $(id).value = Math.round(voxel[axis]);
      $(id).setAttribute("aria-valuetext", `${millimetres[axis].toFixed(1)} mm`);
    });
    const { renderAzimuth, renderElevation } = this.#niivue.scene;
    $("azimuth").value = ((renderAzimuth % 360) + 360) % 360;
    $("elevation").value = renderElevation;
    for (const id of ["azimuth", "elevation"]) $(id).setAttribute("aria-valuetext", `${$(id).value} degrees`);
  }
}
