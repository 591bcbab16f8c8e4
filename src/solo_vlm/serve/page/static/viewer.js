// The image as the model sees it, with its patch grid, and the attention of a word as a heat map.

import { inOneLine } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;

// Dark to bright. The picture is multiplied by it, so the dark end is not black.
const RAMP = [[62, 62, 104], [122, 70, 128], [198, 88, 108], [247, 146, 76], [255, 236, 140]];

export class Viewer {
  #images = [];
  #shown = null; // an image
  #maps = null; // image -> { weights, share }

  constructor() {
    $("grid").addEventListener("change", () => this.#draw());
    new ResizeObserver(() => this.#draw()).observe($("frame"));
    drawRamp($("ramp"));
  }

  add(image) {
    this.#images.push(image);
    this.show(image);
  }

  remove(image) {
    this.#images = this.#images.filter((other) => other !== image);
    this.show(this.#images.includes(this.#shown) ? this.#shown : this.#images.at(-1));
  }

  reset() {
    this.#images = [];
    this.clearAttention();
    this.show(undefined);
  }

  show(image) {
    this.#shown = image ?? null;
    $("drop").hidden = this.#shown !== null;
    $("seen").hidden = this.#shown === null;
    if (this.#shown) {
      const { picture, original, resized, rows, columns, patches, tokens } = this.#shown;
      $("picture").src = picture;
      $("frame").style.setProperty("--aspect", columns / rows);
      const size = original.join(" × ");
      const seen = resized.join(" × ");
      $("layout").textContent = inOneLine([
        `${size} pixels`,
        ...(size === seen ? [] : [`seen as ${seen}`]),
        `${rows} × ${columns} = ${patches} ${patches === 1 ? "patch" : "patches"}`,
        `${tokens} tokens`,
      ]);
    }
    this.#update();
  }

  // The response of /api/attention, for the images of the chat.
  showAttention(word, layer, { images: maps, text_share }, images) {
    this.#maps = new Map(maps.map((map, index) => [images[index], map]));
    if (!this.#maps.has(this.#shown)) this.show(images.at(-1));
    $("word").textContent = word;
    $("share").textContent = `${percent(1 - text_share)} of its attention on patches, ${percent(text_share)} on text`;
    $("layer").value = layer ?? "";
    $("attention").hidden = false;
    this.#update();
  }

  clearAttention() {
    this.#maps = null;
    $("attention").hidden = true;
    this.#update();
  }

  offerWords(offer) {
    $("hint").hidden = !offer;
  }

  #update() {
    const several = this.#images.length > 1;
    $("thumbnails").hidden = !several;
    $("thumbnails").replaceChildren(...(several ? this.#images.map((image, index) => this.#thumbnail(image, index)) : []));
    $("picture").classList.toggle("gray", this.#map() !== undefined);
    this.#draw();
  }

  #thumbnail(image, index) {
    const button = document.createElement("button");
    const picture = Object.assign(new Image(), { src: image.picture, alt: `Image ${index + 1}` });
    const share = this.#maps?.get(image)?.share;
    button.type = "button";
    button.ariaPressed = image === this.#shown;
    button.append(picture, share === undefined ? "" : percent(share));
    button.addEventListener("click", () => this.show(image));
    return button;
  }

  #map() {
    return this.#maps?.get(this.#shown);
  }

  #draw() {
    const { width, height } = $("frame").getBoundingClientRect();
    if (!this.#shown || !width) return;
    const { rows, columns } = this.#shown;
    const cell = (scale, count, index) => Math.round((scale * devicePixelRatio * index) / count);
    const x = (column) => cell(width, columns, column);
    const y = (row) => cell(height, rows, row);
    const heat = cleared($("heat"), x(columns), y(rows));
    const lines = cleared($("lines"), x(columns), y(rows));
    const map = this.#map();
    if (map) {
      const peak = Math.max(...[...this.#maps.values()].flatMap(({ weights }) => weights));
      $("peak").textContent = `${percent(peak)} on one patch`;
      map.weights.forEach((weight, index) => {
        const [row, column] = [Math.floor(index / columns), index % columns];
        heat.fillStyle = color(weight / peak);
        heat.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
      });
    }
    if (!$("grid").checked) return;
    for (const [offset, style] of [[0, "rgb(255 255 255 / .7)"], [1, "rgb(0 0 0 / .35)"]]) {
      lines.fillStyle = style;
      for (let column = 1; column < columns; column++) lines.fillRect(x(column) + offset, 0, 1, y(rows));
      for (let row = 1; row < rows; row++) lines.fillRect(0, y(row) + offset, x(columns), 1);
    }
  }
}

// Setting its size clears a canvas.
function cleared(canvas, width, height) {
  Object.assign(canvas, { width, height });
  return canvas.getContext("2d");
}

function color(value) {
  const place = Math.min(Math.max(value || 0, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  const mixed = RAMP[low].map((from, channel) => from + (RAMP[low + 1][channel] - from) * (place - low));
  return `rgb(${mixed.map(Math.round).join(" ")})`;
}

function drawRamp(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = color(x / (canvas.width - 1));
    context.fillRect(x, 0, 1, 1);
  }
}
