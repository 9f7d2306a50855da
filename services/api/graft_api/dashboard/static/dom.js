// Makes elements. Text is always a text node: nothing that a user wrote is ever read as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. Keys that begin with "on" are listeners, `false` and `null` leave an attribute out. */
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function s(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** Draw what an element holds anew, but only if what it depends on has changed: focus and selection stay. */
export function redraw(element, facts, make) {
  const key = JSON.stringify(facts);
  if (element.drawnFrom === key) return;
  element.drawnFrom = key;
  const held = element.contains(document.activeElement) && meaningOf(document.activeElement);
  element.replaceChildren(...[make()].flat().filter(Boolean));
  if (!held) return;
  const same = [...element.querySelectorAll("a, button:enabled")].find((each) => meaningOf(each) === held);
  same?.focus({ preventScroll: true }); // never something else, which the next Enter would do
}

/** What a link or a button does, as far as it says so. */
const meaningOf = ({ href, ariaLabel, textContent }) => href || ariaLabel || textContent;

let ids = 0;

/** An id that no other element of this page has. */
export function newId(prefix) {
  ids += 1;
  return `${prefix}-${ids}`;
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value == null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}
