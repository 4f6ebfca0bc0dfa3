// The page: which models there are, what is asked of them, and where the answers go.

import * as api from "./api.js";
import { card, foot, looked, make, note, number, percent, rounded, shown, verdict } from "./cards.js";

const $ = (id) => document.getElementById(id);
let base = null; // the card of the base in /v1/models
let prefixes = {}; // cards of the prefixes, by name
let running = null; // an AbortController while answers are awaited

// ---- what there is

async function load() {
  say("");
  try {
    const cards = await api.models();
    base = cards.find((one) => !one.prefix);
    prefixes = Object.fromEntries(cards.filter((one) => one.prefix).map((one) => [one.id, one]));
  } catch (error) {
    lock(error.status === 401);
    if (error.status !== 401 || api.key.get()) say(error.message);
    return;
  }
  lock(false);
  $("forget").hidden = !api.key.get();
  $("base").textContent = `${base.id} · ${rounded(base.parameters)} frozen parameters`;
  offer();
}

function lock(locked) {
  $("unlock").hidden = !locked;
  $("ask").hidden = locked || !base;
  if (locked) $("key").focus();
}

/** `labels`, `text`, or null where this page cannot ask a prefix for what it was trained for. */
function kind(model) {
  const { prefix, routes } = model;
  if (routes.includes("/v1/classify")) return "labels";
  const writes = [null, "generate"].includes(prefix.task) && routes.includes("/v1/completions");
  return writes ? "text" : null;
}

function offer() {
  const options = Object.values(prefixes).map((one) => option(one.id, kind(one) ? one.id : `${one.id} (${one.prefix.task}: not on this page)`, !kind(one)));
  const usable = Object.values(prefixes).filter(kind);
  if (!usable.length) options.unshift(option("", "none: the base alone"));
  $("prefix").replaceChildren(...options);
  $("prefix").value = usable[0]?.id ?? "";
  offerSecond();
}

function offerSecond() {
  const chosen = prefixes[$("prefix").value];
  const before = $("second").value;
  const others = chosen ? Object.values(prefixes).filter((one) => one !== chosen && kind(one) === kind(chosen)) : [];
  $("second").replaceChildren(option("", "none"), ...others.map((one) => option(one.id, one.id)));
  if (others.some((one) => one.id === before)) $("second").value = before;
  $("second").disabled = !others.length;
  const writes = !chosen || kind(chosen) === "text";
  $("settings").hidden = !writes;
  $("chat-choice").hidden = !!chosen?.prefix.template || !base.routes.includes("/v1/chat/completions");
  $("tokens").value = chosen?.prefix.max_new_tokens ?? 64;
  $("about").replaceChildren(...(chosen ? told(chosen.prefix) : ["No prefix is served that this page can try."]));
}

function option(value, text, disabled = false) {
  const made = make("option", { value, text });
  made.disabled = disabled;
  return made;
}

function told({ length, parameters, template }) {
  const size = `${number(length)} virtual tokens, ${number(parameters)} trained parameters (${percent(parameters / base.parameters)} of the base)`;
  return template ? [`${size}. Reads `, make("code", { text: shown(template) })] : [size];
}

// ---- asking

async function run() {
  running?.abort();
  const mine = (running = new AbortController());
  const chosen = prefixes[$("prefix").value];
  const labels = chosen && kind(chosen) === "labels";
  say("");
  $("stop").hidden = false;
  $("status").textContent = "Asking …";
  const columns = asked(chosen, labels).map((column) => ({ ...column, element: card(column) }));
  $("cards").replaceChildren(...columns.map((column) => column.element));
  $("attention").replaceChildren();
  const looks = columns.filter((column) => column.role !== "base").map((column) => look(column, mine.signal));
  const answers = await Promise.allSettled([...columns.map((column) => (labels ? sort : write)(column, mine.signal)), ...looks]);
  if (running !== mine) return; // another run has taken the page
  running = null;
  $("stop").hidden = true;
  finish(answers, columns.length);
}

/** The columns: their model, and the body of the request for each. */
function asked(chosen, labels) {
  const second = prefixes[$("second").value];
  const columns = [{ role: "base", model: base.id, like: chosen }];
  if (chosen) columns.unshift({ role: "prefix", model: chosen.id, like: chosen });
  if (second) columns.push({ role: "second", model: second.id, like: second });
  return columns.map((column) => ({ ...column, ...(labels ? sorting(column) : writing(column)) }));
}

function sorting({ role, model, like }) {
  const input = $("text").value;
  const body = { model, input };
  return { body: role === "base" ? { ...body, like: like.id } : body, seen: { model, input } };
}

function writing({ model, like }) {
  const text = $("text").value;
  const template = like?.prefix.template;
  const chat = !$("chat-choice").hidden && $("chat").checked;
  const input = chat ? [{ role: "user", content: text }] : template ? template.replace("{prompt}", () => text) : text;
  const settings = { max_tokens: $("tokens").valueAsNumber, temperature: $("temperature").valueAsNumber };
  return { body: { model, ...settings, [chat ? "messages" : "prompt"]: input }, seen: { model, input } };
}

/** Labels of a text; what is told of them. */
async function sort({ role, model, like, body, element }, signal) {
  if (role === "base" && !like.prefix.zero_shot) {
    element.append(note(`${like.id} reads its labels off a layer that was trained with it; the base alone has none.`));
    return null;
  }
  const found = await answered(element, api.classify(body, signal));
  element.append(...verdict(found), ...(found.cut ? [foot("The text was too long and was cut.")] : []));
  return `${model}: ${found.label}, ${percent(found.probability)}`;
}

/** Text as it comes; what is told of it. */
async function write({ model, body, element }, signal) {
  const text = make("div", { class: "written streaming" });
  const under = foot("");
  element.append(text, under);
  let count = 0;
  try {
    for await (const piece of api.stream(body, signal)) {
      text.append(piece.text);
      count += body.messages && !piece.text && !piece.finish ? 0 : 1; // a chat opens with an empty piece
      const end = { stop: ", ended by itself", length: ", at the limit" }[piece.finish] ?? "";
      under.textContent = `${number(count)} tokens${end}`;
    }
  } catch (error) {
    if (!count) text.replaceWith(note("No answer."));
    throw error;
  } finally {
    text.classList.remove("streaming");
  }
  return `${model}: ${number(count)} tokens`;
}

async function look({ role, model, seen }, signal) {
  const place = make("div");
  $("attention").append(place);
  place.replaceWith(looked(role, model, await answered(place, api.attention(seen, signal), false)));
  return null;
}

async function answered(element, promise, inCard = true) {
  element.classList.add("waiting");
  try {
    return await promise;
  } catch (error) {
    if (inCard) element.append(note("No answer."));
    else element.remove();
    throw error;
  } finally {
    element.classList.remove("waiting");
  }
}

// ---- telling

function finish(answers, columns) {
  const failed = answers.filter((one) => one.status === "rejected").map((one) => one.reason);
  const stopped = failed.some((error) => error.name === "AbortError");
  say([...new Set(failed.filter((error) => error.name !== "AbortError").map((error) => error.message))].join(" "));
  const results = answers.slice(0, columns).map((one) => one.value).filter(Boolean);
  $("status").textContent = stopped ? "Stopped." : results.join("; ");
  if (failed.some((error) => error.status === 401)) lock(true);
}

function say(message) {
  $("alert").textContent = message;
}

// ---- hands

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key.set($("key").value);
  load();
});
$("forget").addEventListener("click", () => {
  api.key.forget();
  location.reload();
});
$("stop").addEventListener("click", () => running?.abort());
$("prefix").addEventListener("change", () => {
  offerSecond();
  again();
});
$("second").addEventListener("change", again);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("ask").hidden) $("ask").requestSubmit();
  if (event.key === "Escape") running?.abort();
});

/** After a change, ask anew where answers are shown. */
function again() {
  if ($("cards").childElementCount) run();
}

load();
