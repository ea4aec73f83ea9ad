// Sign-in, and which page is shown. A page is what follows the '#' of the address, so that going back works and nothing is sent.

import * as api from "./api.js";
import { audit } from "./audit.js";
import { el, head } from "./dom.js";
import { guest } from "./guest.js";
import { guests } from "./guests.js";
import { leases, resources } from "./lists.js";

const at = (id) => document.getElementById(id);
const NAME = "Nacre key broker";

let who = null;
let current = new AbortController();
let timer;

/** What is shown for an address: the entry of the navigation that it belongs to, and who makes it. */
function route(address) {
  const [path, query = ""] = address.replace(/^#\/?/, "").split("?", 2);
  const parameters = new URLSearchParams(query);
  const [first, second] = path.split("/").map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  if (first === "guests" && second) return ["guests", (context) => guest(second, context)];
  if (first === "guests") return ["guests", (context) => guests("attested", parameters, context)];
  if (first === "refused") return ["guests", (context) => guests("refused", parameters, context)];
  if (first === "resources") return ["resources", (context) => resources(parameters, context)];
  if (first === "leases") return ["leases", (context) => leases(parameters, context)];
  if (first === "audit") return ["audit", (context) => audit(parameters, context)];
  return [null, null];
}

async function show(focus = true) {
  if (who === null) return;
  if (location.hash === "#main") return;
  const [entry, make] = route(location.hash);
  if (make === null) {
    location.replace(who.reads_all ? "#/guests" : "#/resources");
    return;
  }
  current.abort();
  current = new AbortController();
  const { signal } = current;
  for (const link of at("nav").querySelectorAll("a")) {
    if (link.getAttribute("href") === `#/${entry}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const view = at("view");
  view.setAttribute("aria-busy", "true");
  at("status").textContent = "Loading…";
  let page;
  try {
    page = await make({ signal, reload: () => show(false) });
  } catch (error) {
    if (error.name === "AbortError" || who === null) return;
    page = failure(error, entry);
  }
  if (signal.aborted) return;
  view.replaceChildren(...page.content);
  view.removeAttribute("aria-busy");
  document.title = `${page.title} – ${NAME}`;
  at("status").textContent = page.status;
  if (focus) {
    view.querySelector("h1")?.focus();
    scrollTo(0, 0);
  } else if (document.activeElement === document.body) {
    view.querySelector(".head button")?.focus();
  }
}

function failure(error, entry) {
  const title = error.status === 404 ? "Not found" : error.status === 403 ? "Not for this role" : "Not shown";
  const why = error.status === 403 && !who.reads_all
    ? `Guests and the audit log belong to no repository: they are for whoever may look at all of them. ${error.message}`
    : error.message;
  return {
    title,
    status: "",
    content: [
      head(title, el("button", { type: "button", onclick: () => show(false) }, "Try again")),
      el("p", { class: "error", role: "alert" }, why),
      error.status === 404 && el("p", {}, el("a", { href: `#/${entry}` }, "Back to the list")),
    ].filter(Boolean),
  };
}

function signedIn(ends) {
  at("who-name").textContent = who.repository ? `${who.name} of repository ${who.repository}` : who.name;
  const date = new Date(ends * 1000);
  at("who-until").textContent = Number.isNaN(date.getTime()) ? "" : `until ${date.toISOString().slice(11, 16)} UTC`;
  at("sign-in").hidden = true;
  for (const id of ["nav", "who", "view"]) at(id).hidden = false;
  clearTimeout(timer);
  // By this machine's clock; the broker decides by its own.
  const left = Math.min(ends * 1000 - Date.now(), 3_600_000);
  if (left > 0) timer = setTimeout(() => signOut("The token has ended. Print a new one."), left);
  show();
}

function signOut(why) {
  api.forget();
  who = null;
  current.abort();
  clearTimeout(timer);
  at("view").replaceChildren();
  at("token").value = "";
  for (const id of ["nav", "who", "view"]) at(id).hidden = true;
  at("sign-in").hidden = false;
  at("status").textContent = "";
  at("sign-in-error").textContent = why;
  document.title = `Sign in – ${NAME}`;
  at("token").focus();
}

api.whenEnded((why) => {
  if (who !== null) signOut(`The broker does not take this token any more: ${why}`);
});

at("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = at("sign-in-form").querySelector("button");
  at("sign-in-error").textContent = "";
  button.disabled = true;
  try {
    const ends = api.keep(at("token").value);
    who = await api.get("whoami");
    at("token").value = "";
    signedIn(ends);
  } catch (error) {
    api.forget();
    who = null;
    at("sign-in-error").textContent = error.message;
    at("token").focus();
  }
  button.disabled = false;
});

at("sign-out").addEventListener("click", () => signOut(""));
addEventListener("hashchange", () => show());
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  (at("view").querySelector("h1") ?? at("sign-in-title")).focus();
});
at("token").focus();
