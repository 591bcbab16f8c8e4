// Client of the server's API. A failure is an Error whose message can be shown unchanged.

const KEY = "solo-api-key"; // in sessionStorage: forgotten with the tab

export class KeyError extends Error {}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

export const setKey = (key) => sessionStorage.setItem(KEY, key);

// The served model: its name, size and limits.
export const model = async () => (await request("/v1/models")).data[0];

// What the model sees of an image that is given as a data URL.
export const describeImage = (url, signal) => post("/api/image", { image_url: { url } }, signal);

// Attention of characters `start` to `end` of the last turn, an answer.
export const attention = (turns, span) => post("/api/attention", { messages: turns.map(asMessage), ...span });

// Yields the chunks of an answer to the last turn.
export async function* complete(turns, settings, signal) {
  const body = { messages: turns.map(asMessage), ...settings, stream: true, stream_options: { include_usage: true } };
  const stream = await post("/v1/chat/completions", body, signal, (response) => response.body);
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

const asMessage = ({ role, text, images }) => ({
  role,
  content: [...images.map(({ url }) => ({ type: "image_url", image_url: { url } })), { type: "text", text }],
});

const post = (url, body, signal, read) =>
  request(url, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal }, read);

async function request(url, options = {}, read = (response) => response.json()) {
  const authorization = hasKey() ? { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` } : {};
  let response;
  try {
    response = await fetch(url, { ...options, headers: { ...options.headers, ...authorization } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer: is it still running?");
  }
  if (response.ok) return read(response);
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `the server answered with status ${response.status}`;
  throw response.status === 401 ? new KeyError(message) : new Error(message);
}
