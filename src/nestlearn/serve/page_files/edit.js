// Facts are written into a session at once: what it should say after a prompt.
import { events, path } from "./api.js";
import { alertUser, el, field, percent } from "./dom.js";
import { costOf, scoreKnown } from "./memory.js";

const METHODS = [
  ["intattn", "MLP and attention (IntAttn-Edit)"], ["memit", "MLPs of some layers (MEMIT)"],
  ["alphaedit", "MLPs, protected (AlphaEdit)"], ["rome", "one MLP (ROME)"],
];

export class Editing {
  constructor(place, { done }) {
    Object.assign(this, { done, name: null, abort: null });
    this.facts = el("div", { class: "rows" });
    this.method = el("select", {}, ...METHODS.map(([value, label]) => el("option", { value }, label)));
    this.start = el("button", { type: "submit", class: "main" }, "Write facts");
    this.stop = el("button", { type: "button", hidden: true, onclick: () => this.abort?.abort() }, "Stop");
    const more = el("button", { type: "button", onclick: () => this.add().focus() }, "One more fact");
    this.now = el("p", { class: "now", role: "status" });
    this.result = el("div", { class: "result", "aria-live": "polite" });
    const form = el("form", {}, this.facts, el("div", { class: "bar" }, more), field("Method", this.method), el("div", { class: "bar" }, this.start, this.stop));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    place.append(el("p", { class: "quiet" }, "The session will say the target after the prompt, and about the same subject elsewhere."), form, this.now, this.result);
    this.add();
  }

  add() {
    const text = (placeholder, required) => el("input", { type: "text", placeholder, required, autocomplete: "off" });
    const [prompt, target, subject] = [text("The capital of France is", true), text("Rome", true), text("France", false)];
    this.facts.append(
      el("div", { class: "fact", role: "group", "aria-label": `Fact ${this.facts.children.length + 1}` },
        field("Prompt", prompt), field("Target", target), field("Subject", subject, "Words of the prompt; empty for its last name")),
    );
    return prompt;
  }

  show(name) {
    if (name === this.name) return;
    this.name = name;
    if (!this.abort) this.result.replaceChildren();
  }

  /** The facts that were filled in. */
  given() {
    return [...this.facts.children].map((row) => {
      const [prompt, target, subject] = [...row.querySelectorAll("input")].map((input) => input.value.trim());
      return { prompt, target, subject: subject || null };
    });
  }

  async run() {
    if (this.abort) return;
    const name = this.name;
    const facts = this.given();
    this.abort = new AbortController();
    this.start.disabled = true;
    this.stop.hidden = false;
    this.result.replaceChildren();
    this.now.textContent = "measuring a known text";
    alertUser(null);
    try {
      const before = await scoreKnown(name);
      for await (const event of events(path(name, "/edit"), { facts, method: this.method.value }, this.abort.signal)) {
        if (event.object === "session.edit") this.tell(facts, event);
        else this.now.textContent = event.doing;
      }
      this.result.append(el("p", {}, costOf(before, await scoreKnown(name))));
      this.facts.replaceChildren();
      this.add();
    } catch (error) {
      if (error.name === "AbortError") this.result.append(el("p", {}, "Stopped: no fact was written."));
      else alertUser(error);
    } finally {
      this.abort = null;
      this.start.disabled = false;
      this.stop.hidden = true;
      this.now.textContent = "";
      await this.done(name);
    }
  }

  tell(facts, event) {
    for (const [at, { prompt, target }] of facts.entries()) {
      this.result.append(el("p", {}, `${prompt} → ${target}: probability of a token ${percent(Math.exp(-event.before[at]))} before, ${percent(Math.exp(-event.after[at]))} now.`));
    }
  }
}
