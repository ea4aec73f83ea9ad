// The guests that attested, and those that were refused to, the newest first.

import { get } from "./api.js";
import { badge, brief, count, el, head, table, time, verdictOf } from "./dom.js";

const AT_ONCE = 50;

const LISTS = {
  attested: ["#/guests", "Attested", "Guests whose evidence held, and what the appraisal policy found it worth."],
  refused: ["#/refused", "Refused", "Guests whose evidence did not hold: they got no token. What they say of themselves is not verified."],
};

export async function guests(list, parameters, context) {
  const before = parameters.get("before");
  const found = await get("guests", { list, before, most: AT_ONCE }, context.signal);
  const [address, , lead] = LISTS[list];
  const tabs = el("nav", { class: "tabs", "aria-label": "Lists of guests" }, Object.entries(LISTS).map(([name, [href, title]]) =>
    el("a", { href, "aria-current": name === list && "page" }, title)));
  const columns = list === "attested"
    ? [["Guest"], ["Verdict"], ["Time (UTC)", "time"], ["TEE"], ["Trust claims"], ["Measurement"], ["Tenants", "wrap"]]
    : [["Guest"], ["Verdict"], ["Time (UTC)", "time"], ["TEE"], ["Why", "long"]];
  const rows = found.map((guest) => row(guest, list));
  const caption = before ? `${LISTS[list][1]} guests before ${before}` : `${LISTS[list][1]} guests, the newest first`;
  const last = found.at(-1);
  return {
    title: "Guests",
    status: count(found.length, "guest"),
    content: [
      head("Guests", el("button", { type: "button", onclick: context.reload }, "Refresh")),
      tabs,
      el("p", { class: "lead" }, lead),
      table(caption, columns, rows, list === "attested" ? "No guest has attested yet." : "No guest was refused."),
      el("p", { class: "pages" },
        before && el("a", { class: "button", href: address }, "Newest"),
        found.length === AT_ONCE && el("a", { class: "button", href: `${address}?before=${encodeURIComponent(last.id)}` }, "Older")),
    ],
  };
}

function row(guest, list) {
  const name = el("a", { href: `#/guests/${encodeURIComponent(guest.id)}` }, guest.id, " ", brief(guest.guest.replace(/^guest:/, ""), 10));
  const tee = [guest.tee, guest.simulated && [" ", el("span", { class: "tag" }, "simulated")]];
  const start = [name, badge(verdictOf(guest.verdict), guest.verdict), time(guest.time), tee];
  if (list === "refused") return [...start, guest.reason];
  const claims = guest.claims.map((claim) => `${claim.name} ${claim.value}`).join(", ");
  return [...start, claims || "–", guest.measurement ? brief(guest.measurement, 12) : "–", guest.tenants.join(", ") || "–"];
}
