// Tables and lists: nodes with their gauges, links, the plan, and what happened.

import { at, bandwidth, blocks, count, digits, el, gauge, morph, ms, say, several, span, svg } from "./dom.js";

const QUEUE = 16; // steps that fill the gauge
const FEW = 3;
const OPEN = "Other layouts";
const WIDE = matchMedia("(min-width: 1001px)");

export function spark(picture, history) {
  const top = Math.max(...history, 1);
  const points = history.map((value, i) => `${(100 * i) / Math.max(1, history.length - 1)},${24 - (22 * value) / top}`);
  picture.setAttribute("viewBox", "0 0 100 26");
  picture.setAttribute("preserveAspectRatio", "none");
  picture.replaceChildren(svg("polyline", { points: points.join(" ") }));
}

function cell(label, ...children) {
  return el("td", { role: "cell", "data-label": label }, ...children);
}

function strip(ranges, total) {
  const bar = el("span", { class: "strip", "aria-hidden": "true" });
  for (const [start, end] of ranges) {
    const part = el("span");
    part.style.setProperty("inset-inline-start", `${(100 * start) / total}%`);
    part.style.setProperty("inline-size", `${(100 * (end - start)) / total}%`);
    bar.append(part);
  }
  return el("span", { class: "measured" }, bar, el("span", { class: "value" }, ranges.map(blocks).join(", ")));
}

export function showNodes(swarm) {
  const rows = swarm.nodes.map((node) => {
    const used = node.cache_tokens - node.cache_tokens_left;
    const share = node.cache_tokens ? used / node.cache_tokens : 0;
    const gone = node.condition === "lost";
    const name = el(
      "th",
      { role: "rowheader", scope: "row" },
      el("span", { class: "name" }, node.name),
      el("span", { class: "condition" }, gone ? `lost ${span(Date.now() / 1000 - node.answered_s)} ago` : node.condition),
      el("span", { class: "what" }, `${node.device} ${node.dtype} ${node.executor.split(":")[0]}`),
    );
    const waiting = `${several(node.waiting, "step")}, ${several(node.sessions, "session")}`;
    return el(
      "tr",
      { role: "row", "data-condition": node.condition },
      name,
      cell("Blocks", strip(node.blocks, swarm.block_count)),
      cell("Cache", gone ? "–" : gauge(share, "Cache in use", `${Math.round(100 * share)} % of ${count(node.cache_tokens)}`)),
      cell("Queue", gone ? "–" : gauge(node.waiting / QUEUE, "Steps waiting", waiting)),
      cell("Tokens/s", gone ? "–" : digits(node.rows_per_s)),
      cell("Block time", ms(node.block_time_ms)),
      cell("Round trip", node.round_trip_ms === null || gone ? "–" : ms(node.round_trip_ms)),
    );
  });
  morph(at("nodes").tBodies[0], rows);
  say(at("nodes-note"), swarm.nodes_not_shown ? `and ${count(swarm.nodes_not_shown)} more` : "");
}

export function showLinks(swarm) {
  const rows = swarm.links.map((link) =>
    el(
      "tr",
      {},
      el("td", {}, link.a),
      el("td", {}, link.b),
      el("td", {}, `${ms(link.round_trip_ms)}${link.spread_ms ? ` ± ${digits(link.spread_ms)}` : ""}`),
      el("td", {}, bandwidth(link.mb_per_s) || "–"),
      el("td", {}, `${span(link.age_s)} ago`),
    ),
  );
  morph(at("links").tBodies[0], rows);
}

export function showPlan(plan) {
  const place = at("plan");
  if (plan.trouble !== null) {
    say(at("plan-gap"), "");
    morph(place, [el("p", { class: "error" }, plan.trouble)]);
    return;
  }
  const gap = 100 * plan.gap;
  say(at("plan-gap"), gap < 0.01 ? "proven best" : `gap ${gap.toFixed(1)} %`);
  const stages = plan.stages.map((stage) => {
    const more = stage.nodes.length > 1 ? ` +${stage.nodes.length - 1}` : "";
    const part = el(
      "li",
      { title: stage.nodes.join(", ") },
      el("b", {}, blocks(stage.blocks)),
      el("span", { class: "name" }, stage.nodes[0] + more),
      el("span", { class: "note" }, ms(stage.compute_ms)),
    );
    part.style.setProperty("flex-grow", stage.blocks[1] - stage.blocks[0]);
    return part;
  });
  const others = plan.alternatives.map((other) =>
    el(
      "tr",
      {},
      el("td", {}, other.name),
      el("td", {}, other.tokens_per_s === null ? "–" : digits(other.tokens_per_s)),
      el("td", {}, other.against),
    ),
  );
  const heads = ["Instead", "Tokens/s", "Against the plan"].map((text) => el("th", { scope: "col" }, text));
  const list = (lines) => el("ul", { class: "words" }, ...lines.map((line) => el("li", {}, line)));
  const more = (title, content) => el("details", { open: title === OPEN && WIDE.matches ? "" : null }, el("summary", {}, title), content);
  const reasons = plan.left_out.map((node) => `left out ${node.node}: ${node.reason}`);
  morph(place, [
    el("ol", { class: "stages", role: "list", "aria-label": "Stages of the plan" }, ...stages),
    list([`Predicted: ${plan.speeds}`, plan.proof, ...plan.advice, ...(reasons.length > FEW ? [] : reasons)]),
    ...(reasons.length > FEW ? [more(`Left out: ${several(reasons.length, "node")}`, list(reasons))] : []),
    ...(others.length ? [more(OPEN, el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...others))))] : []),
    ...(plan.assumptions.length ? [more("Assumed", list(plan.assumptions))] : []),
  ]);
}

let told = 0;

/** Only what is new is added, so that it alone is announced. */
export function showHappened(events) {
  const list = at("happened");
  if (events.length && events.at(-1).number < told) {
    told = 0; // another gateway's count
    list.replaceChildren();
  }
  for (const event of events.filter((one) => one.number > told)) {
    const when = new Date(1000 * event.at_s);
    const time = el("time", { datetime: when.toISOString() }, when.toLocaleTimeString([], { hour12: false }));
    list.prepend(el("li", { "data-kind": event.kind }, time, el("span", {}, event.text)));
    told = event.number;
  }
  while (list.children.length > 40) list.lastElementChild.remove();
  at("happened-none").hidden = list.children.length > 0;
}
