// Resources, by name and never by value, and the leases of them.

import { get } from "./api.js";
import { badge, brief, code, count, el, head, table, time } from "./dom.js";

const AT_ONCE = 100;

function pages(address, after, next) {
  return el("p", { class: "pages" },
    after && el("a", { class: "button", href: address }, "First page"),
    next && el("a", { class: "button", href: `${address}?after=${encodeURIComponent(next)}` }, "Next page"));
}

export async function resources(parameters, context) {
  const after = parameters.get("after");
  const found = await get("resources", { after, most: AT_ONCE }, context.signal);
  const rows = found.map((resource) => [
    code(resource.path),
    resource.kind,
    String(resource.version),
    resource.versions.join(", "),
    resource.lease_seconds === undefined ? "for good" : duration(resource.lease_seconds),
    time(resource.changed),
  ]);
  const columns = [["Path", "wrap"], ["Kind"], ["Version", "number"], ["Versions kept"], ["Released"], ["Changed (UTC)", "time"]];
  return {
    title: "Resources",
    status: count(found.length, "resource"),
    content: [
      head("Resources", el("button", { type: "button", onclick: context.reload }, "Refresh")),
      el("p", { class: "lead" }, "What guests can ask for. Values are released to attested guests only: they are not shown to anybody."),
      table(after ? `Resources after ${after}` : "Resources", columns, rows, "There are no resources, or none that you may see."),
      pages("#/resources", after, found.length === AT_ONCE && found.at(-1).path),
    ],
  };
}

function duration(seconds) {
  for (const [unit, length] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    if (seconds % length === 0) return `for ${seconds / length} ${unit}${seconds === length ? "" : "s"} at a time`;
  }
  return `for ${seconds} seconds at a time`;
}

export async function leases(parameters, context) {
  const after = parameters.get("after");
  const found = await get("leases", { after, most: AT_ONCE }, context.signal);
  const now = Date.now() / 1000;
  const rows = found.map((lease) => [
    brief(lease.name),
    state(lease, now),
    code(lease.path),
    String(lease.version),
    time(lease.renewed),
    time(lease.revoked ?? lease.ends),
    brief(lease.guest.replace(/^guest:/, ""), 12),
    brief(lease.measurement, 12),
  ]);
  const columns = [["Lease"], ["State"], ["Resource", "wrap"], ["Version", "number"], ["Granted or renewed (UTC)", "time"],
    ["Ends, ended or revoked (UTC)", "time"], ["Guest"], ["Measurement"]];
  return {
    title: "Leases",
    status: count(found.length, "lease"),
    content: [
      head("Leases", el("button", { type: "button", onclick: context.reload }, "Refresh")),
      el("p", { class: "lead" }, "Who holds which resource, and until when: a guest renews a lease by attesting again, or gives the resource up."),
      table(after ? `Leases after ${after}` : "Leases", columns, rows, "There are no leases, or none that you may see."),
      pages("#/leases", after, found.length === AT_ONCE && found.at(-1).name),
    ],
  };
}

function state(lease, now) {
  if (lease.revoked !== undefined) return badge("failed", "revoked");
  return lease.ends <= now ? badge("not-checked", "ended") : badge("passed", "held");
}
