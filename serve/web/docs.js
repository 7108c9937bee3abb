/** The API, drawn from /openapi.json: endpoints by tag, their fields, a curl command for each. */

import { getJson, storedKey, storeKey } from "./api.js";
import { byId, copyText, element } from "./dom.js";
import { declaration, fieldsOf, resolve } from "./schema.js";

const METHODS = ["get", "post", "put", "patch", "delete"];

/** Text with `code` in backquotes as nodes. */
function inline(text) {
  return text.split("`").map((part, i) => (i % 2 === 1 ? element("code", {}, part) : part));
}

/** A docstring: paragraphs, and columns kept as they were written. */
function prose(text) {
  const parts = text.split(/\n\s*\n/).map((part) => {
    const columns = /^\S+ {2,}\S/m.test(part);
    if (columns) return element("pre", { tabindex: "0" }, part);
    return element("p", {}, ...inline(part.replace(/\s*\n\s*/g, " ")));
  });
  return element("div", { class: "prose" }, ...parts);
}

function defaultOf(field) {
  return field.default === "" ? "" : element("code", { class: "default" }, field.default);
}

function fieldTable(caption, fields) {
  const head = ["Field", "Type", "Default", "What it is"].map((text) =>
    element("th", { scope: "col" }, text),
  );
  const rows = fields.map((field) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, element("code", {}, field.name)),
      element("td", {}, field.type),
      element("td", {}, field.required ? "required" : defaultOf(field)),
      element("td", {}, ...inline(field.description)),
    ),
  );
  return element(
    "table",
    { class: "fields" },
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, ...rows),
  );
}

// --- one endpoint ----------------------------------------------------------------------------------

function shellQuoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** A command that can be pasted; `{name}` in a path becomes NAME. */
function curl(method, path, example) {
  const url = location.origin + path.replace(/\{(\w+)\}/g, (_, name) => name.toUpperCase());
  const parts = [`curl ${url}`];
  if (method !== "get" && example === undefined) parts.push(`-X ${method.toUpperCase()}`);
  if (storedKey() !== null) parts.push('-H "authorization: Bearer $MDM_API_KEY"');
  if (example !== undefined) {
    parts.push("-H 'content-type: application/json'", `-d ${shellQuoted(JSON.stringify(example))}`);
  }
  return parts.join(" \\\n  ");
}

function copyable(text) {
  const source = element("pre", { class: "code", tabindex: "0", "aria-label": "Command" }, text);
  const button = element("button", { type: "button", class: "small" }, "Copy");
  button.addEventListener("click", async () => {
    byId("status").textContent = await copyText(source);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  const heading = element("div", { class: "heading" }, element("span", { class: "hint" }, "Try it"), button);
  return element("div", { class: "example" }, heading, source);
}

function examplesOf(media, schema) {
  if (media?.examples !== undefined) return Object.values(media.examples).map((one) => one.value);
  if (media?.example !== undefined) return [media.example];
  return schema?.examples ?? [];
}

function bodyOf(api, content) {
  const media = content?.["application/json"];
  const schema = media?.schema;
  if (schema === undefined || Object.keys(schema).length === 0) return null;
  return { media, schema: resolve(api, schema) };
}

/** The schemas of an answer, its parts after it. */
function answerTables(api, schema) {
  const tables = [];
  for (const part of declaration(api, schema)) {
    if (part.schema.description) tables.push(prose(part.schema.description));
    tables.push(fieldTable(part.name, fieldsOf(api, part.schema)));
  }
  return tables;
}

function endpoint(api, path, method, operation) {
  const title = element(
    "h3",
    {},
    element("span", { class: "method" }, method.toUpperCase()),
    element("code", {}, path),
    element("span", { class: "dim" }, operation.summary ?? ""),
  );
  const parts = [title];
  if (operation.description) parts.push(prose(operation.description));
  if (operation.parameters?.length) {
    const fields = operation.parameters.map((one) => ({
      ...fieldsOf(api, { properties: { [one.name]: one.schema }, required: [one.name] })[0],
      required: one.required === true,
      description: one.description ?? `In the ${one.in}.`,
    }));
    parts.push(fieldTable("Parameters", fields));
  }
  const request = bodyOf(api, operation.requestBody?.content);
  if (request !== null) parts.push(fieldTable("Request", fieldsOf(api, request.schema)));
  const examples = request === null ? [undefined] : examplesOf(request.media, request.schema);
  parts.push(...examples.map((example) => copyable(curl(method, path, example))));
  const answer = bodyOf(api, operation.responses?.["200"]?.content);
  const tables = answer === null ? [] : answerTables(api, answer.schema);
  if (tables.length > 0) {
    parts.push(element("details", {}, element("summary", {}, "Answer"), ...tables));
  }
  return element("section", { class: "endpoint card", id: anchor(method, path) }, ...parts);
}

function anchor(method, path) {
  return `${method}${path.replaceAll(/[^a-zA-Z0-9]+/g, "-")}`;
}

// --- the page --------------------------------------------------------------------------------------

/** Statuses of answers in the server's own error shape, over all endpoints. */
function errorsOf(operations) {
  const found = new Map();
  for (const { operation } of operations) {
    for (const [status, answer] of Object.entries(operation.responses ?? {})) {
      const shape = answer.content?.["application/json"]?.schema?.$ref ?? "";
      if (shape.endsWith("/ErrorResponse")) found.set(status, answer.description);
    }
  }
  return [...found].sort();
}

function errorSection(api, errors) {
  const rows = errors.map(([status, text]) =>
    element("tr", {}, element("th", { scope: "row" }, status), element("td", {}, text)),
  );
  const shape = resolve(api, { $ref: "#/components/schemas/ErrorDetail" });
  return element(
    "section",
    { class: "endpoint card", id: "errors" },
    element("h3", {}, "Errors"),
    prose(`${shape.description ?? ""}\n\nEvery one is \`{"error": {…}}\` with these fields.`),
    fieldTable("error", fieldsOf(api, shape)),
    element("table", { class: "numbers" }, element("tbody", {}, ...rows)),
  );
}

function draw(api) {
  const operations = Object.entries(api.paths).flatMap(([path, methods]) =>
    METHODS.filter((method) => method in methods).map((method) => {
      return { path, method, operation: methods[method] };
    }),
  );
  const groups = new Map();
  for (const one of operations) {
    const tag = one.operation.tags?.[0] ?? "other";
    groups.set(tag, [...(groups.get(tag) ?? []), one]);
  }
  const links = operations.map(({ path, method }) => {
    const link = element("a", { href: `#${anchor(method, path)}` }, element("code", {}, path));
    return element("li", {}, link);
  });
  const parts = [
    prose(api.info.description ?? ""),
    element("nav", { "aria-label": "Endpoints" }, element("ul", { class: "contents" }, ...links)),
  ];
  for (const [tag, members] of groups) {
    const sections = members.map((one) => endpoint(api, one.path, one.method, one.operation));
    parts.push(element("div", { class: "group" }, element("h2", {}, tag), ...sections));
  }
  const errors = errorsOf(operations);
  if (errors.length > 0) parts.push(errorSection(api, errors));
  byId("reference").replaceChildren(...parts);
  // The part named in the address was not there when the browser looked for it.
  if (location.hash !== "") document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

async function load() {
  byId("error").textContent = "";
  byId("status").textContent = "Loading …";
  try {
    draw(await getJson("/openapi.json"));
    byId("key-form").hidden = true;
    byId("status").textContent = "";
  } catch (error) {
    byId("status").textContent = "";
    byId("error").textContent = error.message;
    if (error.status !== 401) throw error;
    byId("key-form").hidden = false;
    byId("api-key").focus();
  }
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  try {
    storeKey(byId("api-key").value.trim());
  } catch (error) {
    byId("error").textContent = error.message;
    return;
  }
  load();
});
load();
