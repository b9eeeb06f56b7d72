// The elements of the page, and a short way to make new ones.

export const $ = (id) => document.getElementById(id);

/** An element; `properties` are set on it, keys with a hyphen (and "for", "role") as attributes. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "for" || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

export const plain = (name) => name.replaceAll("_", " ");

/** A number as people read it, at most four digits after the point. */
export const short = (number) => String(Number(Number(number).toFixed(4)));
