// Requests to the server. A failure is an Error whose message can be shown as it is.

export const model = async () => (await request("/api/model")).json();

export const addImage = async (file) => (await request("/api/images", { method: "POST", body: file })).json();

export const removeImage = (id) => request(imageUrl(id), { method: "DELETE" });

export const imageUrl = (id) => `/api/images/${encodeURIComponent(id)}`;

export const attention = async (question) => (await post("/api/attention", question)).json();

// The events of an answer, one after the other.
export async function* answer(question, signal) {
  const response = await post("/api/answer", question, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.event === "error") throw new Error(event.error);
      yield event;
    }
  }
}

const post = (url, body, signal) =>
  request(url, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal });

async function request(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer: is solo web still running?");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw new Error(error ?? `the server answered ${response.status}`);
}
