// The turns of the chat. A finished answer is made of words that can be chosen.

import { imageUrl } from "./server.js";
import { inOneLine } from "./text.js";

const log = document.getElementById("transcript");
const segmenter = new Intl.Segmenter(undefined, { granularity: "word" });

export function clear() {
  log.replaceChildren();
}

export function addQuestion({ text, images }, onImage) {
  const turn = addTurn("user", text);
  if (!images.length) return turn;
  const row = Object.assign(document.createElement("div"), { className: "images" });
  for (const [index, id] of images.entries()) {
    const picture = Object.assign(new Image(), { src: imageUrl(id), alt: `Image ${index + 1} of this message` });
    picture.addEventListener("click", () => onImage(id));
    row.append(picture);
  }
  turn.prepend(row);
  return turn;
}

// An answer that is still to come: grow it, then finish it.
export function addAnswer() {
  const turn = addTurn("assistant", "Waiting …");
  const paragraph = turn.querySelector("p");
  turn.classList.add("waiting");
  let text = "";
  return {
    turn,
    begin: () => { paragraph.textContent = "Reading …"; },
    grow(piece) {
      turn.classList.remove("waiting");
      text += piece;
      paragraph.textContent = text;
      scrollToEnd();
    },
    text: () => text.trim(),
    finish(answer, onWord) {
      turn.classList.remove("waiting");
      paragraph.replaceChildren(...words(answer, onWord));
    },
    addFigures(figures) {
      turn.append(Object.assign(document.createElement("p"), { className: "figures", textContent: figures }));
      scrollToEnd();
    },
  };
}

// The figures of an answer, in one line.
export function describe(reply) {
  const speed = reply.tokens_per_second;
  return inOneLine([
    `${reply.text_tokens} text + ${reply.vision_tokens} vision tokens` +
      (reply.cached_tokens ? ` (${reply.cached_tokens} cached)` : ""),
    `answer ${reply.answer_tokens}`,
    `first token ${seconds(reply.first_token_seconds)}`,
    ...(speed === null ? [] : [`${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`]),
    ...({ length: ["cut at the longest length"], stopped: ["stopped"] }[reply.finish] ?? []),
  ]);
}

const seconds = (value) => (value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`);

function addTurn(role, text) {
  const turn = Object.assign(document.createElement("div"), { className: `turn ${role}` });
  turn.append(Object.assign(document.createElement("p"), { textContent: text }));
  log.append(turn);
  scrollToEnd();
  return turn;
}

// The server counts characters in code points, JavaScript in UTF-16 units.
const codePoints = (text) => [...text].length;

function* words(text, onWord) {
  for (const { segment, index, isWordLike } of segmenter.segment(text)) {
    if (!isWordLike) {
      yield segment;
      continue;
    }
    const start = codePoints(text.slice(0, index));
    const word = Object.assign(document.createElement("span"), { className: "word", textContent: segment, tabIndex: 0, role: "button" });
    const choose = () => onWord(word, { start, end: start + codePoints(segment) });
    word.ariaPressed = "false";
    word.addEventListener("click", choose);
    word.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose();
    });
    yield word;
  }
}

function scrollToEnd() {
  log.scrollTop = log.scrollHeight;
}
