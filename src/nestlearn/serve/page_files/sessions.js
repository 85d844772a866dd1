// The sessions of a key as a tree, and what can be done with one.
import { allSessions, blob, call, path } from "./api.js";
import { ask, chooseFile, count, during, el, field, find } from "./dom.js";
import { LevelBars } from "./memory.js";

/** Roots and children in the order of the names; a session whose parent is gone is a root. */
function branches(sessions) {
  const names = new Set(sessions.map(({ id }) => id));
  const under = new Map();
  for (const one of sessions) {
    const parent = names.has(one.parent) && one.parent !== one.id ? one.parent : null;
    under.set(parent, [...(under.get(parent) ?? []), one]);
  }
  return under;
}

export class Sessions {
  /** `select`: called with the name of a session, null without one; `changed`: called after it was changed here. */
  constructor({ select, changed }) {
    Object.assign(this, { select, changed, name: null, sessions: [] });
    for (const id of ["new", "first"]) find(id).addEventListener("click", () => this.create());
    find("upload").addEventListener("click", () => during(find("upload"), () => this.upload()));
    const actions = [
      ["Fork", () => this.fork()], ["Compare", () => this.compare()], ["Download", () => this.download()],
      ["Forget", () => this.forget()], ["Delete", () => this.remove()],
    ];
    for (const [label, action] of actions) {
      const button = el("button", { type: "button" }, label);
      button.addEventListener("click", () => during(button, action));
      find("actions").append(button);
    }
  }

  /** Load the list again, and show a session: this one, or the one shown before. */
  async load(name = this.name) {
    this.sessions = await allSessions();
    const names = this.sessions.map(({ id }) => id);
    this.name = names.includes(name) ? name : names[0] ?? null;
    const focused = find("tree").contains(document.activeElement);
    const under = branches(this.sessions);
    find("tree").replaceChildren(this.list(under, null, new Set()) ?? el("p", { class: "quiet" }, "None yet."));
    if (focused) find("tree").querySelector("[aria-current]")?.focus();
    await this.select(this.name);
  }

  list(under, parent, seen) {
    const found = (under.get(parent) ?? []).filter(({ id }) => !seen.has(id));
    if (!found.length) return null;
    return el("ul", {}, ...found.map((one) => {
      seen.add(one.id);
      const about = one.tokens ? `${count(one.tokens)} tokens` : "empty";
      const button = el(
        "button", { type: "button", "aria-current": one.id === this.name ? "true" : null, onclick: () => this.load(one.id) },
        el("span", { class: "what" }, one.id), el("small", {}, about),
      );
      return el("li", {}, button, this.list(under, one.id, seen));
    }));
  }

  /** A dialog for the name of a session that is made by `make`. */
  async named(title, confirm, make) {
    const input = el("input", { type: "text", maxlength: "64", autocomplete: "off" });
    let made = null;
    const done = await ask(title, field("Name", input, "Empty for a random one"), {
      confirm, check: async () => (made = await make(input.value.trim() || null)),
    });
    if (done) await this.load(made.id);
  }

  create() {
    return this.named("New session", "Make it", (id) => call("POST", "v1/sessions", { id }));
  }

  fork() {
    return this.named(`Fork ${this.name}`, "Fork", (id) => call("POST", path(this.name, "/fork"), { id }));
  }

  async compare() {
    const others = this.sessions.filter(({ id }) => id !== this.name);
    if (!others.length) throw new Error("There is no other session to compare with. Fork this one first.");
    // The session that it was forked from comes first, then its own forks.
    const mine = this.sessions.find(({ id }) => id === this.name);
    const rank = ({ id, parent }) => (id === mine.parent ? 0 : parent === mine.id ? 1 : 2);
    others.sort((one, other) => rank(one) - rank(other));
    const select = el("select", {}, ...others.map(({ id }) => el("option", { value: id }, id)));
    const shown = el("div", { "aria-live": "polite" });
    const failed = el("p", { class: "failed", role: "alert" });
    const update = async () => {
      failed.textContent = "";
      try {
        const { levels } = await call("GET", path(this.name, `/diff/${encodeURIComponent(select.value)}`));
        shown.replaceChildren(new LevelBars().set(levels).node);
      } catch (error) {
        failed.textContent = error.message;
      }
    };
    select.addEventListener("change", update);
    await update();
    const content = [field("With", select), el("p", { class: "quiet" }, "How far the levels of both are apart:"), shown, failed];
    await ask(`Compare ${this.name}`, content, { confirm: "Close", cancel: null });
  }

  async download() {
    const name = this.name;
    const url = URL.createObjectURL(await blob(path(name, "/file")));
    el("a", { href: url, download: `${name}.safetensors` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  }

  async upload() {
    const file = await chooseFile(".safetensors");
    if (!file) return;
    const input = el("input", { type: "text", maxlength: "64", required: true, autocomplete: "off" });
    input.value = file.name.replace(/\.safetensors$/, "").slice(0, 64);
    const check = async () => {
      const name = input.value.trim();
      if ((await allSessions()).some(({ id }) => id === name)) {
        throw new Error(`There is a session ${name} already. Choose another name, or delete it first.`);
      }
      await call("PUT", path(name, "/file"), file);
    };
    if (await ask("Open a session file", field("Name of the session", input), { confirm: "Open", check })) {
      await this.load(input.value.trim());
    }
  }

  async forget() {
    const { levels } = await call("GET", path(this.name));
    const numbers = levels.map(({ level }) => level).filter((level) => typeof level === "number");
    const boxes = numbers.map((level) => el("input", { type: "checkbox", id: `forget-${level}`, value: level }));
    const all = el("input", { type: "checkbox", id: "forget-all" });
    all.checked = true;
    const rest = () => boxes.forEach((box) => (box.disabled = all.checked));
    all.addEventListener("change", rest);
    rest();
    const line = (box, text) => el("div", { class: "check" }, box, el("label", { for: box.id }, text));
    const content = el(
      "fieldset", {}, el("legend", {}, "Return to the model's own weights"), line(all, "Everything, documents and edits too"),
      ...boxes.map((box) => line(box, `Level ${box.value}`)),
    );
    const check = async () => {
      const chosen = boxes.filter((box) => box.checked).map((box) => Number(box.value));
      if (!all.checked && !chosen.length) throw new Error("Choose a level.");
      await call("POST", path(this.name, "/forget"), all.checked ? {} : { levels: chosen });
    };
    if (await ask(`Let ${this.name} forget`, content, { confirm: "Forget", danger: true, check })) await this.changed(this.name);
  }

  async remove() {
    const text = el("p", {}, "The session and its file are removed. Forks of it stay.");
    const check = () => call("DELETE", path(this.name));
    if (await ask(`Delete ${this.name}?`, text, { confirm: "Delete", danger: true, check })) await this.load(null);
  }
}
