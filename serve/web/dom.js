/** Elements from text, never from HTML: whatever a model writes stays text. */

/** The element with this id. Throws if the page has none. */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no #${id}`);
  return found;
}

/** A new element. Properties whose value is undefined are left out; strings become text nodes. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined) continue;
    if (name === "class") made.className = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Copy a text. Without a clipboard (a page over plain HTTP) its element is selected instead. */
export async function copyText(source) {
  if (navigator.clipboard !== undefined) {
    await navigator.clipboard.writeText(source.textContent);
    return "Copied.";
  }
  getSelection().selectAllChildren(source);
  return "Selected; press Ctrl+C to copy.";
}
