// What answers look like: plain data in, elements out.

const FOLD = 10; // labels that are shown at once
const percents = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const numbers = new Intl.NumberFormat("en");
const round = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const ROLES = { prefix: "With the prefix", base: "The base, no prefix", second: "Second prefix" };

export const number = (value) => numbers.format(value);

export const rounded = (value) => round.format(value);

/** A share between 0 and 1; what is neither is never shown as nothing or everything. */
export function percent(share) {
  if (share > 0 && share < 0.0005) return `<${percents.format(0.001)}`;
  if (share < 1 && share >= 0.9995) return `>${percents.format(0.999)}`;
  return percents.format(share);
}

/** An element with these properties (`class`, `text`, others as attributes) and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "text") element.textContent = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** An empty card of a column `{role, model}`. */
export function card({ role, model }) {
  const head = make("header", {}, make("p", { class: "role", text: ROLES[role] }), make("h2", { text: model }));
  return make("article", { class: `card answer ${role}`, "aria-label": `${ROLES[role]}: ${model}` }, head);
}

export const note = (text) => make("p", { class: "soft", text });
export const foot = (text) => make("p", { class: "foot", text });

/** The label of a text, and every label with its probability. */
export function verdict({ label, probability, probabilities }) {
  const head = make("p", { class: "verdict" }, make("b", { text: label }), make("span", { text: percent(probability) }));
  let all = Object.entries(probabilities);
  if (all.length <= FOLD) return [head, bars(all, label)];
  all = all.sort((a, b) => b[1] - a[1]);
  const rest = make("details", {}, make("summary", { text: `${all.length - FOLD} more labels` }), bars(all.slice(FOLD), label));
  return [head, bars(all.slice(0, FOLD), label), rest];
}

function bars(entries, best) {
  const rows = entries.map(([name, share]) => {
    const bar = make("i");
    bar.style.setProperty("--share", share);
    const track = make("span", { class: "track", "aria-hidden": "true" }, bar);
    const texts = [make("span", { class: "name", text: name }), make("span", { text: percent(share) })];
    return make("li", name === best ? { class: "best" } : {}, ...texts, track);
  });
  return make("ul", { class: "labels" }, ...rows);
}

/** Tokens of a text shaded by the share of their attention that the prefix gets, told in words for one at a time. */
export function looked(role, name, { share, tokens, cut }) {
  const least = Math.min(...tokens.map((token) => token.share));
  const most = Math.max(...tokens.map((token) => token.share));
  const how = "The mean over layers and heads. Point at a token, or move over the tokens with the arrow keys.";
  const readout = make("p", { class: "readout soft small", text: how });
  const list = make("ol", { class: "tokens", "aria-label": "Tokens and their share of attention on the prefix" });
  for (const { token, share } of tokens) {
    const words = make("span", { class: "hidden", text: ` ${percent(share)} ` });
    const breaks = token.includes("\n") ? [make("br")] : [];
    const item = make("li", { tabindex: "-1" }, shown(token), words, ...breaks);
    item.style.setProperty("--shade", most > least ? (share - least) / (most - least) : 0.5);
    const tell = () => { readout.textContent = `“${shown(token)}” gives ${percent(share)} of its attention to the prefix.`; };
    item.addEventListener("pointerenter", tell);
    item.addEventListener("focus", tell);
    list.append(item);
  }
  roving([...list.querySelectorAll("li")]);
  const title = make("h2", {}, make("b", { text: percent(share) }), ` of this text’s attention goes to ${name}`);
  const legend = make("p", { class: "legend" }, percent(least), make("i"), percent(most));
  legend.setAttribute("aria-label", `Shades from ${percent(least)} to ${percent(most)}`);
  const head = make("div", { class: "line" }, title, legend);
  const parts = cut ? [note("The text was too long and was cut.")] : [];
  return make("article", { class: `card looked ${role}`, "aria-label": `Attention on ${name}` }, head, list, readout, ...parts);
}

/** A token as it is seen: line breaks as a sign, and the first parts of a character, which have no text, as a dot. */
export const shown = (token) => token.replaceAll("\n", "↵") || "·";

/** One stop for Tab; arrow keys, Home and End move among the items. */
function roving(items) {
  items[0].tabIndex = 0;
  items.forEach((item, at) => item.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: items.length - 1 };
    const next = items[moves[event.key]];
    if (!next) return;
    event.preventDefault();
    item.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }));
}
