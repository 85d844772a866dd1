// What a session has learned: the distance of its levels from the model, its documents, and what it cost.
import { call, path } from "./api.js";
import { bits, bytes, count, during, el, percent } from "./dom.js";

const SMALLEST = 1e-4;

/** A distance as a share of the bar: each quarter is ten times as far. */
function share(change) {
  return change > 0 ? Math.min(1, Math.max(0.01, 1 + Math.log10(change) / -Math.log10(SMALLEST))) : 0;
}

function nameOf(level) {
  if (typeof level.level !== "number") return level.rule === "edit" ? `Edit of ${level.level}` : String(level.level);
  return `Level ${level.level}, writes every ${count(level.period)} tokens`;
}

/** A bar for the distance of each level. They can be set again while they are shown. */
export class LevelBars {
  constructor() {
    const marks = ["0.01 %", "0.1 %", "1 %", "10 %", "100 %"].map((text) => el("span", {}, text));
    this.list = el("ul", { class: "levels" });
    this.node = el("div", {}, this.list, el("div", { class: "scale", "aria-hidden": "true" }, ...marks));
    this.shown = "";
  }

  set(levels) {
    const names = levels.map(nameOf);
    if (this.shown !== names.join("\n")) {
      this.shown = names.join("\n");
      this.rows = names.map((name) => {
        const fill = el("div", { class: "fill" });
        const value = el("span", { class: "value" });
        const meter = el("div", { class: "meter", role: "meter", "aria-label": name, "aria-valuemin": "0", "aria-valuemax": "1" }, fill);
        return { fill, value, meter, node: el("li", {}, el("span", {}, name), value, meter) };
      });
      this.list.replaceChildren(...this.rows.map(({ node }) => node));
    }
    levels.forEach((level, at) => {
      const { fill, value, meter } = this.rows[at];
      const text = level.change == null ? "no measure" : percent(level.change);
      fill.style.width = `${100 * share(level.change)}%`;
      value.textContent = text;
      meter.setAttribute("aria-valuenow", String(Math.min(1, level.change ?? 0)));
      meter.setAttribute("aria-valuetext", `${text} from the model`);
    });
    return this;
  }
}

let knownText = null;

async function theKnownText() {
  knownText ??= (await fetch("page/known.txt")).text();
  return (await knownText).trim();
}

/** What each level does while a copy of the session reads the known text. */
export const measureLevels = async (name) => call("POST", path(name, "/health"), { text: await theKnownText() });

/** How well a session predicts a text that every model has seen, and how well the model alone does. */
export async function scoreKnown(name) {
  return call("POST", path(name, "/score"), { text: await theKnownText() });
}

/** A sentence about the known text, after something was learned. */
export function costOf(before, after) {
  const change = after.bits_per_byte - before.bits_per_byte;
  const words = Math.abs(change) < 0.0005 ? "as before" : `${Math.abs(change).toFixed(3)} ${change > 0 ? "worse" : "better"} than before`;
  return `A known text: ${bits(after.bits_per_byte)} bits per byte, ${words} (the model alone: ${bits(after.base)}).`;
}

export class Memory {
  /** `place`: where it is shown; `changed`: called after the session was changed here. */
  constructor(place, changed) {
    Object.assign(this, { place, changed });
    this.bars = new LevelBars();
  }

  show(session) {
    const learn = el("input", { type: "checkbox", id: "learn" });
    learn.checked = session.learn;
    learn.addEventListener("change", () =>
      during(learn, async () => {
        try {
          await call("PATCH", path(session.id), { learn: learn.checked });
        } catch (error) {
          learn.checked = !learn.checked;
          throw error;
        }
      }),
    );
    this.place.replaceChildren(
      el("h2", {}, "Memory"),
      el("p", { class: "quiet" }, `${count(session.tokens)} tokens read, ${bytes(session.memory_bytes)} in memory, ${bytes(session.file_bytes)} on disk`),
      el("div", { class: "check" }, learn, el("label", { for: "learn" }, "Learn from chats")),
      el("h3", {}, "Distance from the model"),
      this.bars.set(session.levels).node,
      el("h3", {}, "A known text"),
      this.known(session),
      el("h3", {}, "Levels at work"),
      this.atWork(session),
      el("h3", {}, "Documents"),
      this.documents(session),
      ...(session.edits.length ? [el("h3", {}, "Edited facts"), this.edits(session)] : []),
    );
  }

  edits(session) {
    const rows = session.edits.toReversed().map((edit) => {
      const facts = edit.facts.map(({ prompt, target }) => el("span", { class: "what" }, `${prompt} → ${target}`));
      const button = el("button", { type: "button", "aria-label": `Take back ${facts[0].textContent}` }, "Take back");
      button.addEventListener("click", () =>
        during(button, async () => {
          await call("DELETE", path(session.id, `/edits/${edit.number}`));
          await this.changed(session.id);
        }),
      );
      return el("li", {}, el("div", { class: "facts" }, ...facts), button);
    });
    return el("ul", { class: "edits" }, ...rows);
  }

  known(session) {
    const text = el("p", { "aria-live": "polite" }, "How much worse does the session predict a text that every model has seen? (The Gettysburg Address.)");
    const button = el("button", { type: "button" }, "Measure");
    button.addEventListener("click", () =>
      during(button, async () => {
        const found = await scoreKnown(session.id);
        text.textContent = `${bits(found.bits_per_byte)} bits per byte; the model alone: ${bits(found.base)}.`;
      }),
    );
    return el("div", { class: "known" }, text, button);
  }

  atWork(session) {
    const about = el("p", {}, "A copy of the session reads the known text: how many bits per byte do the writes of each level save?");
    const list = el("ul", { class: "edits", "aria-live": "polite" });
    const button = el("button", { type: "button", "aria-label": "Measure the levels" }, "Measure");
    button.addEventListener("click", () =>
      during(button, async () => {
        const found = await measureLevels(session.id);
        const rows = found.levels.map((level) => {
          const saved = level.gain == null ? "" : `: ${level.gain.toFixed(4)} bits per byte`;
          const moved = level.change == null ? "" : `, moved ${percent(level.change)}`;
          return el("li", {}, `${nameOf(level)}${saved}${moved}`, level.finding ? el("small", {}, ` Found: ${level.finding}`) : null);
        });
        list.replaceChildren(...rows);
      }),
    );
    return el("div", { class: "known" }, about, list, button);
  }

  documents(session) {
    if (!session.documents.length) return el("p", { class: "quiet" }, "None yet.");
    const rows = session.documents.toReversed().map((one) =>
      el("li", {}, el("span", { class: "what" }, one.what), el("small", {}, `${one.when} UTC, ${bytes(one.bytes)}`)),
    );
    return el("ol", { class: "documents", reversed: true, tabindex: "0", "aria-label": "Documents, the newest first" }, ...rows);
  }
}
