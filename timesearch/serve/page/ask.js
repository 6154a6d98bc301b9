// A question about a video, or about all: its search as it happens, the answer, and what that rests on.

import { add, clock, get, image, link, picture, stream, tell, withTimes } from "./dom.js";
import * as kept from "./kept.js";
import * as player from "./player.js";

let episode = null; // what is shown: {uid, at, video, question, options, answer, times, events}
let asking = null; // ends the question that is on its way
let times = []; // of the evidence, in order
let changed = () => {};
export const onChange = (listener) => { changed = listener; };

const span = (first, last) => {
  const made = add(get("line"), "div");
  made.dataset.first = first;
  made.dataset.last = last;
  setSpan(made);
  return made;
};
function setSpan(made) {
  made.style.left = player.place(Number(made.dataset.first));
  made.style.width = `${Math.max(0, parseFloat(player.place(Number(made.dataset.last))) - parseFloat(made.style.left))}%`;
}

function mark(seconds, kind) {
  const made = add(get("line"), "button", kind);
  made.type = "button";
  made.dataset.at = seconds;
  made.style.left = player.place(seconds);
  made.title = `${kind} at ${clock(seconds)}`;
  made.setAttribute("aria-label", made.title);
  if (kind === "preview") made.tabIndex = -1;
  made.addEventListener("click", (event) => { event.stopPropagation(); player.seek(seconds); });
}

// The length may be known after the marks are there.
get("line").addEventListener("length", () => {
  for (const made of get("line").children) {
    if (made.dataset.first !== undefined) setSpan(made);
    else if (made.dataset.at !== undefined) made.style.left = player.place(Number(made.dataset.at));
  }
});

function markWindow(given) {
  const end = player.length() || episode.video.seconds || 0;
  const from = Number(given?.start_time ?? 0), to = Number(given?.end_time ?? -1);
  if (!Number.isFinite(from) || !Number.isFinite(to)) return;
  const first = Math.min(Math.max(from, 0), end), last = to < 0 ? end : Math.min(to, end);
  if (last > first && !(first === 0 && last === end)) span(first, last).className = "window";
}

function evidenceAt(seconds) {
  if (seconds === null || seconds === undefined || times.includes(seconds)) return;
  times = [...times, seconds].sort((one, other) => one - other);
}

// A picture, or words, that lead to their moment.
function moment(parent, seconds, source, words) {
  const made = add(parent, "button", words ? "words" : "frame");
  made.type = "button";
  if (source) image(made, source);
  add(made, "span", "", [seconds === null ? "" : clock(seconds), words ?? ""].filter(Boolean).join(" "));
  if (seconds === null) made.disabled = true;
  else made.addEventListener("click", () => player.seek(seconds));
}

// A choice that is answered by its letter is shown with its words.
function named(answer) {
  const chosen = /^[A-Z]$/.test(answer) ? episode.options[answer.charCodeAt(0) - 65] : undefined;
  return chosen === undefined ? answer : `${answer}. ${chosen}`;
}

function verdict({ video, support, agrees, alone }) {
  if (!video) return ["guess", "Nothing found"];
  if (!support.length) return ["guess", "A guess: nothing was found"];
  if (agrees === null) return ["guess", "No answer to compare"];
  if (agrees) return ["good", "The same answer from this evidence alone"];
  return ["doubt", alone ? `Another answer from this evidence alone: ${named(alone)}` : "No answer from this evidence alone"];
}

const on = {
  status: ({ text }) => tell("status", text),
  error: ({ text }) => tell("status", text, true),
  video({ id, name, seconds }) {
    clear();
    episode.video = { id, name, seconds };
    get("result").hidden = false;
    get("title").textContent = name;
    tell("status", "searching");
  },
  preview: ({ frames }) => frames.forEach(({ seconds }) => mark(seconds, "preview")),
  turn({ thought, calls }) {
    const step = add(get("steps"), "li");
    if (thought) withTimes(add(step, "p", "thought"), thought, player.length(), player.seek);
    calls.forEach((call) => { add(step, "p", "call", call.said); markWindow(call.arguments); });
  },
  found({ frames, words, said, said_at: heard }) {
    const step = get("steps").lastElementChild ?? add(get("steps"), "li");
    words.forEach((line, number) => {
      moment(step, heard[number] ?? null, null, line);
      if (heard[number] !== null) { mark(heard[number], "heard"); evidenceAt(heard[number]); }
    });
    if (!frames.length) { if (!words.length) add(step, "p", "wrong", said); return; }
    const row = add(step, "div", "row");
    for (const { seconds, picture: own } of frames) {
      mark(seconds, "found");
      evidenceAt(seconds);
      moment(row, seconds, own ?? picture(episode.video.id, seconds, 320));
    }
  },
  reanswer: () => {},
  answer({ predicted_answer: answer, evidence }) {
    tell("status", "");
    get("result").hidden = false;
    episode.answer = answer === null ? null : named(answer);
    episode.times = times;
    get("answer").textContent = episode.answer ?? "No answer.";
    const [kind, said] = verdict(evidence);
    get("verdict").className = kind;
    get("verdict").textContent = said;
    get("evidence").replaceChildren();
    evidence.sentences.forEach((line) => withTimes(add(get("evidence"), "li"), line, player.length() || episode.video.seconds || 0, player.seek));
    get("support").replaceChildren();
    for (const { seconds, words } of evidence.support.slice(0, 40)) {
      if (words !== null) moment(get("support"), seconds, null, words);
      else moment(get("support"), seconds, picture(episode.video.id, seconds, 320));
    }
    if (evidence.unseen) span(...evidence.unseen).className = "unseen";
    get("search").open = false;
  },
};

function clear() {
  player.clearLine();
  player.moveNeedle(player.now());
  for (const id of ["steps", "answer", "verdict", "evidence", "support"]) get(id).replaceChildren();
  get("verdict").className = "";
  get("search").open = true;
  times = [];
}

// Show no question, or one that was kept.
export function show(uid) {
  cancel();
  episode = (uid && kept.find(uid)) || null;
  clear();
  tell("status", "");
  get("result").hidden = !episode;
  get("asked").textContent = episode?.question ?? "";
  if (!episode) return undefined;
  try {
    const events = episode.events;
    episode = { ...episode, options: episode.options ?? [] };
    for (const [kind, data] of events) on[kind]?.(data);
  } catch {
    tell("status", "This answer was kept in a form that cannot be read any more.", true);
  }
  return times[0];
}

export function cancel() {
  asking?.abort();
  asking = null;
  get("go").disabled = false;
  get("stop").hidden = true;
}

// Ask; `begin` is told of each video whose search begins.
export async function ask(video, question, options, begin) {
  cancel();
  const mine = asking = new AbortController();
  const own = episode = { uid: crypto.randomUUID?.() ?? String(Math.random()).slice(2), at: Date.now(), video: { id: video, name: "" }, question, options };
  clear();
  get("asked").textContent = question;
  get("result").hidden = true;
  get("go").disabled = true;
  get("stop").hidden = false;
  tell("status", "starting");
  try {
    const runs = []; // the events of each video that is asked
    await stream("api/ask", { video, question, options }, (kind, data) => {
      if (mine.signal.aborted) return;
      if (kind === "video") { runs.push([]); begin(data); }
      const answering = kind === "answer" ? runs.find(([[, { name }]]) => name === data.evidence.video) : undefined;
      if (answering && answering !== runs.at(-1)) { // the last video asked is not the one that answers
        begin(answering[0][1]);
        for (const [earlier, said] of answering) on[earlier]?.(said);
      }
      const events = answering ?? runs.at(-1);
      if (kind !== "status" && kind !== "error") events?.push(kept.trimmed(kind, data));
      on[kind]?.(data);
      if (kind === "answer" && answering) {
        own.events = events;
        kept.keep(own);
        changed(own);
      }
    }, mine.signal);
  } catch (error) {
    if (!mine.signal.aborted) tell("status", error instanceof TypeError ? `the server does not answer (${error.message})` : error.message, true);
  } finally {
    if (asking === mine) cancel();
  }
}

// The evidence before or after where the player is.
export function step(direction) {
  const now = player.now();
  const target = direction > 0 ? times.find((time) => time > now + 0.1) : times.findLast((time) => time < now - 0.1);
  if (target !== undefined) player.seek(target);
}

export const address = () => new URL(link(player.id(), player.now()), location.href).href;
