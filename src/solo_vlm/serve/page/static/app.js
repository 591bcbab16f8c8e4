// One conversation: its turns, the images that wait for the next message, and what is chosen.

import * as server from "./server.js";
import * as transcript from "./transcript.js";
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const viewer = new Viewer();

let limits = null; // of the server
let turns = []; // { role, text, images }
let pending = []; // ids
let running = null; // AbortController of the answer that is being written
let chosen = null; // { word, question } of the attention that is shown

start();

async function start() {
  try {
    const model = await server.model();
    limits = model.limits;
    $("model").textContent = `${model.name} · ${compact(model.parameters)} parameters`;
    $("length").max = limits.new_tokens;
    $("length").value = Math.min(256, limits.new_tokens);
    $("layer").append(new Option("mean of all", ""));
    for (let layer = 0; layer < model.layers; layer++) $("layer").append(new Option(layer + 1, layer));
  } catch (error) {
    showError(error);
  }
}

const compact = (count) =>
  new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(count);

const mebibytes = (bytes) => `${Number((bytes / 2 ** 20).toPrecision(3))} MiB`;

// --- images ---

async function addFiles(files) {
  showError(null);
  for (const file of files) {
    try {
      // The server would refuse it too, but a browser does not always wait to hear why.
      if (file.size > limits.image_bytes) throw new Error(`larger than the limit of ${mebibytes(limits.image_bytes)}`);
      const image = await server.addImage(file);
      pending.push(image.id);
      viewer.add(image);
    } catch (error) {
      showError(error, file.name);
    }
  }
  showPending();
}

function showPending() {
  $("pending").hidden = !pending.length;
  $("pending").replaceChildren(...pending.map((id) => {
    const chip = document.createElement("span");
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "×", ariaLabel: "Remove this image" });
    remove.addEventListener("click", () => {
      pending = pending.filter((other) => other !== id);
      viewer.remove(id);
      server.removeImage(id).catch(showError);
      showPending();
    });
    chip.append(Object.assign(new Image(), { src: server.imageUrl(id), alt: "Image for the next message" }), remove);
    return chip;
  }));
}

$("file").addEventListener("change", () => {
  addFiles([...$("file").files]);
  $("file").value = "";
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) addFiles([...event.clipboardData.files]);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  addFiles([...event.dataTransfer.files]);
});

// --- chat ---

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (text && !running) ask(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("reset").addEventListener("click", reset);

async function ask(text) {
  const control = new AbortController();
  const question = { role: "user", text, images: pending };
  const asked = [...turns, question];
  const shown = transcript.addQuestion(question, (id) => viewer.show(id));
  const answer = transcript.addAnswer();
  pending = [];
  $("prompt").value = "";
  showError(null);
  showPending();
  setRunning(control);
  let reply = null;
  try {
    const settings = { max_new_tokens: $("length").valueAsNumber || 1, temperature: $("temperature").valueAsNumber || 0 };
    for await (const event of server.answer({ turns: asked, ...settings }, control.signal)) {
      if (event.event === "begin") answer.begin();
      else if (event.event === "text") answer.grow(event.text);
      else reply = event;
    }
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
  }
  if (control !== running) return; // a new chat has begun
  setRunning(null);
  const written = reply?.answer ?? answer.text();
  if (written) {
    turns = [...asked, { role: "assistant", text: written, images: [] }];
    const upToHere = turns;
    answer.finish(written, (word, span) => choose(word, { turns: upToHere, ...span }));
    answer.addFigures(reply ? transcript.describe(reply) : "stopped");
    viewer.offerWords(upToHere.some((turn) => turn.images.length));
  } else {
    if (reply) showError(new Error("the model gave an empty answer: ask in another way"));
    shown.remove();
    answer.turn.remove();
    $("prompt").value ||= text;
    pending = [...question.images, ...pending];
    showPending();
  }
}

function reset() {
  running?.abort();
  setRunning(null);
  turns = [];
  pending = [];
  chosen = null;
  transcript.clear();
  const ids = viewer.reset();
  viewer.offerWords(false);
  showError(null);
  showPending();
  Promise.all(ids.map(server.removeImage)).catch(showError);
  $("prompt").focus();
}

function setRunning(control) {
  running = control;
  $("send").hidden = control !== null;
  $("stop").hidden = control === null;
}

// --- attention ---

async function choose(word, question, layer = null) {
  unmark();
  const choice = { word, question };
  chosen = choice;
  word.ariaBusy = "true";
  showError(null);
  try {
    const maps = await server.attention({ ...question, layer });
    if (chosen !== choice) return;
    const ids = question.turns.flatMap((turn) => turn.images);
    word.ariaPressed = "true";
    viewer.showAttention(word.textContent, layer, maps, ids);
    viewer.offerWords(false);
  } catch (error) {
    if (chosen === choice) hideAttention();
    showError(error);
  } finally {
    word.ariaBusy = "false";
  }
}

function hideAttention() {
  unmark();
  chosen = null;
  viewer.clearAttention();
}

function unmark() {
  if (chosen) chosen.word.ariaPressed = "false";
}

$("clear").addEventListener("click", hideAttention);
$("layer").addEventListener("change", () => {
  const layer = $("layer").value === "" ? null : Number($("layer").value);
  if (chosen) choose(chosen.word, chosen.question, layer);
});

// --- errors ---

function showError(error, subject) {
  $("error").hidden = !error;
  if (error) $("error").textContent = subject ? `${subject}: ${error.message}` : error.message;
}
