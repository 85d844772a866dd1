// Elements are made from text only: nothing that a user or a model wrote becomes markup.

/** An element with attributes, listeners (`onclick` and so on) and children, which are elements or texts. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

export const find = (id) => document.getElementById(id);

/** Show an error until it is closed or the next one comes; null removes it. */
export function alertUser(error) {
  const place = find("alert");
  place.replaceChildren();
  if (error == null || error.name === "AbortError") return;
  place.append(
    el("p", {}, error.message || String(error)),
    el("button", { type: "button", "aria-label": "Close this message", onclick: () => alertUser(null) }, "×"),
  );
}

/** Run an action of a button, which does nothing else meanwhile and keeps the focus; its error is shown. */
export async function during(button, action) {
  if (button.ariaDisabled) return;
  button.ariaDisabled = "true";
  alertUser(null);
  try {
    await action();
  } catch (error) {
    alertUser(error);
  } finally {
    button.ariaDisabled = null;
  }
}

let fields = 0;

/** A control with its label, and a hint below it. */
export function field(label, control, hint) {
  control.id ||= `field-${++fields}`;
  const about = hint ? el("small", { id: `${control.id}-hint` }, hint) : null;
  if (about) control.setAttribute("aria-describedby", about.id);
  return el("div", { class: "field" }, el("label", { for: control.id }, label), control, about);
}

/**
 * A modal dialog. Resolves to true when it was confirmed, to false when it was closed. `check` may refuse the answer
 * with an error, which is shown inside.
 */
export function ask(title, content, { confirm = "OK", cancel = "Cancel", danger = false, check = null } = {}) {
  return new Promise((resolve) => {
    const failed = el("p", { class: "failed", role: "alert" });
    const yes = el("button", { type: "submit", class: danger ? "danger" : "main" }, confirm);
    const no = cancel ? el("button", { type: "button", onclick: () => dialog.close() }, cancel) : null;
    const heading = el("h2", { id: `dialog-${++fields}` }, title);
    const form = el("form", { method: "dialog" }, heading, content, failed, el("div", { class: "bar end" }, no, yes));
    const dialog = el("dialog", { "aria-labelledby": heading.id }, form);
    let confirmed = false;
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      yes.disabled = true;
      try {
        await check?.();
        confirmed = true;
        dialog.close();
      } catch (error) {
        failed.textContent = error.message;
      } finally {
        yes.disabled = false;
      }
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(confirmed);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** A file that the user chooses; null if none. */
export function chooseFile(accept) {
  return new Promise((resolve) => {
    const input = el("input", { type: "file", accept, hidden: true });
    input.addEventListener("change", () => resolve(input.files[0] ?? null));
    input.addEventListener("cancel", () => resolve(null));
    input.click();
  });
}

/** A function that runs at most once per frame, with the last arguments. */
export function perFrame(draw) {
  let waiting = null;
  return (...given) => {
    if (waiting === null) {
      requestAnimationFrame(() => {
        const last = waiting;
        waiting = null;
        draw(...last);
      });
    }
    waiting = given;
  };
}

export const count = (number) => number.toLocaleString("en");

export const bits = (number) => (number == null ? "–" : number.toFixed(3));

export function bytes(number) {
  const units = ["bytes", "kB", "MB", "GB"];
  let at = 0;
  while (number >= 1000 && at < units.length - 1) [number, at] = [number / 1000, at + 1];
  return `${at ? number.toPrecision(3) : number} ${units[at]}`;
}

export function percent(part) {
  if (part > 0 && part < 1e-4) return "under 0.01 %";
  return `${Number((100 * part).toPrecision(2))} %`;
}
