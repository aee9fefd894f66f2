// A chat over /v1/chat/completions. The conversation is this page's alone and ends with it.

import { at, digits, el } from "./dom.js";
import { Refused, events } from "./stream.js";

const MOST_TOKENS = 512;
const TEMPERATURE = 0.6; // at 1 small models ramble

export class Chat {
  constructor(model, askForKey) {
    this.model = model;
    this.askForKey = askForKey;
    this.messages = [];
    this.running = null;
    at("chat").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    at("chat-text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        at("chat").requestSubmit();
      }
    });
    at("chat-stop").addEventListener("click", () => this.running?.abort());
    at("chat-new").addEventListener("click", () => {
      this.clear();
      at("chat-text").focus();
    });
  }

  clear() {
    this.running?.abort();
    this.messages = [];
    at("chat-log").replaceChildren();
    at("chat-new").hidden = true;
  }

  async send() {
    const content = at("chat-text").value.trim();
    if (!content || this.running || !this.model()) return;
    at("chat-text").value = "";
    this.add("user", "You", content);
    const messages = (this.messages = [...this.messages, { role: "user", content }]);
    const answer = this.add("assistant", this.model(), "");
    const text = answer.querySelector(".text");
    this.busy(new AbortController());
    const began = performance.now();
    let first = 0;
    let tokens = 0;
    try {
      const body = {
        model: this.model(), messages, stream: true, stream_options: { include_usage: true },
        temperature: TEMPERATURE, max_tokens: MOST_TOKENS,
      };
      const asked = {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        signal: this.running.signal,
      };
      for await (const [, data] of events("/v1/chat/completions", asked)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        const piece = chunk.choices[0]?.delta?.content;
        tokens = chunk.usage?.completion_tokens ?? tokens;
        if (!piece) continue;
        first ||= performance.now();
        text.append(piece);
        this.follow();
      }
      const seconds = (performance.now() - first) / 1000;
      const speed = tokens > 1 && seconds > 0 ? `${digits((tokens - 1) / seconds)} tokens/s, ` : "";
      if (first) answer.append(el("p", { class: "cost" }, `${speed}first after ${digits((first - began) / 1000)} s`));
    } catch (error) {
      if (error instanceof Refused && error.status === 401) this.askForKey("The gateway wants a valid key.");
      else if (error.name === "AbortError") answer.append(el("p", { class: "cost" }, "Stopped"));
      else answer.append(el("p", { class: "error" }, error instanceof TypeError ? "The gateway does not answer." : error.message));
    } finally {
      if (this.messages === messages && text.textContent) {
        this.messages = [...messages, { role: "assistant", content: text.textContent }];
      }
      this.busy(null);
      this.follow();
    }
  }

  /** While an answer runs it is not read out piece by piece: aria-busy holds it until it is whole. */
  busy(running) {
    this.running = running;
    const pressed = [at("chat-send"), at("chat-stop")].includes(document.activeElement);
    at("chat-log").setAttribute("aria-busy", running !== null);
    at("chat-send").hidden = running !== null;
    at("chat-stop").hidden = running === null;
    at("chat-new").hidden = !this.messages.length;
    if (pressed) at("chat-text").focus(); // the button is gone, the focus shall not be
  }

  add(role, who, content) {
    const entry = el("article", { class: role, "aria-label": who }, el("h3", {}, who), el("p", { class: "text" }, content));
    at("chat-log").append(entry);
    this.near = true;
    this.follow();
    return entry;
  }

  /** Stay at the end, unless the reader has gone back. */
  follow() {
    const log = at("chat-log");
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 80 || this.near) log.scrollTop = log.scrollHeight;
    this.near = false;
  }
}
