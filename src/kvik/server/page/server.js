// Requests to this page's own server, with the key where it asks for one.

const facts = new Set(document.querySelector("meta[name=kvik]").content.split(" "));
export const asksForKey = facts.has("key");
export const isReadOnly = facts.has("read-only");

const NAME = "kvik-key";
export const hasKey = () => sessionStorage.getItem(NAME) !== null;
export const setKey = (key) => (key ? sessionStorage.setItem(NAME, key) : sessionStorage.removeItem(NAME));

export class Refusal extends Error {
  constructor(status, message, retryAfter_s) {
    super(message);
    this.status = status;
    this.retryAfter_s = retryAfter_s; // where the server names a time
  }
}

// An answer that went well. Raises `Refusal` with the server's own words.
export async function ask(path, { method = "GET", body, signal } = {}) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  if (hasKey()) headers.Authorization = `Bearer ${sessionStorage.getItem(NAME)}`;
  const answer = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  const after_s = Number(answer.headers.get("Retry-After")) || undefined;
  throw new Refusal(answer.status, told.error?.message ?? `the server answered with ${answer.status}`, after_s);
}

export const json = async (path, options) => (await ask(path, options)).json();

// The server-sent events of an answer: {name, data}, where data is JSON or the "[DONE]" of OpenAI's streams.
export async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n");
      const of = (field) => lines.find((line) => line.startsWith(`${field}: `))?.slice(field.length + 2);
      const data = of("data");
      if (data !== undefined && data !== "[DONE]") yield { name: of("event") ?? "message", data: JSON.parse(data) };
    }
  }
}
