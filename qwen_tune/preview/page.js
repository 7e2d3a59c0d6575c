"use strict";

// Text of examples is only set as textContent or attributes; nothing here writes HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const { audit } = data;
const SUPERVISED = 1, CONTROL = 2, PER_PAGE = 10, LONG = 400, CONTEXT = 60;
const at = (id) => document.getElementById(id);
const count = (value) => value.toLocaleString("en-US");
const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
const percent = (part, whole) => `${whole ? Math.round((100 * part) / whole) : 0}%`;

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function draw(tag, properties, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function share(part, whole) {
  const bar = make("span", { class: "share" }, make("i"));
  bar.firstChild.style.width = `${whole ? (100 * part) / whole : 0}%`;
  return bar;
}

function showHead() {
  document.title = `${data.recipe} · preview`;
  at("recipe").textContent = data.recipe;
  const revision = data.revision ? ` @ ${data.revision.slice(0, 12)}` : "";
  const facts = {
    base: data.base + revision,
    template: `sha256 ${data.template.slice(0, 12)}`,
    "loss on": data.settings.loss_on,
    thinking: data.settings.thinking,
    "over-long": data.settings.overlong,
  };
  for (const [name, value] of Object.entries(facts)) {
    at("identity").append(make("span", {}, `${name} `, make("b", {}, value)));
  }
  at("version").textContent = `Written by qwen-tune ${data.version}. This file holds text of the training data.`;
}

function showCards() {
  const { rows, samples, tokens } = audit.facts;
  const dropped = Object.values(rows.dropped).reduce((sum, value) => sum + value, 0);
  const fates = [[rows.trained, "train"], [rows.evaluation, "evaluate"], [rows.not_sampled, "not drawn"]];
  const parts = fates.filter(([value]) => value).map(([value, name]) => `${count(value)} ${name}`);
  const more = samples.expanded ? ` · ${count(samples.expanded)} added by examples with several` : "";
  const again = samples.repeated ? ` · ${plural(samples.repeated, "example")} drawn again` : "";
  const cards = [
    ["Examples read", count(rows.read), [...parts, `${count(dropped)} dropped`].join(" · ")],
    ["Samples", count(samples.train + samples.evaluation),
      `${count(samples.train)} train · ${count(samples.evaluation)} evaluate${more}${again}`],
    ["Tokens", count(tokens.prepared), `longest sample ${count(audit.lengths.longest)}`],
    ["Supervised", percent(tokens.supervised, tokens.prepared), `${plural(tokens.supervised, "token")} supervised`],
  ];
  for (const [name, value, note] of cards) {
    at("cards").append(make("div", { class: "card" }, make("span", { class: "name" }, name),
      make("span", { class: "value" }, value), make("span", { class: "note" }, note)));
  }
  at("cards").lastChild.append(share(tokens.supervised, tokens.prepared));
}

function showSources() {
  const names = ["Source", "Format", "Examples", "Train", "Evaluate", "Tokens", "Supervised"];
  const kind = (index) => (index === 6 ? "bar-cell" : index > 1 ? "number" : "");
  const cell = (index, ...content) => make("td", { class: kind(index), "data-name": names[index] }, ...content);
  const heads = names.map((name, index) => make("th", { class: kind(index) }, name));
  at("sources").append(make("thead", {}, make("tr", {}, ...heads)));
  const body = make("tbody");
  for (const source of audit.sources) {
    const numbers = [source.examples, source.train, source.evaluation, source.tokens];
    body.append(make("tr", {},
      cell(0, make("b", {}, source.name), make("span", { class: "note mono" }, source.path)),
      cell(1, source.format, make("span", { class: "note" }, source.why)),
      ...numbers.map((value, index) => cell(index + 2, count(value))),
      cell(6, share(source.supervised, source.tokens), percent(source.supervised, source.tokens))));
  }
  at("sources").append(body);
}

function showLengths() {
  const { bars, limit, keeping, longest, median, over } = audit.lengths;
  at("lengths").textContent = `Tokens per sample: median ${count(median)}, longest ${count(longest)}. ` +
    (over ? `${plural(over, "sample")} longer than` : "All fit into") + ` data.max_length_tokens, ${count(limit)}.`;
  for (const [name, value] of Object.entries(keeping)) {
    at("keeping").append(make("div", {}, make("dt", {}, `${name} fit in`), make("dd", {}, count(value))));
  }
  if (!bars.length) return;
  const width = 520, height = 170, foot = 22, head = 16, room = height - foot - head;
  const step = bars[0][1], most = Math.max(...bars.map((bar) => bar[2])), slot = width / bars.length;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Histogram of lengths" });
  bars.forEach(([from, to, samples], index) => {
    const size = samples ? Math.max((room * samples) / most, 2) : 0, x = index * slot;
    const place = { x: x + slot * 0.08, y: head + room - size, width: slot * 0.84, height: size, rx: 2 };
    svg.append(draw("rect", { ...place, class: from > limit ? "over" : "within" }));
    const reach = draw("rect", { x, y: head, width: slot, height: room, class: "reach" });
    reach.append(draw("title", {}, `${count(from)} to ${count(to)} tokens: ${plural(samples, "sample")}`));
    svg.append(reach);
  });
  svg.append(draw("line", { x1: 0, x2: width, y1: head + room, y2: head + room, class: "axis" }));
  const open = longest > step * bars.length;
  for (let index = 0; index <= bars.length; index += Math.max(1, Math.round(bars.length / 6))) {
    const anchor = index === 0 ? "start" : index * slot > width - 24 ? "end" : "middle";
    svg.append(draw("text", { x: index * slot, y: height - 5, "text-anchor": anchor }, count(index * step)));
  }
  if (open) svg.append(draw("text", { x: width, y: 10, "text-anchor": "end" }, `last bar: up to ${count(longest)}`));
  const x = (limit / step) * slot;
  if (x <= width) {
    const right = x > width / 2;
    svg.append(draw("line", { x1: x, x2: x, y1: 4, y2: head + room, class: "limit" }),
      draw("text", { x: x + (right ? -6 : 6), y: 12, "text-anchor": right ? "end" : "start", class: "limit-name" },
        `limit ${count(limit)}`));
  } else {
    svg.append(draw("text", { x: width, y: 12, "text-anchor": "end", class: "limit-name" }, `limit ${count(limit)} →`));
  }
  at("histogram").append(svg);
}

function showFindings() {
  const kinds = [["dropped", audit.dropped], ["similar", audit.duplicates], ["warning", audit.warnings]];
  const findings = kinds.flatMap(([kind, list]) => list.map((found) => [kind, found]));
  for (const [kind, found] of findings) {
    const places = make("div", { class: "places" }, ...byFile(found.places).map((place) => make("span", {}, place)));
    if (found.examples > found.places.length) places.append(`and ${count(found.examples - found.places.length)} more`);
    addFinding(kind, "warn", `${plural(found.examples, "example")}: ${found.what}`, places);
  }
  for (const name of audit.silent_sources) addFinding("silent", "warn", `No sample is taken from the source ${name}.`);
  if (!audit.dropped.length) addFinding("complete", "fine", "Nothing was dropped.");
  if (!audit.duplicates.length) addFinding("distinct", "fine", "No example repeats another, and none is on both sides.");
  if (!audit.warnings.length) addFinding("clean", "fine", "No example has a warning.");
}

// ["a.jsonl:4", "a.jsonl:9"] as ["a.jsonl:4, 9"].
function byFile(places) {
  const lines = new Map();
  for (const place of places) {
    const colon = place.lastIndexOf(":"), file = place.slice(0, colon);
    lines.set(file, [...(lines.get(file) ?? []), place.slice(colon + 1)]);
  }
  return [...lines].map(([file, numbers]) => `${file}:${numbers.join(", ")}`);
}

function addFinding(badge, kind, text, ...more) {
  const body = make("div", {}, make("div", {}, text), ...more);
  at("findings").append(make("div", { class: "finding" }, make("span", { class: `badge ${kind}` }, badge), body));
}

// The samples: `chosen` are those that pass the filters, shown in pages.
const textOf = data.samples.map((sample) => sample.pieces.map((piece) => piece[0]).join("").toLowerCase());
let chosen = [], first = 0, jumpedTo = -1;

function choose() {
  const source = at("source").value, words = at("search").value.toLowerCase();
  chosen = data.samples.map((_, index) => index).filter((index) =>
    (!source || data.samples[index].source === source) && (!words || textOf[index].includes(words)));
  first = 0;
  jumpedTo = -1;
  showSamples();
}

function showSamples() {
  const shown = chosen.slice(first, first + PER_PAGE);
  const none = make("p", { class: "note" }, "No sample matches.");
  at("list").replaceChildren(...(shown.length ? shown.map(sampleCard) : [none]));
  const range = shown.length ? `${count(first + 1)}–${count(first + shown.length)} of ${count(chosen.length)}` : "0 of 0";
  for (const end of ["", "-below"]) {
    at(`position${end}`).textContent = range;
    at(`previous${end}`).disabled = first === 0;
    at(`next${end}`).disabled = first + PER_PAGE >= chosen.length;
  }
}

function sampleCard(index) {
  const sample = data.samples[index];
  const counts = `${plural(sample.tokens, "token")}, ${count(sample.supervised)} supervised`;
  const block = tokensOf(sample, index);
  const head = make("header", {}, make("b", {}, `#${index + 1}`), make("span", {}, sample.source),
    make("span", { class: "mono" }, sample.at));
  if (sample.cut) head.append(make("span", { class: "badge warn" }, "truncated at the limit"));
  head.append(make("span", { class: "counts" }, counts));
  const card = make("article", { class: "sample", id: `sample-${index + 1}` }, head, block);
  if (index === jumpedTo) card.classList.add("found");
  fold(block);
  if (block.childElementCount > LONG) {
    const more = make("button", { class: "more", type: "button", "aria-expanded": "false" }, "Show all");
    card.classList.add("long");
    more.addEventListener("click", () => {
      const long = card.classList.toggle("long");
      more.textContent = long ? "Show all" : "Show less";
      more.setAttribute("aria-expanded", String(!long));
    });
    card.append(more);
  }
  return card;
}

function tokensOf(sample, index) {
  const block = make("div", { class: "tokens" });
  const hits = hitsIn(textOf[index]);
  let position = 0, offset = 0;
  for (const [text, flags, ...ids] of sample.pieces) {
    const kinds = ["token"];
    if (flags & SUPERVISED) kinds.push("supervised");
    if (flags & CONTROL) kinds.push("control");
    const end = offset + text.toLowerCase().length;
    if (hits.some(([from, to]) => from < end && to > offset)) kinds.push("hit");
    const token = make("span", { class: kinds.join(" "), "data-ids": ids.join(" "), "data-at": position });
    text.split("\n").forEach((line, number) => {
      if (number) token.append(make("span", { class: "newline" }, "\n"));
      token.append(line);
    });
    block.append(token);
    position += ids.length;
    offset = end;
  }
  if (position < sample.tokens) {
    block.append(make("p", { class: "note" }, `… and ${plural(sample.tokens - position, "token")} more, not on this page`));
  }
  return block;
}

// Folds long context between supervised tokens, unless the search has found something in it.
function fold(block) {
  const runs = [];
  for (const token of block.querySelectorAll(".token")) {
    const supervised = token.classList.contains("supervised");
    if (supervised || !runs.length || !runs.at(-1).length) runs.push([]);
    if (!supervised) runs.at(-1).push(token);
  }
  for (const run of runs) {
    const middle = run.slice(CONTEXT, -CONTEXT);
    if (middle.length < 2 * CONTEXT || middle.some((token) => token.classList.contains("hit"))) continue;
    const tokens = middle.reduce((sum, token) => sum + token.dataset.ids.split(" ").length, 0);
    const more = make("button", { class: "fold", type: "button" }, `… ${count(tokens)} more tokens of context …`);
    middle[0].before(more);
    middle.forEach((token) => token.remove());
    more.addEventListener("click", () => more.replaceWith(...middle));
  }
}

function hitsIn(text) {
  const words = at("search").value.toLowerCase(), hits = [];
  for (let from = words ? text.indexOf(words) : -1; from >= 0; from = text.indexOf(words, from + words.length)) {
    hits.push([from, from + words.length]);
  }
  return hits;
}

function turn(direction) {
  const next = first + direction * PER_PAGE;
  if (next < 0 || next >= chosen.length) return;
  first = next;
  jumpedTo = -1;
  showSamples();
  at("samples").scrollIntoView({ block: "start" });
}

function jump() {
  const index = Number(at("jump").value) - 1;
  if (!data.samples[index]) return;
  if (!chosen.includes(index)) {
    at("source").value = at("search").value = "";
    choose();
  }
  first = Math.floor(chosen.indexOf(index) / PER_PAGE) * PER_PAGE;
  jumpedTo = index;
  showSamples();
  at(`sample-${index + 1}`).scrollIntoView({ block: "nearest" });
}

function showTip(event) {
  const token = event.target.closest(".tokens .token"), tip = at("tip");
  tip.hidden = !token;
  if (!token) return;
  const ids = token.dataset.ids.split(" "), place = Number(token.dataset.at);
  const kind = (token.classList.contains("control") ? "control token, " : "") +
    (token.classList.contains("supervised") ? "supervised" : "context");
  tip.textContent = ids.length === 1 ? `id ${ids[0]} · position ${place} · ${kind}`
    : `ids ${ids.join(", ")} · positions ${place}–${place + ids.length - 1} · one character of several tokens · ${kind}`;
  const box = token.getClientRects()[0], size = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - size.width - 4))}px`;
  tip.style.top = `${box.top > size.height + 8 ? box.top - size.height - 6 : box.bottom + 6}px`;
}

function start() {
  showHead();
  showCards();
  showSources();
  showLengths();
  showFindings();
  const sources = [...new Set(data.samples.map((sample) => sample.source))];
  at("source").append(make("option", { value: "" }, "All sources"),
    ...sources.map((name) => make("option", { value: name }, name)));
  at("source").hidden = sources.length < 2;
  const some = data.samples.length < data.of;
  const each = some ? (sources.length > 1 ? ", the first of each source" : ", the first ones") : "";
  at("extent").textContent = `${count(data.samples.length)} of ${plural(data.of, "training sample")}${each}, ` +
    `up to ${count(data.tokens_of_a_sample)} tokens of each. Hover over a token to see its id.`;
  at("jump").max = data.samples.length;
  at("source").addEventListener("change", choose);
  at("search").addEventListener("input", choose);
  at("jump").addEventListener("change", jump);
  for (const end of ["", "-below"]) {
    at(`previous${end}`).addEventListener("click", () => turn(-1));
    at(`next${end}`).addEventListener("click", () => turn(1));
  }
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });
  at("list").addEventListener("mouseover", showTip);
  at("list").addEventListener("mouseleave", () => { at("tip").hidden = true; });
  choose();
}

start();
