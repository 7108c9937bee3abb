/** Server-sent events, parsed by hand: EventSource can neither POST nor send a key. */

/** Takes text in pieces, split anywhere, and gives the data of each event that is complete. */
export class EventParser {
  #rest = ""; // a line without its end
  #data = []; // data lines of the event that is being read
  #afterReturn = false; // the last character was a CR; an LF now belongs to it

  feed(text) {
    const found = [];
    for (const character of text) {
      const belongs = this.#afterReturn && character === "\n";
      this.#afterReturn = character === "\r";
      if (belongs) continue;
      if (character !== "\n" && character !== "\r") {
        this.#rest += character;
        continue;
      }
      const line = this.#rest;
      this.#rest = "";
      if (line !== "") {
        this.#take(line);
      } else if (this.#data.length > 0) {
        found.push(this.#data.join("\n"));
        this.#data = [];
      }
    }
    return found;
  }

  #take(line) {
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    if (field !== "data") return; // comments have an empty field; other fields are of no use here
    const value = colon < 0 ? "" : line.slice(colon + 1);
    this.#data.push(value.startsWith(" ") ? value.slice(1) : value);
  }
}

/** The events of a response, as objects. */
export async function* readEvents(response) {
  const parser = new EventParser();
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      const text = done ? decoder.decode() : decoder.decode(value, { stream: true });
      for (const data of parser.feed(text)) yield JSON.parse(data);
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => {}); // already aborted: there is nothing left to cancel
  }
}
