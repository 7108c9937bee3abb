/** Replay: a scrubber over denoising steps, with play, previous and next. */

import { byId } from "./dom.js";

const WHOLE_MS = 4000; // a replay takes about so long, however many steps it has
const SLOWEST_MS = 600;
const FASTEST_MS = 40;

export class Player {
  #canvas;
  #steps = [];
  #timer = null;
  #range = byId("scrubber");
  #buttons = { previous: byId("previous"), play: byId("play"), next: byId("next") };

  constructor(canvas) {
    this.#canvas = canvas;
    this.#range.addEventListener("input", () => {
      this.pause();
      this.#draw();
    });
    this.#buttons.previous.addEventListener("click", () => this.#go(this.#at - 1));
    this.#buttons.next.addEventListener("click", () => this.#go(this.#at + 1));
    this.#buttons.play.addEventListener("click", () => {
      if (this.#timer === null) this.#play();
      else this.pause();
    });
  }

  get #at() {
    return this.#range.valueAsNumber;
  }

  /** A new canvas, without steps. */
  reset(shape) {
    this.pause();
    this.#canvas.reset(shape);
    this.#take([]);
    this.#draw();
  }

  /** A step has just happened: go on to it, unless an earlier one is being looked at. */
  add(step) {
    const following = this.#at === this.#steps.length;
    this.#take([...this.#steps, step]);
    if (following) this.#range.value = this.#steps.length;
    this.#draw();
  }

  /** All steps of a finished request; the one that is looked at stays, the end follows. */
  replace(shape, steps) {
    const at = this.#at === this.#steps.length ? steps.length : this.#at;
    this.#canvas.reset(shape);
    this.#take(steps);
    this.#range.value = at;
    this.#draw();
  }

  pause() {
    if (this.#timer !== null) clearInterval(this.#timer);
    this.#timer = null;
    this.#buttons.play.textContent = "▶ Play";
    this.#buttons.play.setAttribute("aria-label", "Play");
  }

  #take(steps) {
    this.#steps = steps;
    this.#range.max = steps.length;
    this.#range.disabled = steps.length === 0;
  }

  #go(step) {
    this.pause();
    this.#range.value = step;
    this.#draw();
  }

  #play() {
    if (this.#at === this.#steps.length) this.#range.value = 0;
    this.#draw();
    this.#buttons.play.textContent = "❚❚ Pause";
    this.#buttons.play.setAttribute("aria-label", "Pause");
    const delay = Math.min(SLOWEST_MS, Math.max(FASTEST_MS, WHOLE_MS / this.#steps.length));
    this.#timer = setInterval(() => {
      this.#range.value = this.#at + 1;
      this.#draw();
      if (this.#at === this.#steps.length) this.pause();
    }, delay);
  }

  #draw() {
    const open = this.#canvas.show(this.#steps.slice(0, this.#at));
    const text = `step ${this.#at} of ${this.#steps.length}, ${open} open`;
    byId("counter").textContent = text;
    this.#range.setAttribute("aria-valuetext", text);
    const { previous, play, next } = this.#buttons;
    play.disabled = this.#steps.length === 0;
    // A button that is disabled under the fingers would lose the focus; these two only look it.
    previous.setAttribute("aria-disabled", String(this.#at === 0));
    next.setAttribute("aria-disabled", String(this.#at === this.#steps.length));
    previous.disabled = next.disabled = this.#steps.length === 0;
  }
}
