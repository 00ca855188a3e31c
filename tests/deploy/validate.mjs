// Stdin: {"modules": DIR, "objects": [...]}, stdout: for each object null (no schema for its kind here) or the list of its faults.
//
// The @kubernetes-models packages hold one compiled validator for each kind of many projects' CRDs. Those let fields pass that the schema
// does not have, and a misspelt field is the commonest fault of a manifest. So the object is handed over as a Proxy that notes which
// fields were asked for: a validator asks for every field of a structure that its schema names, there or not, and for none of a free-form
// one. What is left over in a structure is a field that does not exist.
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const { modules, objects } = JSON.parse(readFileSync(0, "utf8"));
const packages = join(modules, "@kubernetes-models");
const validators = new Map();

async function validator({ apiVersion, kind }) {
  const key = `${apiVersion}/${kind}`;
  if (!validators.has(key)) validators.set(key, await load(apiVersion, kind));
  return validators.get(key);
}

async function load(apiVersion, kind) {
  for (const name of readdirSync(packages)) {
    if (name === "apimachinery" || name === "base" || name === "validate") continue;
    for (const ending of [".js", ".mjs"]) {
      const model = join(packages, name, apiVersion, kind + ending);
      if (!existsSync(model)) continue;
      const schema = readFileSync(model, "utf8").match(/from\s*"(?:\.\.\/)+_schemas\/([^"]+\.m?js)"/);
      if (schema) return (await import(pathToFileURL(join(packages, name, "_schemas", schema[1])))).validate;
    }
  }
  return null;
}

function watched(value, path, seen) {
  if (value === null || typeof value !== "object") return value;
  const asked = new Set();
  let whole = Array.isArray(value);
  const children = new Map();
  const note = { value, path, asked, whole: () => whole };
  seen.push(note);
  return new Proxy(value, {
    get(target, key) {
      if (typeof key === "symbol" || Array.isArray(target) && key === "length") return target[key];
      asked.add(key);
      if (!children.has(key)) children.set(key, Object.hasOwn(target, key) ? watched(target[key], `${path}/${key}`, seen) : target[key]);
      return children.get(key);
    },
    has(target, key) {
      asked.add(key);
      return key in target;
    },
    ownKeys(target) {
      whole = true; // a map: every key is looked at
      return Reflect.ownKeys(target);
    },
  });
}

function faults(validate, object) {
  const seen = [];
  const found = [];
  if (!validate(watched(object, "", seen)))
    for (const { instancePath, message, keyword, params } of validate.errors)
      found.push(`${instancePath || "/"}: ${message ?? `${keyword} ${JSON.stringify(params)}`}`);
  for (const { value, path, asked, whole } of seen)
    if (asked.size && !whole())
      for (const key of Object.keys(value)) if (!asked.has(key)) found.push(`${path}/${key}: no such field`);
  return found;
}

const answers = [];
for (const object of objects) {
  const validate = await validator(object);
  answers.push(validate ? faults(validate, object) : null);
}
process.stdout.write(JSON.stringify(answers));
