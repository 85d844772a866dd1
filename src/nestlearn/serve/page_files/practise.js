// A text is learned by heart: read many times, with questions made from it.
import { events, path } from "./api.js";
import { Chart } from "./chart.js";
import { alertUser, count, el, field, perFrame } from "./dom.js";
import { costOf, scoreKnown } from "./memory.js";

export class Practice {
  constructor(place, { done }) {
    Object.assign(this, { done, name: null, abort: null });
    this.text = el("textarea", { rows: "8", required: true });
    this.passes = el("input", { type: "number", min: "1", max: "1000", value: "10", required: true });
    this.questions = el("input", { type: "number", min: "0", max: "64", value: "8", required: true });
    this.start = el("button", { type: "submit", class: "main" }, "Practise");
    this.stop = el("button", { type: "button", hidden: true, onclick: () => this.abort?.abort() }, "Stop");
    this.bar = el("progress", { max: "1", value: "0", "aria-label": "Practised so far", hidden: true });
    this.now = el("p", { class: "now" });
    this.result = el("div", { class: "result", "aria-live": "polite" });
    this.chart = new Chart([{ label: "the text", style: "on" }, { label: "answers to questions", style: "off" }], "Loss in nats per token", "step");
    this.draw = perFrame(() => this.chart.draw());
    const form = el(
      "form", {}, field("Text to learn by heart", this.text),
      el("div", { class: "pair" }, field("Passes", this.passes, "How often it is read"), field("Questions", this.questions, "In each step, made from the text")),
      el("div", { class: "bar" }, this.start, this.stop),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    place.append(el("p", { class: "quiet" }, "Practice takes much longer than reading, and the session then answers from memory."), form, this.bar, this.now, this.chart.node, this.result);
  }

  show(name) {
    if (name === this.name) return;
    this.name = name;
    if (this.abort) return;
    this.chart.clear();
    this.result.replaceChildren();
  }

  async run() {
    if (this.abort) return;
    const name = this.name;
    this.abort = new AbortController();
    this.start.disabled = true;
    this.stop.hidden = this.bar.hidden = false;
    this.bar.removeAttribute("value");
    this.chart.clear();
    this.result.replaceChildren();
    alertUser(null);
    try {
      const before = await scoreKnown(name);
      const body = { texts: [this.text.value], passes: Number(this.passes.value), questions: Number(this.questions.value) };
      for await (const event of events(path(name, "/practice"), body, this.abort.signal)) {
        this.step(event);
      }
      this.result.append(el("p", {}, costOf(before, await scoreKnown(name))));
    } catch (error) {
      if (error.name === "AbortError") this.result.append(el("p", {}, "Stopped: nothing of this practice was learned."));
      else alertUser(error);
    } finally {
      this.abort = null;
      this.start.disabled = false;
      this.stop.hidden = this.bar.hidden = true;
      this.now.textContent = "";
      await this.done(name);
    }
  }

  step(event) {
    if (event.object === "session.practice") {
      const made = event.questions ? `, with ${count(event.questions)} questions made from the text` : "";
      this.result.append(el("p", {}, `Practised ${count(event.steps)} steps in ${event.seconds.toFixed(1)} s${made}.`));
      return;
    }
    this.chart.add(0, event.step, event.text);
    this.chart.add(1, event.step, event.answers);
    this.bar.value = event.step / event.steps;
    this.now.textContent = `step ${count(event.step)} of ${count(event.steps)}`;
    this.draw();
  }
}
