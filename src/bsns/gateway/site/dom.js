// Elements, and figures as people read them. All text becomes text nodes: what nodes say of themselves is no markup.

const SVG = "http://www.w3.org/2000/svg";
const KEPT = new Set(["open", "style"]); // as attributes: styles go by their own interface, as the policy wants it

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

export const el = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS(SVG, tag), attributes, children);
export const at = (id) => document.getElementById(id);

/** Set only what changed, so that nothing is announced or laid out again for no reason. */
export function say(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

/** Make a place's children like these, and keep what is there: who reads, points or has opened something is not disturbed. */
export function morph(place, children) {
  children.forEach((fresh, i) => {
    const old = place.childNodes[i];
    if (!old) place.append(fresh);
    else if (old.nodeName !== fresh.nodeName) old.replaceWith(fresh);
    else if (fresh.nodeType === Node.TEXT_NODE) say(old, fresh.data);
    else {
      for (const { name } of [...old.attributes]) if (!KEPT.has(name) && !fresh.hasAttribute(name)) old.removeAttribute(name);
      for (const { name, value } of fresh.attributes) {
        if (!KEPT.has(name) && old.getAttribute(name) !== value) old.setAttribute(name, value);
      }
      if (old.style.cssText !== fresh.style.cssText) old.style.cssText = fresh.style.cssText;
      morph(old, [...fresh.childNodes]);
    }
  });
  while (place.childNodes.length > children.length) place.lastChild.remove();
}

export const blocks = ([start, end]) => `${start}:${end}`;
export const count = (number) => number.toLocaleString("en");
export const several = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

/** Three digits at most; a node may say what is no number. */
export function digits(value) {
  if (value === null) return "–";
  if (value === 0) return "0";
  if (value >= 100) return Math.round(value).toLocaleString("en");
  if (value >= 10) return value.toFixed(1);
  return value >= 1 ? value.toFixed(2) : value.toPrecision(2);
}

export const ms = (value) => (value >= 1000 ? `${digits(value / 1000)} s` : `${digits(value)} ms`);

export function bandwidth(mbPerS) {
  if (mbPerS === null) return "";
  return mbPerS >= 1000 ? `${digits(mbPerS / 1000)} GB/s` : `${digits(mbPerS)} MB/s`;
}

export function span(seconds) {
  if (seconds < 120) return `${Math.max(0, Math.round(seconds))} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

/** A bar from 0 to 1 with its meaning in words. */
export function gauge(share, label, text) {
  const bar = el("span", { class: "fill" });
  const part = Math.min(1, Math.max(0, share));
  bar.style.setProperty("inline-size", `${100 * part}%`);
  const meter = {
    class: "gauge",
    role: "meter",
    "aria-label": label,
    "aria-valuemin": 0,
    "aria-valuemax": 100,
    "aria-valuenow": Math.round(100 * part),
    "aria-valuetext": text,
  };
  return el("span", { class: "measured" }, el("span", meter, bar), el("span", { class: "value" }, text));
}
