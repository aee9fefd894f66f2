// The live graph: this gateway and the nodes on a ring, in the order of their blocks, as a token meets them.

import { bandwidth, blocks, morph, ms, svg } from "./dom.js";

const GATEWAY = "gateway";
const SIZES = [
  // up to so many on the ring, on a narrow one half as many, so large are their cards
  { most: 12, width: 100, height: 50, title: true, name: true },
  { most: 24, width: 60, height: 28, title: true },
  { most: 80, width: 12, height: 12 },
  { most: Infinity, width: 7, height: 7 },
];
const PAD = 3;
const PLACES = [0.5, 0.42, 0.58, 0.34, 0.66]; // along a link, where its label may stand
const LABEL = { width: 64, height: 28 };
const NARROW = 520; // there the ring is pressed outwards, so that cards side by side leave room for a label

export class Graph {
  constructor(picture) {
    this.picture = picture;
    this.edges = svg("g", { class: "edges", "aria-hidden": "true" });
    this.labels = svg("g", { class: "labels", "aria-hidden": "true" });
    this.cards = svg("g", { class: "cards" });
    picture.append(this.edges, this.cards, this.labels);
    this.byName = new Map();
    this.hovered = null;
    this.pinned = null;
    this.current = GATEWAY; // the one that Tab reaches; arrow keys move on
    picture.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(picture);
  }

  show(swarm, route) {
    this.swarm = swarm;
    this.route = route;
    this.draw();
  }

  draw() {
    const { swarm, picture } = this;
    const width = picture.clientWidth;
    const height = picture.clientHeight;
    if (!swarm || !width) return;
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const names = [GATEWAY, ...swarm.nodes.map((node) => node.name)];
    const size = SIZES.find(({ most }) => names.length <= (width < NARROW ? most / 2 : most));
    this.size = size;
    const rx = Math.min(width / 2 - size.width / 2 - PAD, 330);
    const ry = height / 2 - size.height / 2 - PAD;
    this.places = new Map(
      names.map((name, i) => {
        const angle = (2 * Math.PI * i) / names.length - Math.PI / 2;
        const across = Math.sign(Math.cos(angle)) * Math.abs(Math.cos(angle)) ** (width < NARROW ? 0.5 : 0.9);
        return [name, [width / 2 + rx * across, height / 2 + ry * Math.sin(angle)]];
      }),
    );
    this.names = names;
    this.drawCards(swarm, size);
    this.drawLinks(swarm);
  }

  drawCards(swarm, size) {
    for (const [name, card] of this.byName) {
      if (this.places.has(name)) continue;
      card.remove();
      this.byName.delete(name);
      if (this.pinned === name) this.pinned = null;
      if (this.current === name) this.current = GATEWAY;
    }
    const nodes = new Map(swarm.nodes.map((node) => [node.name, node]));
    for (const name of this.names) {
      const card = this.byName.get(name) ?? this.newCard(name);
      const [x, y] = this.places.get(name);
      card.setAttribute("transform", `translate(${x - size.width / 2} ${y - size.height / 2})`);
      card.setAttribute("tabindex", name === this.current ? 0 : -1);
      card.setAttribute("aria-pressed", this.pinned === name);
      card.classList.toggle("on-route", this.route.some((hop) => hop.node === name));
      this.fill(card, name, nodes.get(name), size);
    }
  }

  newCard(name) {
    const card = svg("g", { role: "button" });
    card.addEventListener("pointerenter", () => this.hover(name));
    card.addEventListener("pointerleave", () => this.hover(null));
    card.addEventListener("focus", () => {
      this.current = name;
      this.hover(name);
    });
    card.addEventListener("blur", () => this.hover(null));
    card.addEventListener("click", () => this.pin(name));
    this.byName.set(name, card);
    this.cards.append(card);
    return card;
  }

  fill(card, name, node, size) {
    const condition = node?.condition ?? GATEWAY;
    const used = node?.cache_tokens ? 1 - node.cache_tokens_left / node.cache_tokens : 0;
    const title = node ? node.blocks.map(blocks).join(" ") : "gateway";
    const look = [condition, title, used.toFixed(2), size.width].join();
    const words = node ? `Node ${name}, blocks ${title}, ${condition}, ${Math.round(100 * used)} % of its cache in use` : "This gateway";
    card.setAttribute("aria-label", words);
    if (card.dataset.look === look) return;
    card.dataset.look = look;
    card.dataset.condition = condition;
    const { width, height } = size;
    const middle = width / 2;
    const parts = [
      svg("title", {}, words),
      svg("rect", { class: "ring", x: -4, y: -4, width: width + 8, height: height + 8, rx: 14 }),
      svg("rect", { class: "box", width, height, rx: size.title ? 10 : 6 }),
    ];
    if (size.title) {
      const y = node && size.name ? 20 : height / 2 + 5;
      parts.push(svg("text", { class: 9 * title.length > width - 8 ? "title long" : "title", x: middle, y }, fitting(title, Math.floor(width / 7.2))));
      const under = condition === "lost" ? "lost" : name;
      if (node && size.name) parts.push(svg("text", { class: "name", x: middle, y: 36 }, under));
    }
    if (node && size.name && condition !== "lost") {
      const room = width - 20;
      parts.push(svg("rect", { class: "track", x: 10, y: height - 8, width: room, height: 3, rx: 1.5 }));
      if (used > 0.004) parts.push(svg("rect", { class: "used", x: 10, y: height - 8, width: Math.max(3, room * used), height: 3, rx: 1.5 }));
    }
    card.replaceChildren(...parts);
  }

  drawLinks(swarm) {
    const chosen = this.hovered ?? this.pinned;
    const way = [GATEWAY, ...this.route.map((hop) => hop.node), GATEWAY];
    const steps = this.route.length ? way.slice(1).map((to, i) => [way[i], to]) : [];
    const onRoute = new Set(steps.map(([a, b]) => pair(a, b)));
    const measured = new Map(swarm.links.map((link) => [pair(link.a, link.b), link]));
    const around = new Set(this.names.map((name, i) => pair(name, this.names[(i + 1) % this.names.length])));
    const lines = [];
    const wanted = [];
    for (const [ends, link] of measured) {
      if (!this.places.has(link.a) || !this.places.has(link.b)) continue;
      const touches = chosen === link.a || chosen === link.b;
      const rank = touches ? 0 : onRoute.has(ends) ? 1 : around.has(ends) && !chosen ? 2 : 3;
      if (!onRoute.has(ends) && (touches || this.size.title)) {
        const kind = touches ? "touched" : chosen ? "dim" : "";
        lines.push([rank, svg("path", { class: `link ${kind}`, d: line(this.places.get(link.a), this.places.get(link.b)) })]);
      }
      if (rank < 3 && !(chosen && rank === 1)) wanted.push([rank, link]);
    }
    for (const [from, to] of steps) {
      if (!this.places.has(from) || !this.places.has(to)) continue;
      const [a, b] = [this.places.get(from), this.places.get(to)];
      lines.push([-1, svg("path", { class: "route", d: line(a, b) })], [-2, svg("path", { class: "flow", d: line(a, b) })], [-2, arrow(a, b, this.size)]);
    }
    morph(this.edges, lines.sort(([one], [other]) => other - one).map(([, shape]) => shape));
    this.drawLabels(wanted.sort(([one], [other]) => one - other).map(([, link]) => link));
  }

  /** Round trip and bandwidth at their links, as many as find a place; the table has them all. */
  drawLabels(links) {
    const taken = this.names.map((name) => box(this.places.get(name), this.size));
    const texts = [];
    for (const link of this.size.title ? links : []) {
      const [a, b] = [this.places.get(link.a), this.places.get(link.b)];
      const spots = PLACES.map((share) => [a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])]);
      const spot = spots.find((point) => !taken.some((other) => overlap(box(point, LABEL), other)));
      if (!spot) continue;
      taken.push(box(spot, LABEL));
      const wide = bandwidth(link.mb_per_s);
      const [x, y] = spot;
      const tall = wide ? LABEL.height : 16;
      texts.push(svg("rect", { x: x - LABEL.width / 2, y: y - tall / 2, width: LABEL.width, height: tall, rx: 5 }));
      texts.push(svg("text", { x, y: wide ? y - 2 : y + 4 }, ms(link.round_trip_ms)));
      if (wide) texts.push(svg("text", { class: "second", x, y: y + 11 }, wide));
    }
    morph(this.labels, texts);
  }

  hover(name) {
    this.hovered = name;
    if (this.swarm) this.drawLinks(this.swarm);
  }

  pin(name) {
    this.pinned = this.pinned === name ? null : name;
    this.draw();
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) {
      const i = this.names.indexOf(this.current);
      this.current = this.names[(i + step + this.names.length) % this.names.length];
      this.draw();
      this.byName.get(this.current).focus();
    } else if (event.key === "Enter" || event.key === " ") this.pin(this.current);
    else if (event.key === "Escape") this.pin(this.pinned);
    else return;
    event.preventDefault();
  }
}

const pair = (a, b) => (a < b ? `${a} ${b}` : `${b} ${a}`);
const line = ([ax, ay], [bx, by]) => `M${ax} ${ay}L${bx} ${by}`;
const box = ([x, y], { width, height }) => [x - width / 2, y - height / 2, x + width / 2, y + height / 2];
const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
const fitting = (text, letters) => (text.length > letters ? `${text.slice(0, letters - 1)}…` : text);

/** Where a way enters the card it leads to. */
function arrow([ax, ay], [bx, by], size) {
  const [dx, dy] = [bx - ax, by - ay];
  const inside = Math.min((size.width / 2 + 5) / Math.abs(dx || 1e-9), (size.height / 2 + 5) / Math.abs(dy || 1e-9));
  const turn = (180 / Math.PI) * Math.atan2(dy, dx);
  const place = `translate(${bx - inside * dx} ${by - inside * dy}) rotate(${turn})`;
  return svg("path", { class: "arrow", d: "M0 0L-9 -5L-9 5Z", transform: place });
}
