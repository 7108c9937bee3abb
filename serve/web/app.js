/** The playground: the form, one request at a time, and what is shown of it. */

import { ApiError, getJson, postEvents, postJson, storeKey } from "./api.js";
import { Canvas } from "./canvas.js";
import { byId, copyText, element } from "./dom.js";
import { canvasOf, clearInvalid, focusField, isHole, requestOf } from "./form.js";
import { Player } from "./player.js";
import { showComparison, showStats } from "./report.js";

const MOST_PREVIEWED = 512; // cells drawn before the server has agreed to the length

const player = new Player(new Canvas(byId("canvas"), byId("cell-info")));
let models = {};
let running = null; // the AbortController of the request in work
let untouched = true; // nothing has run: the canvas shows what the form asks for

// --- what is said ----------------------------------------------------------------------------------

function say(text) {
  byId("status").textContent = text;
}

function showError(error) {
  const box = byId("error");
  box.textContent = error.message;
  if (error.status === 401) {
    byId("key-form").hidden = false;
    byId("api-key").focus();
  } else if (!focusField(error.param)) {
    box.scrollIntoView({ block: "nearest" });
  }
}

function clearError() {
  byId("error").textContent = "";
  clearInvalid();
}

// --- one request at a time -------------------------------------------------------------------------

function setRunning(controller) {
  running = controller;
  const stop = byId("stop-button");
  const hadFocus = document.activeElement === stop;
  stop.disabled = controller === null;
  if (hadFocus && stop.disabled) byId("run").focus();
  // Not `disabled`: that would take the focus away from the button that was just pressed.
  for (const id of ["run", "compare"]) {
    byId(id).setAttribute("aria-disabled", String(controller !== null));
  }
  document.body.classList.toggle("busy", controller !== null);
}

/** Do `work`; what goes wrong, and Stop, is told here. */
async function attempt(work) {
  clearError();
  try {
    await work();
  } catch (error) {
    if (error.name === "AbortError") {
      say("Stopped.");
      return;
    }
    say("Failed.");
    showError(error);
    if (!(error instanceof ApiError)) throw error; // a mistake of this page: the console tells where
  }
}

/** Do `work(signal)` as the one request in work. */
async function exclusively(work) {
  if (running !== null) return;
  const controller = new AbortController();
  setRunning(controller);
  await attempt(() => work(controller.signal)).finally(() => setRunning(null));
}

function stop() {
  if (running !== null) running.abort();
}

// --- generate --------------------------------------------------------------------------------------

function chosen() {
  return models[byId("model").value];
}

async function generate(signal) {
  const body = {
    ...requestOf({ diffusion: chosen()?.kind !== "teacher" }),
    model: byId("model").value || undefined,
    stream: true,
    denoising: true,
  };
  const shape = canvasOf();
  say("Waiting for the first step …");
  let id = null;
  for await (const event of postEvents("/generate", body, signal)) {
    if (event.id !== undefined) {
      id = event.id;
      begin(shape);
    } else if (event.done !== undefined) {
      finish(event.done);
    } else {
      byId("text").append(event.text);
      byId("copy").disabled = false;
      if (event.denoising !== undefined) player.add(event.denoising);
    }
  }
  await loadReplay(id, signal);
}

/** The server has taken the request on. */
function begin(shape) {
  untouched = false;
  player.reset(shape);
  byId("text").textContent = "";
  byId("copy").disabled = true;
  byId("stats-section").hidden = true;
  byId("denoising").scrollIntoView({ block: "nearest" }); // on a phone it is below the form
  say("Denoising …");
}

function finish(answer) {
  byId("text").textContent = answer.choices[0].text;
  byId("copy").disabled = false;
  showStats(byId("stats"), answer, (seed) => {
    byId("seed").value = String(seed);
    byId("settings").open = true;
    byId("seed").focus();
  });
  byId("stats-section").hidden = false;
  const why = answer.choices[0].finish_reason === "stop" ? "at its end" : "at full length";
  say(
    `Finished ${why}: ${answer.completion_tokens} tokens in ${answer.stats.total_s.toFixed(2)} s.`,
  );
}

/** The server's own record of the request: also the chat template, where there is one. */
async function loadReplay(id, signal) {
  try {
    const kept = await getJson(`/generate/${id}/trajectory`, signal);
    const [row] = kept.rows;
    player.replace(row, row.steps);
  } catch (error) {
    if (error.code !== "trajectory_not_found") throw error;
    say(`${byId("status").textContent} The server keeps no replays; this one is the page's own.`);
  }
}

// --- compare ---------------------------------------------------------------------------------------

async function compare(signal) {
  const body = requestOf({ diffusion: true });
  say("Comparing: the student, then the teacher …");
  const found = await postJson("/compare", body, signal);
  showComparison(byId("comparison-body"), found);
  byId("comparison").hidden = false;
  byId("comparison").scrollIntoView({ block: "nearest" });
  say("Compared.");
}

// --- the models of this server ---------------------------------------------------------------------

async function loadModels() {
  const { models: found, limits } = await getJson("/stats");
  models = found;
  const options = Object.keys(models).map((name) =>
    element("option", { value: name }, `${name} (${models[name].kind})`),
  );
  byId("model").replaceChildren(...options);
  byId("compare").hidden = !Object.values(models).some((model) => model.kind === "teacher");
  byId("model").title = `A request may take ${limits.timeout_s} s.`;
  showModel();
}

function showModel() {
  const model = chosen();
  if (model === undefined) return;
  const millions = (model.parameters / 10 ** 6).toLocaleString("en", { maximumFractionDigits: 1 });
  const facts = [
    `${millions} M parameters`,
    model.dtype,
    model.device,
    `context of ${model.max_length.toLocaleString("en")} tokens`,
  ];
  if (!model.fills_holes) facts.push("sees the text before a hole only");
  byId("model-info").textContent = facts.join(" · ");
  byId("diffusion").disabled = model.kind === "teacher";
  byId("chat").disabled = !model.chat;
  if (!model.chat) byId("chat").checked = false;
}

// --- tabs, keys, the first look --------------------------------------------------------------------

const TABS = ["tab-hole", "tab-continue"].map(byId);

function choose(tab) {
  for (const one of TABS) {
    const selected = one === tab;
    one.setAttribute("aria-selected", String(selected));
    one.tabIndex = selected ? 0 : -1;
    byId(one.getAttribute("aria-controls")).hidden = !selected;
  }
  preview();
}

function preview() {
  if (!untouched) return;
  const shape = canvasOf();
  player.reset({ ...shape, length: Math.min(shape.length, MOST_PREVIEWED) });
  byId("counter").textContent = isHole() ? "a hole to fill" : "a text to continue";
}

for (const [number, tab] of TABS.entries()) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const to = {
      ArrowLeft: number - 1,
      ArrowRight: number + 1,
      Home: 0,
      End: TABS.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = TABS[(to + TABS.length) % TABS.length];
    choose(next);
    next.focus();
  });
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  exclusively(generate);
});
byId("ask").addEventListener("input", preview);
byId("model").addEventListener("change", showModel);
byId("stop-button").addEventListener("click", stop);
byId("compare").addEventListener("click", () => exclusively(compare));
byId("copy").addEventListener("click", async () => say(await copyText(byId("text"))));

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    exclusively(generate);
  }
});

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(async () => {
    storeKey(byId("api-key").value.trim());
    await loadModels();
    byId("key-form").hidden = true;
    byId("api-key").value = "";
    byId("run").focus();
    say("The key fits.");
  });
});

preview();
attempt(loadModels);
