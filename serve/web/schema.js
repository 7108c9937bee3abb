/** JSON Schema as people read it: names, types, defaults; `$ref` and `anyOf` resolved. */

/** The schema itself, if it is a reference to one. */
export function resolve(api, schema) {
  if (schema.$ref === undefined) return schema;
  const path = schema.$ref.slice(2).split("/");
  const found = path.reduce((node, part) => node?.[part], api);
  return found === undefined ? {} : { title: path.at(-1), ...found };
}

/** A bound as one would say it; 2**63 has more digits than a JavaScript number. */
function numberText(value) {
  const power = Math.log2(value);
  return Number.isInteger(power) && power >= 16 ? `2^${power}` : String(value);
}

/** Bounds as one would write them: ≥ 1, < 10. */
function bounds(schema) {
  const signs = { minimum: "≥", exclusiveMinimum: ">", maximum: "≤", exclusiveMaximum: "<" };
  return Object.entries(signs)
    .filter(([name]) => schema[name] !== undefined)
    .map(([name, sign]) => `${sign} ${numberText(schema[name])}`)
    .join(", ");
}

/** "integer ≥ 1 or null", "string[]", "GenerateResponse". */
export function typeText(api, schema) {
  const options = schema.anyOf ?? schema.oneOf;
  if (options !== undefined) {
    return [...new Set(options.map((one) => typeText(api, one)))].join(" or ");
  }
  if (schema.$ref !== undefined) return resolve(api, schema).title;
  if (schema.allOf !== undefined) return schema.allOf.map((one) => typeText(api, one)).join(" and ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum !== undefined) return schema.enum.map((one) => JSON.stringify(one)).join(" or ");
  if (schema.type === "array") {
    const item = typeText(api, schema.items ?? {});
    return item.includes(" ") ? `list of (${item})` : `list of ${item}`;
  }
  if (schema.type === "object" && typeof schema.additionalProperties === "object") {
    return `object of ${typeText(api, schema.additionalProperties)}`;
  }
  return [schema.type ?? "any", bounds(schema)].filter(Boolean).join(" ");
}

/** A default of null is not written down in OpenAPI: it is that of a field that may be null. */
function defaultText(field, required) {
  if (field.default !== undefined) return JSON.stringify(field.default);
  const nullable = (field.anyOf ?? []).some((one) => one.type === "null");
  return nullable && !required ? "null" : "";
}

/** The fields of an object: name, type, required, default, description. */
export function fieldsOf(api, schema) {
  const required = new Set(schema.required ?? []);
  return Object.entries(schema.properties ?? {}).map(([name, field]) => ({
    name,
    type: typeText(api, field),
    required: required.has(name),
    default: defaultText(field, required.has(name)),
    description: field.description ?? "",
  }));
}

/** All references in a schema, at any depth, without following them. */
function references(node) {
  if (node === null || typeof node !== "object") return [];
  const own = typeof node.$ref === "string" ? [node.$ref] : [];
  return [...own, ...Object.values(node).flatMap(references)];
}

/** An object and the objects it is made of, each once: [{name, schema}]. */
export function declaration(api, schema) {
  const found = [{ name: schema.title ?? "Answer", schema }];
  const seen = new Set();
  for (const { schema: one } of found) {
    for (const $ref of references(one)) {
      if (seen.has($ref)) continue;
      seen.add($ref);
      found.push({ name: $ref.split("/").at(-1), schema: resolve(api, { $ref }) });
    }
  }
  return found.filter((part) => part.schema.properties !== undefined);
}
