// One guest: its chain of trust, stage by stage.

import { get } from "./api.js";
import { badge, code, el, head, shape, time, verdictOf } from "./dom.js";

const VERDICTS = { "passed": "passed", "not-checked": "not checked", "failed": "failed" };

export async function guest(id, context) {
  const found = await get(`guests/${encodeURIComponent(id)}`, {}, context.signal);
  const refused = found.verdict === "refused";
  const facts = [
    ["Verdict", badge(verdictOf(found.verdict), found.verdict)],
    ["Appraised (UTC)", time(found.time)],
    ["TEE", [found.tee, found.simulated && [" ", el("span", { class: "tag" }, "simulated: no hardware protects it")]]],
    !refused && ["Token good until (UTC)", time(found.expires)],
    !refused && ["Appraisal policy", found.policy],
    found.tenants.length > 0 && ["Tenants whose keys it asked for", found.tenants.join(", ")],
    found.audit > 0 && ["Audit entry", el("a", { href: `#/audit?before=${found.audit + 1}` }, String(found.audit))],
    [refused ? "TEE key, by its own word" : "TEE key (thumbprint)", code(found.guest.replace(/^guest:/, "") || "–"), "wide"],
    !refused && ["Measurement", code(found.measurement || "–"), "wide"],
    refused && ["Why it was refused", found.reason, "wide"],
    found.cut && ["Evidence", "It was too long to be kept whole.", "wide"],
  ].filter(Boolean);
  const counts = Object.keys(VERDICTS).map((verdict) => [verdict, found.chain.filter((stage) => stage.verdict === verdict).length]);
  const summary = counts.filter(([, count]) => count > 0).map(([verdict, count]) => `${count} ${VERDICTS[verdict]}`).join(", ");
  return {
    title: `Guest ${found.id}`,
    status: `Guest ${found.id}: ${found.verdict}. Stages: ${summary}.`,
    content: [
      el("a", { class: "back", href: refused ? "#/refused" : "#/guests" }, "All guests"),
      head(`Guest ${found.id}`, el("button", { type: "button", onclick: context.reload }, "Refresh")),
      el("dl", { class: "facts panel" }, facts.map(([name, value, className]) =>
        el("div", { class: className }, el("dt", {}, name), el("dd", {}, value)))),
      el("h2", { id: "chain-title" }, "Chain of trust"),
      el("p", { class: "muted" }, `${found.chain.length} stages: ${summary}. Each stands on those before it.`),
      el("ol", { class: "chain", "aria-labelledby": "chain-title" }, found.chain.map(stage)),
    ],
  };
}

function stage(stage, at) {
  const verdict = Object.hasOwn(VERDICTS, stage.verdict) ? stage.verdict : "not-checked";
  return el("li", { class: `stage ${verdict}-line`, "data-stage": stage.id, "data-verdict": verdict },
    shape(verdict, "mark"),
    el("div", { class: "stage-body" },
      el("div", { class: "stage-head" },
        el("h3", {}, el("span", { class: "step" }, `${at + 1}`), " ", stage.title),
        badge(verdict)),
      el("p", { class: "why" }, stage.why),
      stage.checks.length > 0 && el("ul", { class: "checks", "aria-label": `Checks of stage ${stage.title}` }, stage.checks.map(check))));
}

function check(check) {
  const expected = check.expected.length === 0
    ? el("span", { class: "muted" }, "–")
    : el("ul", {}, check.expected.map((value) => el("li", { class: "code" }, value)),
      check.more > 0 && el("li", { class: "muted" }, `and ${check.more} more`));
  const found = check.found === null ? el("span", { class: "muted" }, "–") : el("div", { class: "code" }, check.found);
  return el("li", { class: `check ${check.verdict === "failed" ? "failed-check" : ""}` },
    el("div", { class: "check-what" }, el("strong", {}, check.what), badge(check.verdict)),
    el("dl", {},
      el("div", {}, el("dt", {}, "Expected"), el("dd", {}, expected)),
      el("div", {}, el("dt", {}, "Found"), el("dd", { class: "found" }, found)),
      check.by && el("div", { class: "by" }, el("dt", {}, "By"), " ", el("dd", {}, check.by))));
}
