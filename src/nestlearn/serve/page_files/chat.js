// A conversation with a session. The page keeps it until it is closed; what the session learns is on the server.
import { events } from "./api.js";
import { alertUser, el, field } from "./dom.js";

export class Chat {
  /** `model`: gives the name of the model; `done`: called after an answer. */
  constructor(place, { model, done }) {
    Object.assign(this, { model, done, name: null, abort: null, all: new Map() });
    this.lines = el("div", { class: "lines", role: "log", "aria-label": "Conversation", tabindex: "0" });
    this.input = el("textarea", { rows: "2", placeholder: "Ask something", required: true });
    this.send = el("button", { type: "submit", class: "main" }, "Send");
    this.stop = el("button", { type: "button", hidden: true, onclick: () => this.abort?.abort() }, "Stop");
    this.again = el("button", { type: "button", onclick: () => this.restart() }, "New conversation");
    this.temperature = el("input", { type: "number", min: "0", max: "2", step: "0.1", value: "0" });
    this.tokens = el("input", { type: "number", min: "1", max: "100000", value: "200" });
    const settings = el(
      "details", {}, el("summary", {}, "Settings"),
      el("div", { class: "pair" }, field("Temperature", this.temperature, "0 takes the most likely word"), field("Tokens at most", this.tokens)),
    );
    this.form = el(
      "form", {}, field("Message", this.input), el("div", { class: "bar" }, this.send, this.stop, this.again), settings,
    );
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.form.requestSubmit();
      }
    });
    place.append(this.lines, this.form);
  }

  get messages() {
    if (!this.all.has(this.name)) this.all.set(this.name, []);
    return this.all.get(this.name);
  }

  show(name) {
    if (name === this.name) return;
    this.abort?.abort();
    this.name = name;
    this.draw();
  }

  restart() {
    this.abort?.abort();
    this.all.delete(this.name);
    this.draw();
    this.input.focus();
  }

  draw() {
    this.lines.replaceChildren(...this.messages.map(({ role, content }) => this.line(role, content)));
    if (!this.messages.length) this.lines.append(el("p", { class: "quiet" }, "Nothing was said yet. The session answers with what it has learned."));
    this.lines.scrollTop = this.lines.scrollHeight;
  }

  line(role, content) {
    const who = role === "user" ? "You" : "Session";
    return el("div", { class: `message ${role}` }, el("strong", {}, who), el("p", {}, content));
  }

  async ask() {
    const question = this.input.value.trim();
    if (!question || this.abort) return;
    const { name, messages } = this;
    messages.push({ role: "user", content: question });
    this.draw();
    this.input.value = "";
    const answer = this.line("assistant", "");
    const text = answer.lastChild;
    // A log that changes is read out: the answer is read when it is whole.
    answer.setAttribute("aria-busy", "true");
    answer.classList.add("waiting");
    this.lines.append(answer);
    this.abort = new AbortController();
    this.send.disabled = true;
    this.stop.hidden = false;
    alertUser(null);
    let said = "";
    let failed = null;
    try {
      const body = { model: this.model(), user: name, messages, temperature: Number(this.temperature.value), max_tokens: Number(this.tokens.value) };
      for await (const event of events("v1/chat/completions", body, this.abort.signal)) {
        said += event.choices[0]?.delta.content ?? "";
        text.textContent = said;
        if (name === this.name) this.lines.scrollTop = this.lines.scrollHeight;
      }
    } catch (error) {
      failed = error;
    }
    if (said) messages.push({ role: "assistant", content: said });
    else if (failed) messages.pop();
    this.abort = null;
    this.send.disabled = false;
    this.stop.hidden = true;
    if (name === this.name) this.draw();
    if (failed) {
      alertUser(failed);
      if (!said && name === this.name) this.input.value ||= question;
    } else await this.done(name);
  }
}
