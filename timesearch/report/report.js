"use strict";
// Everything that data says enters the page as text: elements are made by `element`, never from markup.

const SVG = "http://www.w3.org/2000/svg";
const PAGE = 100;

function element(name, attributes = {}, ...children) {
  const node = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (key === "style") for (const [property, setting] of Object.entries(value)) node.style.setProperty(property, setting);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const byId = (id) => document.getElementById(id);
const parsed = new Map();
function data(id) {
  if (!parsed.has(id)) {
    const holder = byId(id);
    parsed.set(id, holder ? JSON.parse(holder.textContent) : null);
  }
  return parsed.get(id);
}

const summary = data("summary");
const methods = summary.methods;
const percent = (value) => (value === null || value === undefined ? "–" : (value * 100).toFixed(1));
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const clock = (seconds) => {
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), whole % 60];
  return (parts[0] ? parts : parts.slice(1)).map((part, i) => (i ? String(part).padStart(2, "0") : part)).join(":");
};

// Results ------------------------------------------------------------------------------------------------------------

function table(caption, heads, rows, textColumns = 1) {
  const cell = (value, i, tag) => {
    if (value instanceof Node) return value;
    return element(tag, { class: i > 0 && i < textColumns ? "text" : null, scope: tag === "th" ? "row" : null }, value);
  };
  return [
    element("caption", { class: "visually-hidden" }, caption),
    element("thead", {}, element("tr", {}, heads.map((head, i) =>
      element("th", { scope: "col", class: i > 0 && i < textColumns ? "text" : null }, head)))),
    element("tbody", {}, rows.map((row) => element("tr", {}, row.map((value, i) => cell(value, i, i ? "td" : "th"))))),
  ];
}

function drawTable() {
  const columns = summary.columns;
  const best = columns.map((column) => {
    if (!column.share || methods.length < 2) return null;
    const values = methods.map((method) => method.cells[column.name].value).filter((value) => value !== null);
    return values.length ? Math.max(...values) : null;
  });
  const rows = methods.map((method) => [method.label, ...columns.map((column, i) => {
    const { value, interval } = method.cells[column.name];
    if (value === null) return element("td", {}, "–");
    const shown = (number) => (column.share ? (number * 100).toFixed(1) : number.toFixed(1));
    return element("td", { class: value === best[i] ? "best" : null }, shown(value),
      interval && element("span", { class: "interval" }, `${shown(interval[0])} – ${shown(interval[1])}`));
  })]);
  byId("table").replaceChildren(...table("Results by method", ["method", ...columns.map((column) => column.label)], rows));
}

function drawComparisons() {
  if (!summary.comparisons.length) return;
  const name = Object.fromEntries(methods.map((method) => [method.name, method.label]));
  const chance = (p) => (p === undefined || p === null ? "–" : p < 0.001 ? "< 0.001" : p.toFixed(3));
  const signed = (value) => `${value >= 0 ? "+" : "−"}${Math.abs(value * 100).toFixed(1)}`;
  const rows = summary.comparisons.map((pair) => {
    const qa = pair.qa_accuracy;
    const f1 = pair.temporal_f1;
    return [
      `${name[pair.b]} against ${name[pair.a]}`,
      String(pair.episodes),
      qa ? signed(qa.difference) : "–",
      qa ? `${qa.only_b} : ${qa.only_a}` : "–",
      chance(qa && qa.p_value),
      f1 ? element("td", {}, signed(f1.difference),
        element("span", { class: "interval" }, `${signed(f1.low)} – ${signed(f1.high)}`)) : "–",
      chance(f1 && f1.p_value),
    ];
  });
  const heads = ["pair", "episodes", "accuracy", "only one right", "p (McNemar)", "temporal F1", "p (bootstrap)"];
  byId("comparisons").append(element("details", { open: methods.length === 2 },
    element("summary", {}, `Paired comparisons on the same episodes (${rows.length})`),
    element("div", { class: "scroll" }, element("table", {}, table("Paired comparisons", heads, rows)))));
}

function drawProblems() {
  const rows = methods.flatMap((method) => [
    ...Object.entries(method.failures).map(([reason, count]) => [method.label, reason.replaceAll("_", " "), String(count)]),
    ...(method.unparsed ? [[method.label, "answers that name no option (counted as wrong)", String(method.unparsed)]] : []),
  ]);
  const node = rows.length
    ? element("details", {}, element("summary", {}, `Rows with a problem: ${rows.reduce((sum, row) => sum + Number(row[2]), 0)}`),
        element("div", { class: "scroll" }, element("table", {}, table("Problems", ["method", "problem", "rows"], rows, 2))))
    : element("p", { class: "note" }, "No row had a problem.");
  byId("problems").append(node);
}

function drawMade() {
  const names = [...new Set(methods.flatMap((method) => method.made.map(([name]) => name)))];
  if (!names.length) return;
  const told = methods.map((method) => new Map(method.made));
  const rows = names.map((name) => [name, ...told.map((values) => values.get(name) ?? "–")]);
  byId("problems").append(element("details", {}, element("summary", {}, "What these numbers are made of"),
    element("div", { class: "scroll" }, element("table", {}, table("Fingerprints", ["ingredient", ...methods.map((method) => method.label)], rows, methods.length + 1)))));
}

// Plots --------------------------------------------------------------------------------------------------------------

const colour = (i) => `var(--s${(i % 8) + 1})`;
const DASHES = ["none", "6 3", "2 3", "8 3 2 3"];

function marker(i, x, y) {
  const style = { fill: colour(i) };
  if (i % 3 === 1) return element("svg:rect", { x: x - 4, y: y - 4, width: 8, height: 8, style });
  if (i % 3 === 2) return element("svg:path", { d: `M${x} ${y - 5}L${x + 5} ${y + 4}L${x - 5} ${y + 4}Z`, style });
  return element("svg:circle", { cx: x, cy: y, r: 4.2, style });
}

function ticks(low, high, covering = false) {
  const rough = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value < high + step * (1 - 1e-6); value += step) found.push(Number(value.toPrecision(12)));
  return found.filter((value) => covering || value <= high + step / 1e6);
}

function chart(plot) {
  const [width, height, left, right, top, bottom] = [460, 250, 44, 14, 12, 42];
  const points = plot.series.flatMap((series) => series.points);
  const categories = plot.categories;
  const xs = categories ? [0, categories.length - 1] : [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0]))];
  const ys = points.map((p) => p[1]);
  const low = Math.min(0, ...ys);
  const yTicks = ticks(low, Math.max(...ys, low + 1e-6), true);
  const high = Math.max(yTicks[yTicks.length - 1], ...ys);
  const inset = categories ? (width - left - right) / (2 * categories.length) : 6;
  const x = (value) => left + inset + (xs[1] > xs[0] ? ((value - xs[0]) / (xs[1] - xs[0])) * (width - left - right - 2 * inset) : (width - left - right) / 2 - inset);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  const shown = (value) => (plot.share ? `${Math.round(value * 100)}%` : String(Number(value.toPrecision(4))));
  const title = `${plot.title}: ${plot.y} by ${plot.x}`;
  const svg = element("svg:svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const tick of yTicks) {
    svg.append(element("svg:line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
      element("svg:text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, shown(tick)));
  }
  const xTicks = categories ? categories.map((label, i) => [i, label]) : ticks(xs[0], xs[1]).map((value) => [value, String(value)]);
  for (const [value, label] of xTicks) svg.append(element("svg:text", { x: x(value), y: height - bottom + 18, "text-anchor": "middle" }, label));
  svg.append(element("svg:line", { class: "axis", x1: left, x2: width - right, y1: y(low), y2: y(low) }),
    element("svg:text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, plot.x));
  plot.series.forEach((series, i) => {
    const aside = categories ? (i - (plot.series.length - 1) / 2) * Math.min(9, inset / plot.series.length) : 0;
    const path = series.points.map((point, k) => `${k ? "L" : "M"}${(x(point[0]) + aside).toFixed(1)} ${y(point[1]).toFixed(1)}`).join("");
    svg.append(element("svg:path", { d: path, fill: "none", "stroke-width": 2, "stroke-linejoin": "round", "stroke-dasharray": DASHES[Math.floor(i / 2) % 4], style: { stroke: colour(i) } }));
    if (series.points.length <= 40) for (const point of series.points) {
      const mark = marker(i, x(point[0]) + aside, y(point[1]));
      const where = categories ? categories[point[0]] : point[0];
      mark.append(element("svg:title", {}, `${series.name}, ${where}: ${shown(point[1])}${point[2] ? ` (${point[2]} episodes)` : ""}`));
      svg.append(mark);
    }
  });
  const legend = element("ul", { class: "legend" }, plot.series.map((series, i) => element("li", {},
    element("svg:svg", { width: 12, height: 12, viewBox: "0 0 12 12", "aria-hidden": "true" }, marker(i, 6, 6)), series.name)));
  const rows = plot.series.flatMap((series) => series.points.map((point) =>
    [series.name, String(categories ? categories[point[0]] : point[0]), shown(point[1]), String(point[2] ?? "")]));
  return element("figure", { class: "card", style: { margin: "0" } },
    element("h3", {}, plot.title), svg, plot.series.length > 1 || plot.series[0].name ? legend : null,
    rows.length <= 200 ? element("details", {}, element("summary", {}, "As a table"), element("div", { class: "scroll" },
      element("table", {}, table(title, ["series", plot.x, plot.y, "episodes"], rows)))) : null);
}

function drawPlots() {
  const drawn = summary.plots.filter((plot) => plot.series.some((series) => series.points.length));
  byId("charts").append(...drawn.map(chart));
  byId("plots").hidden = !drawn.length;
}

// Groups -------------------------------------------------------------------------------------------------------------

function drawGroups() {
  const names = Object.keys(summary.groups);
  byId("groups").hidden = !names.length;
  byId("by").append(...names.map((name) => {
    const heads = [name.replaceAll("_", " "), "episodes", ...methods.flatMap((method) => [`${method.label}: accuracy`, "temporal F1"])];
    const rows = summary.groups[name].map((group) => [group.value, String(group.episodes),
      ...group.scores.flatMap((score) => [percent(score && score[0]), percent(score && score[1])])]);
    return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `By ${name}`, style: { "margin-top": "18px" } },
      element("table", {}, table(`Scores by ${name}`, heads, rows)));
  }));
}

// Episodes -----------------------------------------------------------------------------------------------------------

const [METHOD, SAMPLE, VERDICT, SEARCHED, F1, FRAMES, CALLS, CHUNK, OFFSET] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
const VERDICTS = { right: "right", wrong: "wrong", unparsed: "unparsed", error: "failed", none: "not scored" };
const filters = { method: "", verdict: "", searched: "", group: "", text: "" };
let matching = [];
let shownRows = 0;

function labelled(label, key, control) {
  control.id = `filter-${key}`;
  return element("div", {}, element("label", { for: control.id }, label), control);
}

function select(label, key, options) {
  const change = (event) => { filters[key] = event.target.value; applyFilters(); };
  return labelled(label, key, element("select", { on: { change } }, options.map(([value, text]) => element("option", { value }, text))));
}

function drawFilters() {
  const groups = summary.group_values.flatMap(([name, values]) => values.map((value) => [JSON.stringify([name, value]), `${name.replaceAll("_", " ")}: ${value}`]));
  const search = element("input", { type: "search", autocomplete: "off", on: { input: (event) => { filters.text = event.target.value.toLowerCase(); applyFilters(); } } });
  byId("filters").append(
    select("Method", "method", [["", "all methods"], ...methods.map((method, i) => [String(i), method.label])]),
    select("Answer", "verdict", [["", "any"], ...Object.entries(VERDICTS)]),
    select("Search", "searched", [["", "any"], ["yes", "searched"], ["no", "did not search"]]),
    ...(groups.length ? [select("Group", "group", [["", "all groups"], ...groups])] : []),
    labelled("Question or id contains", "text", search));
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
}

function applyFilters() {
  const group = filters.group ? JSON.parse(filters.group) : null;
  matching = summary.episodes.map((episode, i) => i).filter((i) => {
    const episode = summary.episodes[i];
    const sample = summary.samples[episode[SAMPLE]];
    if (filters.method && episode[METHOD] !== Number(filters.method)) return false;
    if (filters.verdict && episode[VERDICT] !== filters.verdict) return false;
    if (filters.searched && Boolean(episode[SEARCHED]) !== (filters.searched === "yes")) return false;
    if (group && !(sample.groups[group[0]] || []).includes(group[1])) return false;
    return !filters.text || sample.question.toLowerCase().includes(filters.text) || sample.id.toLowerCase().includes(filters.text);
  });
  byId("list").replaceChildren();
  shownRows = 0;
  showMore();
  const total = summary.episodes.length;
  byId("count").textContent = matching.length === total ? `${total} episodes` : `${matching.length} of ${total} episodes`;
}

function showMore() {
  const next = matching.slice(shownRows, shownRows + PAGE);
  byId("list").append(...next.map(row));
  shownRows += next.length;
  byId("more").hidden = shownRows >= matching.length;
  return next.length ? byId("list").children[shownRows - next.length] : null;
}

function row(i) {
  const episode = summary.episodes[i];
  const sample = summary.samples[episode[SAMPLE]];
  const facts = [methods.length > 1 ? methods[episode[METHOD]].label : null, counted(episode[FRAMES], "frame"), counted(episode[CALLS], "call"),
    episode[F1] === null ? null : `F1 ${percent(episode[F1])}`].filter(Boolean).join(" · ");
  const button = element("button", { class: "row", type: "button", "aria-expanded": "false", on: { click: () => toggle(item, button, i) } },
    element("span", { class: `verdict ${episode[VERDICT] === "error" ? "wrong" : episode[VERDICT]}` }, VERDICTS[episode[VERDICT]]),
    element("span", { class: "question" }, sample.question || sample.id), element("span", { class: "facts" }, facts));
  const item = element("li", { "data-episode": i }, button);
  return item;
}

function toggle(item, button, i) {
  const open = button.getAttribute("aria-expanded") === "true";
  for (const other of byId("list").querySelectorAll(".row[aria-expanded=true]")) {
    other.setAttribute("aria-expanded", "false");
    other.nextSibling.remove();
  }
  if (open) return;
  button.setAttribute("aria-expanded", "true");
  item.append(detail(summary.episodes[i]));
  const top = button.getBoundingClientRect().top;
  if (top < 0) button.scrollIntoView({ block: "start" });
  history.replaceState(null, "", `#episode=${encodeURIComponent(`${methods[summary.episodes[i][METHOD]].name}/${summary.samples[summary.episodes[i][SAMPLE]].id}`)}`);
}

function detail(episode) {
  const sample = summary.samples[episode[SAMPLE]];
  const box = element("div", { class: "detail" });
  if (episode[CHUNK] === null) {
    box.append(element("p", { class: "note" }, `The transcript of ${sample.id} is not in this page, which carries only so much: see the prediction file of ${methods[episode[METHOD]].name}.`));
    return box;
  }
  const told = data(`episodes-${episode[CHUNK]}`)[episode[OFFSET]];
  const pictures = (told.thumbs === null ? null : data(`thumbs-${told.thumbs}`)) || {};
  const picture = (time) => (pictures[time.toFixed(2)] ? `data:image/jpeg;base64,${pictures[time.toFixed(2)]}` : null);
  box.append(answers(sample, told, episode), timeline(told, picture), ...told.turns.map((turn) => transcript(turn, picture)));
  if (told.error) box.append(element("p", { class: "wrong" }, told.error));
  return box;
}

function answers(sample, told, episode) {
  const pair = (name, value, kind) => (value === null || value === undefined || value === "" ? [] : [element("dt", {}, name), element("dd", { class: kind }, value)]);
  const letter = (i) => String.fromCharCode(65 + i);
  const options = told.options.length ? element("ul", { class: "options" }, told.options.map((option, i) => {
    const gold = letter(i) === told.gold;
    const said = letter(i) === told.choice;
    return element("li", { class: [gold ? "gold" : "", said ? "said" : ""].join(" ") }, `${letter(i)}. ${option}`,
      gold || said ? element("span", { class: "note" }, ` ${[gold ? "right answer" : "", said ? "its answer" : ""].filter(Boolean).join(", ")}`) : null);
  })) : null;
  const scores = Object.entries(told.scores).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`).join(" · ");
  return element("dl", { class: "answers" },
    pair("episode", sample.id), pair("video", told.video + (told.duration ? ` (${clock(told.duration)})` : "")), pair("options", options),
    pair("right answer", told.options.length ? null : told.answer), pair("its answer", told.said ?? "none"),
    pair("judgement", VERDICTS[episode[VERDICT]], episode[VERDICT] === "right" ? "right" : episode[VERDICT] === "none" ? null : "wrong"),
    pair("re-answer", told.reanswer === null ? null : `${told.reanswer} (from what was found alone)`), pair("scores", scores));
}

function timeline(told, picture) {
  const times = [...told.truth, ...told.spans.flat(), ...told.preview, ...told.turns.flatMap((turn) => [...turn.frames, ...turn.spoken.map(([time]) => time)])];
  const end = told.duration || Math.max(1, ...times);
  const at = (seconds) => `${Math.min(100, Math.max(0, (seconds / end) * 100))}%`;
  const peek = element("div", { class: "peek", role: "tooltip", hidden: true });
  const box = element("div", { class: "timeline", role: "group", "aria-label": "Time line of the video" });
  const dots = [];
  const show = (dot, label, url) => {
    peek.replaceChildren(...(url ? [element("img", { src: url, alt: label })] : []), label);
    peek.hidden = false;
    const [area, spot] = [box.getBoundingClientRect(), dot.getBoundingClientRect()];
    const middle = spot.left + spot.width / 2 - area.left;
    peek.style.left = `${Math.max(0, Math.min(area.width - peek.offsetWidth, middle - peek.offsetWidth / 2))}px`;
    peek.style.top = `${spot.top - area.top - peek.offsetHeight - 4}px`;
  };
  const hide = () => { peek.hidden = true; };
  const dot = (seconds, kind, label, url) => {
    const node = element("button", { type: "button", class: `dot ${kind}`, tabindex: dots.length ? -1 : 0, "aria-label": label, style: { left: at(seconds) } });
    const reveal = () => show(node, label, url);
    for (const [event, handler] of [["mouseenter", reveal], ["focus", reveal], ["click", reveal], ["mouseleave", hide], ["blur", hide]]) node.addEventListener(event, handler);
    dots.push(node);
    return node;
  };
  const lane = (name, ...content) => element("div", { class: "lane" }, element("span", { class: "name" }, name), element("div", { class: "track" }, content));
  const bands = [...told.spans, ...(told.spans.length ? [] : told.truth.map((time) => [time, time]))];
  box.append(element("div", { class: "behind", "aria-hidden": "true" }, bands.map(([start, stop]) =>
    element("span", { style: { left: at(start), width: `calc(${at(stop)} - ${at(start)})` } }))));
  if (told.truth.length || told.spans.length) {
    box.append(lane("ground truth",
      told.spans.map(([start, stop]) => dot((start + stop) / 2, "truth", `ground truth, ${clock(start)} to ${clock(stop)}`, null)),
      told.spans.length ? [] : told.truth.map((time) => dot(time, "truth", `ground truth, ${clock(time)}`, null))));
  }
  if (told.preview.length) box.append(lane("preview", told.preview.map((time) => dot(time, "preview", `preview, ${clock(time)}`, picture(time)))));
  told.turns.forEach((turn) => {
    if (!turn.frames.length && !turn.calls.length && !turn.spoken.length) return;
    const windows = turn.calls.map((call) => [Number(call.arguments.start_time ?? 0), Number(call.arguments.end_time ?? end)])
      .map(([start, stop]) => [start || 0, stop > 0 ? stop : end]).filter(([start, stop]) => stop > start && (start > 0 || stop < end));
    const name = turn.number ? `turn ${turn.number}` : "given";
    box.append(lane(name,
      windows.map(([start, stop]) => element("span", { class: "window", style: { left: at(start), width: `calc(${at(stop)} - ${at(start)})` } })),
      turn.frames.map((time) => dot(time, "searched", `${name}, ${clock(time)}${turn.regions[time.toFixed(2)] ? ", of the source" : ""}`, picture(time))),
      turn.spoken.map(([time, line]) => dot(time, "heard", `${name}, ${line}`, null))));
  });
  box.append(element("div", { class: "scale", "aria-hidden": "true" }, [0, 0.25, 0.5, 0.75, 1].map((part) =>
    element("span", { style: { left: `${part * 100}%` } }, clock(part * end)))), peek);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const here = dots.indexOf(document.activeElement);
    if (!step || here < 0) return;
    event.preventDefault();
    const next = dots[(here + step + dots.length) % dots.length];
    dots[here].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return box;
}

function transcript(turn, picture) {
  const call = ({ name, arguments: given, error }) => element("p", { class: "call" }, element("span", { class: "tool" }, name || "tool call"), " ",
    Object.entries(given).map(([key, value], k) => [k ? ", " : "", element("span", { class: "key" }, `${key} `), typeof value === "string" ? `“${value}”` : JSON.stringify(value)]),
    error ? element("span", { class: "wrong" }, ` ${error}`) : null);
  const pictured = turn.frames.some(picture);
  const frames = turn.frames.length ? element("ul", { class: "strip" }, turn.frames.map((time) => {
    const url = picture(time);
    const label = clock(time);
    const blank = pictured ? element("span", { class: "blank" }, "no picture") : null;
    const region = turn.regions[time.toFixed(2)];
    if (!region || !url) return element("li", {}, url ? element("img", { src: url, alt: `frame at ${label}` }) : blank, label);
    const [left, top, right, bottom] = region.map((side) => 100 * side);
    const outline = element("span", { class: "region", style: { left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%` } });
    return element("li", {}, element("span", { class: "framed" }, element("img", { src: url, alt: `frame at ${label}, the region outlined` }), outline), `${label}, source`);
  })) : null;
  const acts = turn.calls.length ? "calls" : turn.answer !== null ? "answers" : "says";
  return element("div", { class: `turn ${turn.calls.length ? "searching" : ""}` }, element("h4", {}, turn.number ? `Turn ${turn.number} ${acts}` : "Frames given at once"),
    turn.thought ? element("p", { class: "said" }, turn.thought) : null, turn.text ? element("p", { class: "said note" }, turn.text) : null,
    turn.calls.map(call), turn.words.map((line) => element("p", { class: "said words" }, line)), turn.answer !== null ? element("p", { class: "said" }, "→ ", element("strong", {}, turn.answer)) : null, frames);
}

function openFromAddress() {
  const wanted = decodeURIComponent((location.hash.match(/^#episode=(.*)$/) || [])[1] || "");
  if (!wanted) return;
  const at = summary.episodes.findIndex((episode) => `${methods[episode[METHOD]].name}/${summary.samples[episode[SAMPLE]].id}` === wanted);
  if (at < 0) return;
  while (shownRows <= matching.indexOf(at)) if (!showMore()) return;
  const button = byId("list").querySelector(`[data-episode="${at}"] .row`);
  button.click();
  button.scrollIntoView({ block: "start" });
}

byId("scope").textContent = summary.scope;
byId("threshold").textContent = summary.threshold;
byId("embedded").textContent = summary.embedded;
drawTable();
drawComparisons();
drawProblems();
drawMade();
drawPlots();
drawGroups();
drawFilters();
applyFilters();
byId("more").addEventListener("click", () => { const first = showMore(); if (first) first.querySelector(".row").focus(); });
openFromAddress();
document.documentElement.dataset.ready = "true";
