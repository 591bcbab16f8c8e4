// One conversation: its turns, the images that wait for the next message, and the selected word.

import * as api from "./api.js";
import * as transcript from "./transcript.js";
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const viewer = new Viewer();

let model = null;
let turns = []; // { role, text, images }
let pending = []; // images: { id, url, picture, rows, columns, tokens, ... }
let running = null; // AbortController of the answer that is being written
let chosen = null; // { word, turns, span } of the attention that is shown
let nextId = 0;

start();

async function start() {
  try {
    model = await api.model();
  } catch (error) {
    showError(error);
    return;
  }
  $("model").textContent = `${model.id} · ${compact(model.parameters)} parameters`;
  $("length").max = model.limits.max_tokens;
  $("length").value = Math.min(256, model.limits.max_tokens);
  $("layer").replaceChildren(new Option("mean of all", ""));
  for (let layer = 0; layer < model.layers; layer++) $("layer").append(new Option(layer + 1, layer));
}

const compact = (count) =>
  new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(count);

const mebibytes = (bytes) => `${Number((bytes / 2 ** 20).toPrecision(3))} MiB`;

// --- API key ---

$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  api.setKey($("key").value.trim());
  $("key").value = "";
  $("locked").close();
  showError(null);
  start();
});

$("locked").addEventListener("cancel", () => {
  showError(new Error("this server needs an API key: press Send to enter it"));
});

// --- images ---

async function addFiles(files) {
  if (!model) return start();
  showError(null);
  for (const file of files) {
    try {
      const { max_image_bytes } = model.limits;
      if (file.size > max_image_bytes) throw new Error(`larger than the limit of ${mebibytes(max_image_bytes)}`);
      const url = await readAsDataUrl(file);
      const image = { id: nextId++, url, ...(await api.describeImage(url)) };
      pending.push(image);
      viewer.add(image);
    } catch (error) {
      showError(error, file.name);
    }
  }
  showPending();
}

function readAsDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("the browser cannot read this file"));
    reader.readAsDataURL(file);
  });
}

function showPending() {
  $("pending").hidden = !pending.length;
  $("pending").replaceChildren(...pending.map((image) => {
    const chip = document.createElement("span");
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "×", ariaLabel: "Remove this image" });
    remove.addEventListener("click", () => {
      pending = pending.filter((other) => other !== image);
      viewer.remove(image);
      showPending();
      $("prompt").focus();
    });
    chip.append(Object.assign(new Image(), { src: image.picture, alt: "Image for the next message" }), remove);
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
  if (!model) start();
  else if (text && !running) ask(text);
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
  const shown = transcript.addQuestion(question, (image) => viewer.show(image));
  const answer = transcript.addAnswer();
  pending = [];
  $("prompt").value = "";
  showError(null);
  showPending();
  setRunning(control);
  const reply = { sent: performance.now(), visionTokens: count(asked) };
  try {
    const settings = { max_tokens: $("length").valueAsNumber || 1, temperature: $("temperature").valueAsNumber || 0 };
    for await (const { choices: [choice], usage } of api.complete(asked, settings, control.signal)) {
      if (choice?.delta.content) {
        reply.first ??= performance.now();
        answer.grow(choice.delta.content);
      }
      if (choice?.finish_reason) Object.assign(reply, { finish: choice.finish_reason, last: performance.now() });
      if (usage) reply.usage = usage;
    }
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
  }
  if (control !== running) return; // a new chat has begun
  setRunning(null);
  const written = answer.text();
  if (written) {
    const upToHere = [...asked, { role: "assistant", text: written, images: [] }];
    turns = upToHere;
    answer.finish((word, span) => choose(word, upToHere, span));
    answer.addMetrics(reply.usage ? transcript.describe(reply) : "stopped");
    viewer.offerWords(upToHere.some((turn) => turn.images.length));
  } else {
    if (reply.finish) showError(new Error("the model gave an empty answer: ask in another way"));
    shown.remove();
    answer.turn.remove();
    $("prompt").value ||= text;
    pending = [...question.images, ...pending];
    showPending();
  }
}

const count = (asked) => asked.flatMap((turn) => turn.images).reduce((sum, image) => sum + image.tokens, 0);

function reset() {
  running?.abort();
  setRunning(null);
  turns = [];
  pending = [];
  chosen = null;
  transcript.clear();
  viewer.reset();
  viewer.offerWords(false);
  showError(null);
  showPending();
  $("prompt").focus();
}

function setRunning(control) {
  running = control;
  $("send").hidden = control !== null;
  $("stop").hidden = control === null;
}

// --- attention ---

async function choose(word, upToHere, span, layer = null) {
  unmark();
  const choice = { word, turns: upToHere, span };
  chosen = choice;
  word.ariaBusy = "true";
  showError(null);
  try {
    const maps = await api.attention(upToHere, { ...span, layer });
    if (chosen !== choice) return;
    word.ariaPressed = "true";
    viewer.showAttention(word.textContent, layer, maps, upToHere.flatMap((turn) => turn.images));
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

$("clear").addEventListener("click", () => {
  const word = chosen?.word;
  hideAttention();
  word?.focus();
});
$("layer").addEventListener("change", () => {
  const layer = $("layer").value === "" ? null : Number($("layer").value);
  if (chosen) choose(chosen.word, chosen.turns, chosen.span, layer);
});

// --- errors ---

function showError(error, subject) {
  $("error").hidden = !error;
  if (!error) return;
  $("error").textContent = subject ? `${subject}: ${error.message}` : error.message;
  if (!(error instanceof api.KeyError)) return;
  $("error").hidden = true;
  $("refused").hidden = !api.hasKey();
  if (!$("locked").open) $("locked").showModal();
}
