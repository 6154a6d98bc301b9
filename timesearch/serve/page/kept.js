// Questions and their answers, kept in this browser alone: the events of each, without pictures, as they came.

import { add, clock, get } from "./dom.js";

const PLACE = "timesearch.kept";
const MOST = 200;
let memory = null; // where the browser keeps nothing

function read() {
  if (memory) return memory;
  try {
    const found = JSON.parse(localStorage.getItem(PLACE) ?? "[]");
    return Array.isArray(found) ? found.filter((each) => each && typeof each.uid === "string" && each.video && Array.isArray(each.events)) : [];
  } catch {
    return [];
  }
}

// The oldest go where there is no room.
function write(kept) {
  const held = kept.slice(0, MOST);
  for (;;) {
    try {
      localStorage.setItem(PLACE, JSON.stringify(held));
      memory = null;
      return;
    } catch {
      if (held.length < 2) { memory = held; return; }
      held.length = Math.floor(held.length / 2);
    }
  }
}

const frameOf = ({ frame, seconds }) => ({ frame, seconds });

// An event without what is large and can be had again.
export function trimmed(kind, data) {
  if (kind === "video") return [kind, { id: data.id, name: data.name, seconds: data.seconds }];
  return [kind, data.frames ? { ...data, frames: data.frames.map(frameOf) } : data];
}

export function keep(episode) {
  write([episode, ...read().filter((each) => each.uid !== episode.uid)]);
}

export const find = (uid) => read().find((each) => each.uid === uid);
export const all = () => read();
export const forget = (uid) => write(read().filter((each) => each.uid !== uid));
export const forgetAll = () => write([]);

// Lists those of a video, or of all where none is named.
export function list(place, video, changed) {
  const shown = read().filter((each) => video === undefined || each.video.id === video);
  get(place).replaceChildren();
  for (const each of shown) {
    const item = add(get(place), "li");
    const open = add(item, "a");
    open.href = `#${new URLSearchParams({ v: each.video.id, k: each.uid })}`;
    add(open, "span", "asked", each.question);
    add(open, "b", "", each.answer ?? "No answer.");
    const when = new Date(each.at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    const at = each.times?.length ? ` · ${each.times.slice(0, 3).map((time) => clock(time)).join(", ")}` : "";
    add(open, "small", "", video === undefined ? `${each.video.name}${at} · ${when}` : `${when}${at}`);
    const remove = add(item, "button", "quiet remove", "×");
    remove.type = "button";
    remove.title = "Remove";
    remove.setAttribute("aria-label", `Remove: ${each.question}`);
    remove.addEventListener("click", () => { forget(each.uid); changed(); });
  }
  return shown.length;
}
