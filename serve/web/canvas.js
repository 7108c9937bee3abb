/** The canvas: text, one cell for each token position, text; drawn at any denoising step.
 *
 * Cells are one stop of the Tab key; the arrow keys move among them. Knows nothing of the server.
 */

import { element } from "./dom.js";

// White space in a cell is marked; a line break also breaks the line.
const MARKS = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍" };

function markOf(character) {
  if (character in MARKS) return MARKS[character];
  const code = character.codePointAt(0);
  return code < 0x20 ? String.fromCodePoint(0x2400 + code) : code === 0x7f ? "␡" : null;
}

/** A token's text as nodes in which white space and control characters can be seen. */
export function visible(text) {
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain !== "") nodes.push(plain);
    plain = "";
  };
  for (const character of text) {
    const mark = markOf(character);
    if (mark === null) {
      plain += character;
      continue;
    }
    flush();
    nodes.push(element("span", { class: "mark" }, mark));
    if (character === "\n") nodes.push("\n");
  }
  flush();
  return nodes;
}

/** Confidence as a part of 1, for the colour. Negative entropies (nats) become one over perplexity. */
function sureness(confidence) {
  if (confidence === null) return 0; // an end token that was kept last: sure of nothing
  return confidence < 0 ? Math.exp(confidence) : Math.min(1, confidence);
}

/** What is known of a position after the steps so far. */
function filledAfter(steps) {
  const filled = new Map();
  steps.forEach((step, number) => {
    step.positions.forEach((position, i) => {
      filled.set(position, {
        token: step.tokens[i],
        id: step.token_ids[i],
        confidence: step.confidence[i],
        seconds: step.seconds,
        step: number + 1,
      });
    });
  });
  return filled;
}

export class Canvas {
  #place;
  #info;
  #cells = [];
  #shown = []; // for each cell the number of the step that filled it, 0 = open
  #current = 0; // the cell that Tab reaches

  /** `info`: told what a cell holds when it is pointed at or focused. */
  constructor(place, info) {
    this.#place = place;
    this.#info = info;
    place.addEventListener("keydown", (event) => this.#move(event));
    place.addEventListener("focusin", (event) => this.#tell(event.target));
    place.addEventListener("pointerover", (event) => this.#tell(event.target));
    place.addEventListener("click", (event) => {
      const index = this.#cells.indexOf(event.target.closest(".cell"));
      if (index >= 0) this.#goTo(index);
    });
  }

  /** Begin anew with all positions open. */
  reset({ before, after, length }) {
    this.#cells = Array.from({ length }, () => element("span", { role: "img", tabindex: "-1" }));
    this.#shown = Array.from({ length }, () => -1);
    this.#current = 0;
    const hole = this.#cells.flatMap((cell) => [cell, element("wbr")]);
    this.#place.replaceChildren(
      element("span", { class: "given" }, before),
      ...hole,
      element("span", { class: "given" }, after),
    );
    if (length > 0) this.#cells[0].tabIndex = 0;
    this.show([]);
  }

  /** Draw what these steps have filled. Returns how many positions are open. */
  show(steps) {
    const filled = filledAfter(steps);
    this.#cells.forEach((cell, position) => {
      const found = filled.get(position);
      const step = found === undefined ? 0 : found.step;
      if (this.#shown[position] === step) return;
      this.#shown[position] = step;
      if (found === undefined) this.#open(cell, position);
      else this.#fill(cell, position, found);
    });
    return this.#cells.length - filled.size;
  }

  #open(cell, position) {
    cell.className = "cell masked";
    cell.style.removeProperty("--confidence");
    cell.replaceChildren("\u00a0\u00a0");
    this.#name(cell, `token ${position + 1} of ${this.#cells.length}: open`);
  }

  #fill(cell, position, { token, id, confidence, seconds, step }) {
    cell.className = "cell filled";
    cell.style.setProperty("--confidence", `${Math.round(sureness(confidence) * 100)}%`);
    // A special token, such as the end, has no text.
    const nodes = token === "" ? [element("span", { class: "mark" }, `⟨${id}⟩`)] : visible(token);
    cell.replaceChildren(...nodes);
    const text = token === "" ? `special token ${id}` : JSON.stringify(token);
    this.#name(
      cell,
      `token ${position + 1} of ${this.#cells.length}: ${text}, confidence` +
        ` ${confidence === null ? "none" : confidence.toFixed(3)}, step ${step}, after ${seconds.toFixed(2)} s, id ${id}`,
    );
  }

  #name(cell, text) {
    cell.title = text;
    cell.setAttribute("aria-label", text);
    if (cell === document.activeElement) this.#tell(cell);
  }

  #tell(target) {
    const cell = target.closest(".cell");
    if (cell !== null) this.#info.textContent = cell.title;
  }

  #goTo(index) {
    this.#cells[this.#current].tabIndex = -1;
    this.#current = index;
    this.#cells[index].tabIndex = 0;
    this.#cells[index].focus();
  }

  #move(event) {
    const last = this.#cells.length - 1;
    const to = {
      ArrowLeft: Math.max(0, this.#current - 1),
      ArrowRight: Math.min(last, this.#current + 1),
      Home: 0,
      End: last,
    }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.#goTo(to);
  }
}
