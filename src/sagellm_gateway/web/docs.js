"use strict";
// Everything goes in as text, never as markup.
const element = (tag, text, className) => {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  if (className) made.className = className;
  return made;
};

const resolve = (doc, schema) =>
  schema && schema.$ref ? doc.components.schemas[schema.$ref.split("/").pop()] : schema;

const routeOf = (doc, path, method, operation) => {
  const box = element("details");
  const line = element("summary");
  line.append(element("span", method.toUpperCase(), "method"), element("code", path), " ", element("span", operation.summary));
  box.append(line);
  const body = operation.requestBody && operation.requestBody.content["application/json"].schema;
  if (body) box.append(element("h4", "Request"), element("pre", JSON.stringify(resolve(doc, body), null, 2)));
  for (const [status, answer] of Object.entries(operation.responses)) {
    box.append(element("p", status + " " + answer.description));
  }
  return box;
};

fetch("openapi.json").then((answer) => answer.json()).then((doc) => {
  const main = document.getElementById("routes");
  const byTag = new Map();
  for (const [path, methods] of Object.entries(doc.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const tag = operation.tags[0];
      if (!byTag.has(tag)) byTag.set(tag, []);
      byTag.get(tag).push(routeOf(doc, path, method, operation));
    }
  }
  for (const [tag, routes] of byTag) main.append(element("h2", tag), ...routes);
});
