// Elements. Whatever comes from the broker becomes a text node or the value of an attribute that is named here: there is no markup in it.

const SVG = "http://www.w3.org/2000/svg";

/** Makes an element: `on…` attributes are listeners, strings among the children are texts. */
export function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false));
  return node;
}

const SHAPES = {
  // A disc with a tick, a ring with a dash, a square on its corner with a cross.
  "passed": [["circle", { cx: 12, cy: 12, r: 10, fill: "currentColor" }], ["path", { d: "m7.5 12.4 3.1 3.1 6-6.4", class: "cut" }]],
  "not-checked": [
    ["circle", { cx: 12, cy: 12, r: 9, fill: "none", stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": "3.5 2.2" }],
    ["path", { d: "M8.5 12h7", fill: "none", stroke: "currentColor", "stroke-width": 2, "stroke-linecap": "round" }],
  ],
  "failed": [["path", { d: "M12 .8 23.2 12 12 23.2.8 12z", fill: "currentColor" }], ["path", { d: "m8.6 8.6 6.8 6.8m0-6.8-6.8 6.8", class: "cut" }]],
};

/** The shape of a verdict: for the eye, beside its word. */
export function shape(verdict, className = "") {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", `${className} ${kind(verdict)}`);
  for (const [name, attributes] of SHAPES[kind(verdict)]) {
    const part = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, String(value));
    if (attributes.class === "cut") {
      for (const [key, value] of [["fill", "none"], ["stroke", "var(--panel)"], ["stroke-width", "2.4"], ["stroke-linecap", "round"]]) {
        part.setAttribute(key, value);
      }
    }
    svg.append(part);
  }
  return svg;
}

function kind(verdict) {
  return Object.hasOwn(SHAPES, verdict) ? verdict : "not-checked";
}

const WORDS = { "passed": "Passed", "not-checked": "Not checked", "failed": "Failed" };

/** A verdict: its shape and a word. */
export function badge(verdict, word = WORDS[kind(verdict)]) {
  return el("span", { class: `badge ${kind(verdict)}` }, shape(verdict), el("span", {}, word));
}

/** The verdict of a tier of trust claims, of `refused`, of a lease's state. */
export function verdictOf(tier) {
  if (tier === "affirming") return "passed";
  return tier === "none" ? "not-checked" : "failed";
}

/** Seconds since 1970 as a time, UTC. */
export function time(seconds) {
  const date = new Date(Number(seconds) * 1000);
  if (Number.isNaN(date.getTime())) return el("span", {}, String(seconds));
  const text = date.toISOString();
  return el("time", { datetime: text }, text.slice(0, 19).replace("T", " "));
}

/** A digest or a key, or the start of a long one. */
export function brief(text, length = 16) {
  const letters = [...String(text)];
  return el("code", { class: "brief" }, letters.length <= length + 1 ? String(text) : `${letters.slice(0, length).join("")}…`);
}

export function code(text) {
  return el("code", {}, String(text));
}

/** How many there are: `1 guest`, `2 guests`. */
export function count(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}

/** A table in a box of its own that scrolls, by keyboard as well. `rows` are lists of cells; a row's first cell is its head. */
export function table(caption, columns, rows, none) {
  const head = el("tr", {}, columns.map(([title, className]) => el("th", { scope: "col", class: className }, title)));
  const body = rows.map((cells) => el("tr", {}, cells.map((cell, at) => {
    const className = columns[at][1];
    return at === 0 ? el("th", { scope: "row", class: className }, cell) : el("td", { class: className }, cell);
  })));
  return el("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" },
    el("table", {}, el("caption", {}, caption), el("thead", {}, head), el("tbody", {}, body)),
    rows.length === 0 && el("p", { class: "empty" }, none));
}

/** The head of a page: its title, and what can be done. */
export function head(title, ...actions) {
  return el("div", { class: "head" }, el("h1", { tabindex: "-1" }, title), actions);
}
