// Talks with the gateway: server-sent events by fetch, which can show a key, as EventSource cannot.

const KEY = "bsns-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (word) => sessionStorage.setItem(KEY, word),
  forget: () => sessionStorage.removeItem(KEY),
};

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Yields [event, data] as they come. Throws Refused for what is not 200, TypeError where nobody answers. */
export async function* events(path, options = {}) {
  const word = key.get();
  const headers = { ...(options.headers ?? {}), ...(word ? { Authorization: `Bearer ${word}` } : {}) };
  const response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (!response.ok) throw new Refused(response.status, await reason(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const pieces = text.split("\n\n");
      text = pieces.pop();
      for (const piece of pieces) {
        let event = "message";
        const data = [];
        for (const line of piece.split("\n")) {
          if (line.startsWith("event: ")) event = line.slice(7);
          else if (line.startsWith("data: ")) data.push(line.slice(6));
        }
        if (data.length) yield [event, data.join("\n")];
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined); // it has failed already, then
  }
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the gateway answered with status ${response.status}`;
  }
}
