// The turns of the chat. The words of a finished answer can be selected.

const log = document.getElementById("transcript");
const segmenter = new Intl.Segmenter(undefined, { granularity: "word" });

export function clear() {
  log.replaceChildren();
}

export function addQuestion({ text, images }, onImage) {
  const turn = addTurn("user", text);
  if (!images.length) return turn;
  const row = Object.assign(document.createElement("div"), { className: "images" });
  for (const [index, image] of images.entries()) {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.append(Object.assign(new Image(), { src: image.picture, alt: `Show image ${index + 1} of this message` }));
    button.addEventListener("click", () => onImage(image));
    row.append(button);
  }
  turn.prepend(row);
  return turn;
}

// An answer that is still to come: grow it, then finish it.
export function addAnswer() {
  const turn = addTurn("assistant", "Waiting …");
  const paragraph = turn.querySelector("p");
  turn.classList.add("waiting");
  turn.ariaBusy = "true"; // screen readers announce it once it is complete
  let text = "";
  return {
    turn,
    grow(piece) {
      turn.classList.remove("waiting");
      text += piece;
      paragraph.textContent = text;
      scrollToEnd();
    },
    text: () => text.trim(),
    finish(onWord) {
      paragraph.replaceChildren(...words(text.trim(), onWord));
      turn.ariaBusy = "false";
    },
    addMetrics(metrics) {
      turn.append(Object.assign(document.createElement("p"), { className: "metrics", textContent: metrics }));
      scrollToEnd();
    },
  };
}

// Token counts and timings of an answer, in one line.
export function describe({ usage, visionTokens, sent, first, last, finish }) {
  const cached = usage.prompt_tokens_details?.cached_tokens;
  const speed = (1000 * (usage.completion_tokens - 1)) / (last - first);
  return inOneLine([
    `${usage.prompt_tokens - visionTokens} text + ${visionTokens} vision tokens` + (cached ? ` (${cached} cached)` : ""),
    `answer ${usage.completion_tokens}`,
    `first token ${duration(first - sent)}`,
    ...(speed > 0 && Number.isFinite(speed) ? [`${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`] : []),
    ...(finish === "length" ? ["cut at the maximum length"] : []),
  ]);
}

// Facts in one line that breaks only between them.
export const inOneLine = (facts) => facts.map((fact) => fact.replaceAll(" ", "\u00a0")).join(" · ");

const duration = (milliseconds) =>
  milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;

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
