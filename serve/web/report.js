/** Numbers of an answer, and student and teacher side by side. */

import { element } from "./dom.js";

const MIB = 2 ** 20;

function mib(bytes) {
  return `${Math.round(bytes / MIB).toLocaleString("en")} MiB`;
}

function seconds(value) {
  return `${value.toFixed(value < 10 ? 3 : 1)} s`;
}

function forwardsText(forwards) {
  const kinds = Object.entries(forwards).map(([kind, count]) => `${count} ${kind}`);
  return kinds.length === 0 ? "none" : kinds.join(", ");
}

/** The GPU's memory where there is one, otherwise the process's. */
function peak(memory) {
  return memory.device_peak_bytes ?? memory.process_peak_bytes;
}

const ROWS = [
  ["Tokens", (answer) => String(answer.completion_tokens)],
  ["Tokens a second", (answer) => answer.stats.tokens_per_second.toFixed(1), "tokens_per_second"],
  ["Tokens a forward", (answer) => answer.stats.tokens_per_forward.toFixed(2), "tokens_per_forward"],
  ["Forwards", (answer) => forwardsText(answer.stats.forwards)],
  ["In the queue", (answer) => seconds(answer.stats.queue_s)],
  ["Computing", (answer) => seconds(answer.stats.compute_s), "compute_s"],
  ["In total", (answer) => seconds(answer.stats.total_s)],
  ["Memory, peak", (answer) => mib(peak(answer.stats.memory))],
  ["… above idle", (answer) => mib(answer.stats.memory.above_idle_bytes)],
];

function row(name, ...cells) {
  return element("tr", {}, element("th", { scope: "row" }, name), ...cells);
}

/** The small table under one answer; `useSeed` is called when its seed is clicked. */
export function showStats(table, answer, useSeed) {
  const seed = element(
    "button",
    { type: "button", class: "link", id: "reuse-seed", title: "Use this seed again" },
    String(answer.seed),
  );
  seed.addEventListener("click", () => useSeed(answer.seed));
  const rows = ROWS.map(([name, value]) => row(name, element("td", {}, value(answer))));
  table.replaceChildren(element("tbody", {}, ...rows, row("Seed", element("td", {}, seed))));
}

function column(role, answer) {
  const parts = [
    element("h3", {}, `${role} `, element("span", { class: "dim" }, answer.model)),
    element(
      "pre",
      { class: "code", tabindex: "0", "aria-label": `${role}'s text` },
      answer.choices[0].text,
    ),
  ];
  if (answer.left_only) {
    parts.push(
      element("p", { class: "note" }, `${answer.model} saw only the text before the hole.`),
    );
  }
  return element("div", { class: "column" }, ...parts);
}

/** Both texts of `POST /compare` and their numbers; the ratio is student over teacher. */
export function showComparison(place, { student, teacher, ratio }) {
  const head = ["Student", "Teacher", "Ratio"].map((text) => element("th", { scope: "col" }, text));
  const rows = ROWS.map(([name, value, key]) => {
    const over = key === undefined ? null : ratio[key];
    return row(
      name,
      element("td", {}, value(student)),
      element("td", {}, value(teacher)),
      element("td", {}, over === null || over === undefined ? "" : `${over.toFixed(2)}\u00a0×`),
    );
  });
  place.replaceChildren(
    element("div", { class: "side-by-side" }, column("Student", student), column("Teacher", teacher)),
    element(
      "div",
      { class: "scroll", tabindex: "0", role: "group", "aria-label": "Numbers of both" },
      element(
        "table",
        { class: "numbers" },
        element("thead", {}, element("tr", {}, element("td"), ...head)),
        element("tbody", {}, ...rows),
      ),
    ),
    element("p", { class: "hint" }, "Ratio: student over teacher, one after the other."),
  );
}
