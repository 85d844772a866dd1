// The page: a tree of sessions, and what can be done with the one that is chosen.
import { askForKey, call, path } from "./api.js";
import { Chat } from "./chat.js";
import { alertUser, find } from "./dom.js";
import { Editing } from "./edit.js";
import { Memory } from "./memory.js";
import { Practice } from "./practise.js";
import { Reading } from "./read.js";
import { Sessions } from "./sessions.js";

let model = "";
const changed = (name) => sessions.load(name === sessions.name ? name : sessions.name).catch(alertUser);
const memory = new Memory(find("memory"), changed);
const chat = new Chat(find("chat"), { model: () => model, done: changed });
const reading = new Reading(find("read"), { levels: (levels) => memory.bars.set(levels), done: changed });
const practice = new Practice(find("practise"), { done: changed });
const editing = new Editing(find("edit"), { done: changed });
const sessions = new Sessions({ select, changed });

async function select(name) {
  for (const [id, shown] of [["work", name !== null], ["memory", name !== null], ["welcome", name === null]]) {
    find(id).hidden = !shown;
  }
  if (name === null) return;
  find("name").textContent = name;
  document.title = `${name} – nestlearn`;
  for (const part of [chat, reading, practice, editing]) part.show(name);
  const found = await call("GET", path(name));
  if (name === sessions.name) memory.show(found);
}

/** Tabs: one can be reached by the key Tab, the others by arrows. */
function tabs() {
  const all = [...find("tabs").children];
  const open = (chosen) => {
    for (const tab of all) {
      tab.setAttribute("aria-selected", String(tab === chosen));
      tab.tabIndex = tab === chosen ? 0 : -1;
      find(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
  };
  for (const tab of all) tab.addEventListener("click", () => open(tab));
  find("tabs").addEventListener("keydown", (event) => {
    const at = all.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const next = all.at(to % all.length);
    open(next);
    next.focus();
  });
  open(all[0]);
}

async function start() {
  model = (await call("GET", "v1/models")).data[0].id;
  find("model").textContent = model;
  await sessions.load();
}

tabs();
find("key").addEventListener("click", async () => {
  if (await askForKey()) location.reload();
});
start().catch(alertUser);
