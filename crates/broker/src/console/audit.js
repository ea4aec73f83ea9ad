// The audit log from its end, and whether its chain holds.

import { get } from "./api.js";
import { badge, brief, count, el, head, table, time } from "./dom.js";

const AT_ONCE = 50;

export async function audit(parameters, context) {
  const before = parameters.get("before");
  const page = await get("audit-page", { before, most: AT_ONCE }, context.signal);
  const rows = page.entries.map((entry) => [
    String(entry.number),
    time(entry.time),
    [entry.event, entry.simulated && [" ", el("span", { class: "tag" }, "simulated")]],
    brief(entry.actor, 20),
    el("span", { class: "code" }, entry.subject),
    [entry.detail, entry.policy && el("div", { class: "muted" }, `policy ${entry.policy}`),
      entry.measurement && el("div", { class: "muted" }, "measurement ", brief(entry.measurement))],
  ]);
  const columns = [["Number", "number"], ["Time (UTC)", "time"], ["Event"], ["Actor"], ["Subject", "wrap"], ["Detail", "long"]];
  return {
    title: "Audit",
    status: page.verified ? `${count(page.entries.length, "entry", "entries")}; their chain holds` : `The audit log was changed: ${page.damage}`,
    content: [
      head("Audit", el("button", { type: "button", onclick: context.reload }, "Refresh")),
      el("p", { class: "lead" }, "Every attestation, release, refusal and change. Each entry has the hash of the one before it."),
      chain(page, context),
      table(before ? `Audit entries before ${before}` : "Audit entries, the newest first", columns, rows,
        page.verified ? "There is no entry." : "These entries cannot be shown."),
      el("p", { class: "pages" },
        before && el("a", { class: "button", href: "#/audit" }, "Newest"),
        page.next && el("a", { class: "button", href: `#/audit?before=${encodeURIComponent(page.next)}` }, "Older")),
    ],
  };
}

/** What is known of the chain, and the button that has all of it checked. */
function chain(page, context) {
  const mark = el("div", {}, page.verified ? badge("passed", "Chain holds") : badge("failed", "Chain is broken"));
  const said = el("p", { role: "status" }, page.verified
    ? ["Each entry on this page follows from the one before it. The last one of the log is ", brief(`${page.head.number}:${page.head.hash}`, 20), "."]
    : page.damage);
  const button = el("button", { type: "button" }, "Check the whole chain");
  const box = el("div", { class: page.verified ? "holds panel" : "holds panel bad", id: "chain-state" }, mark, said, button);
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      const { broken, checked } = await walk(said, context.signal);
      mark.replaceChildren(broken ? badge("failed", "Chain is broken") : badge("passed", "Chain holds"));
      said.replaceChildren(broken ?? `All ${checked} entries: each follows from the one before it. Whoever keeps the last one’s hash elsewhere sees later whether the log was rewritten.`);
      box.className = broken ? "holds panel bad" : "holds panel";
    } catch (error) {
      if (error.name !== "AbortError") said.replaceChildren(`It was not checked to its end: ${error.message}`);
    }
    button.disabled = false;
    if (document.activeElement === document.body) button.focus();
  });
  return box;
}

async function walk(said, signal) {
  let checked = 0;
  for (;;) {
    const answer = await get("audit-check", { after: checked }, signal);
    if (!answer.verified) return { broken: answer.damage, checked };
    if (!answer.more || answer.checked <= checked) return { broken: null, checked: answer.checked };
    checked = answer.checked;
    said.replaceChildren(`${checked} of ${answer.last} entries checked…`);
  }
}
