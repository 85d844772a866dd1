// A document is read: bits per byte of each segment before it is written, with and without what the session learns.
import { events, path } from "./api.js";
import { Chart } from "./chart.js";
import { alertUser, bits, bytes, count, el, field, perFrame } from "./dom.js";
import { costOf, scoreKnown } from "./memory.js";

async function textOf(file) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} is not a text in UTF-8. Only plain text can be read.`);
  }
}

const sizeOf = (text) => new TextEncoder().encode(text).length;

export class Reading {
  /** `levels`: called with the levels after each segment; `done`: called when a session has read. */
  constructor(place, { levels, done }) {
    Object.assign(this, { levels: perFrame(levels), done, name: null, abort: null });
    this.file = el("input", { type: "file", id: "document", multiple: true, accept: "text/*,.md,.txt,.csv,.json,.tex,.rst,.py" });
    this.text = el("textarea", { rows: "5", placeholder: "Text" });
    this.start = el("button", { type: "submit", class: "main" }, "Read");
    this.stop = el("button", { type: "button", hidden: true, onclick: () => this.abort?.abort() }, "Stop");
    this.bar = el("progress", { max: "1", value: "0", "aria-label": "Read so far", hidden: true });
    this.now = el("p", { class: "now" });
    this.said = el("p", { class: "visually-hidden", "aria-live": "polite" });
    this.result = el("div", { class: "result", "aria-live": "polite" });
    this.chart = new Chart(
      [{ label: "as it learns", style: "on" }, { label: "writes off", style: "off" }], "Bits per byte", "segment",
    );
    this.draw = perFrame(() => this.chart.draw());
    const drop = el("div", { class: "drop" }, el("label", { for: "document" }, "Drop documents here, or choose them: "), this.file);
    const form = el(
      "form", {}, drop, field("Or write a text", this.text), el("div", { class: "bar" }, this.start, this.stop),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run(async () => [{ text: this.text.value }]);
    });
    this.file.addEventListener("change", () => this.read(this.file.files));
    for (const kind of ["dragover", "dragleave", "drop"]) {
      drop.addEventListener(kind, (event) => {
        event.preventDefault();
        drop.classList.toggle("over", kind === "dragover");
        if (kind === "drop" && event.dataTransfer.files.length) this.read(event.dataTransfer.files);
      });
    }
    place.append(
      el("p", { class: "quiet" }, "The session learns while it reads. A document is learned as a whole or not at all."),
      form, this.bar, this.now, this.said, this.chart.node, this.result,
    );
  }

  /** Another session is shown. */
  show(name) {
    if (name === this.name) return;
    this.name = name;
    if (this.abort) return;
    this.clear();
    this.result.replaceChildren();
  }

  read(files) {
    const all = [...files];
    return this.run(() => Promise.all(all.map(async (file) => ({ text: await textOf(file), name: file.name.slice(0, 200) }))));
  }

  clear() {
    this.chart.clear();
    this.bar.hidden = true;
    this.now.textContent = "";
  }

  async run(source) {
    if (this.abort) return;
    const name = this.name;
    this.abort = new AbortController();
    this.start.disabled = this.file.disabled = true;
    this.stop.hidden = false;
    this.result.replaceChildren();
    alertUser(null);
    try {
      const documents = await source();
      const before = await scoreKnown(name);
      for (const one of documents) await this.one(name, one);
      this.text.value = "";
      this.result.append(el("p", {}, costOf(before, await scoreKnown(name))));
    } catch (error) {
      if (error.name === "AbortError") this.result.append(el("p", {}, "Stopped: nothing of this document was learned."));
      else alertUser(error);
    } finally {
      this.abort = null;
      this.start.disabled = this.file.disabled = false;
      this.stop.hidden = true;
      this.file.value = "";
      this.bar.hidden = true;
      this.now.textContent = "";
      await this.done(name);
    }
  }

  async one(name, { text, name: title }) {
    this.clear();
    this.bar.hidden = false;
    const size = sizeOf(text);
    let told = 0;
    const body = { text, name: title ?? null, compare: true, levels: true };
    for await (const event of events(path(name, "/read"), body, this.abort.signal)) {
      if (event.object === "session.read") {
        this.tell(event, title);
        continue;
      }
      const { number, bits_per_byte: mine } = event.segment;
      this.chart.add(0, number, mine);
      for (const other of event.compared) this.chart.add(1, other.number, other.off);
      const part = Math.min(1, event.bytes / size);
      this.bar.value = part;
      this.now.textContent = `${title ? `${title}: ` : ""}segment ${count(number)}, ${bits(mine)} bits per byte; ${Math.round(100 * part)} % read`;
      if (part >= told) {
        // A screen reader hears every tenth, not every segment.
        this.said.textContent = `${Math.round(100 * part)} percent read, ${bits(event.bits_per_byte)} bits per byte so far`;
        told = part + 0.1;
      }
      if (name === this.name) this.levels(event.levels);
      this.draw();
    }
  }

  tell(event, title) {
    const gain = event.off == null ? "" : `, ${bits(event.off)} without what it learned on the way`;
    const what = `${title ?? "The text"}: ${count(event.tokens)} tokens (${bytes(event.bytes)}) in ${event.seconds.toFixed(1)} s`;
    this.result.append(el("p", {}, `${what}. ${bits(event.bits_per_byte)} bits per byte${gain}.`));
    this.said.textContent = "";
    this.draw();
  }
}
