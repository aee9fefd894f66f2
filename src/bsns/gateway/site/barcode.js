// The persistence barcode: at which distances clusters merge and loops open and close.

import { at, digits, el, morph, svg } from "./dom.js";

const LEFT = 4;
const RIGHT = 4;
const MOST_HEIGHT = 170;

let last = null;
addEventListener("resize", () => last && showShape(last));

export function showShape(shape) {
  last = shape;
  if (!shape) {
    morph(at("shape"), [el("p", { class: "note" }, "No node serves")]);
    return;
  }
  const words = el("ul", { class: "words" }, ...shape.words.map((line) => el("li", {}, line)));
  const assumed = shape.assumptions.length
    ? [el("details", {}, el("summary", {}, "Assumed"), el("ul", { class: "words" }, ...shape.assumptions.map((line) => el("li", {}, line))))]
    : [];
  morph(at("shape"), [picture(shape), legend(shape), words, ...assumed]);
}

function picture(shape) {
  const width = at("shape").clientWidth || 360; // drawn to scale, so that its letters are as large as all others
  const bars = [...shape.clusters.map((bar) => ["h0", bar]), ...shape.loops.map((bar) => ["h1", bar])];
  const ends = bars.flatMap(([, bar]) => bar).filter((value) => value !== null);
  const longest = Math.max(...ends, 0) || 1;
  const step = Math.max(1.5, Math.min(18, MOST_HEIGHT / bars.length));
  const height = step * bars.length;
  const x = (value) => LEFT + ((width - LEFT - RIGHT) * value) / (longest * 1.08);
  const lines = bars.map(([kind, [born, died]], row) =>
    svg("line", {
      class: kind,
      x1: x(born),
      x2: died === null ? width - RIGHT : Math.max(x(died), x(born) + 1),
      y1: step * (row + 0.5),
      y2: step * (row + 0.5),
      "stroke-width": Math.max(1, Math.min(6, step - 3)),
    }),
  );
  const ticks = [0, 0.5, 1].flatMap((share) => {
    const value = share * longest;
    const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
    return [
      svg("line", { class: "tick", x1: x(value), x2: x(value), y1: 0, y2: height + 4 }),
      svg("text", { x: x(value), y: height + 18, "text-anchor": anchor }, share ? `${digits(value)} ms` : "0"),
    ];
  });
  const label = `Barcode: ${shape.clusters.length} bars of clusters and ${shape.loops.length} of loops, up to ${digits(longest)} ms`;
  return svg("svg", { class: "barcode", viewBox: `0 0 ${width} ${height + 24}`, role: "img", "aria-label": label }, ...ticks, ...lines);
}

function legend(shape) {
  return el(
    "p",
    { class: "legend", "aria-hidden": "true" },
    el("span", { "data-mark": "h0" }, `clusters ${shape.clusters.length}`),
    el("span", { "data-mark": "h1" }, `loops ${shape.loops.length}`),
  );
}
