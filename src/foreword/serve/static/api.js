// The server's routes, as promises. Paths are relative to the page, so that it works under any path of a gateway.

const KEY = "foreword-key";

/** Why the server gave no answer: one sentence, and the status (0 where nothing came back). */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The API key of this tab, or null; it is gone when the tab is closed. */
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export const models = async () => (await (await ask("v1/models")).json()).data;

export const classify = async (body, signal) => (await (await ask("v1/classify", body, signal)).json()).data[0];

export const attention = async (body, signal) => (await ask("v1/attention", body, signal)).json();

/** Pieces `{text, finish}` of a completion (with `prompt`) or of a chat (with `messages`), as they come. */
export async function* stream(body, signal) {
  const path = body.messages ? "v1/chat/completions" : "v1/completions";
  const response = await ask(path, { ...body, stream: true }, signal);
  for await (const event of events(response.body.pipeThrough(new TextDecoderStream()).getReader())) {
    if (event.error) throw new Refused(500, event.error.message);
    for (const choice of event.choices) {
      yield { text: choice.text ?? choice.delta.content ?? "", finish: choice.finish_reason };
    }
  }
}

async function* events(reader) {
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return; // without [DONE] only after an error event
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const settings = body ? { method: "POST", body: JSON.stringify(body), headers, signal } : { headers, signal };
  let response;
  try {
    response = await fetch(path, settings);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer.");
  }
  if (!response.ok) throw new Refused(response.status, await reason(response));
  return response;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}
