// The page: which view the address asks for, the grid of videos, what is dropped, and the keys.

import * as asking from "./ask.js";
import { add, clock, fetchJSON, get, image, link, picture, tell } from "./dom.js";
import * as kept from "./kept.js";
import * as player from "./player.js";

const FIRST = 60; // cards before those that `more` shows
let videos = []; // all that are offered
let most = FIRST;
let searching = new AbortController();

// Cards

function card(parent, href, source, name, badge, words = "") {
  const made = add(parent, "a", "card");
  made.href = href;
  const frame = add(made, "span", "picture");
  image(frame, source);
  if (badge) add(frame, "span", "badge", badge);
  const folder = name.includes("/") ? name.slice(0, name.lastIndexOf("/")) : "";
  add(made, "span", "name", folder ? name.slice(folder.length + 1) : name);
  if (folder || words) add(made, "small", "", [folder, words].filter(Boolean).join(" · "));
  made.title = name;
  return made;
}

function showVideos() {
  const typed = get("query").value.trim().toLowerCase();
  const named = typed ? videos.filter(({ name }) => name.toLowerCase().includes(typed)) : videos;
  const shown = named.length ? named : videos;
  for (const old of get("videos").querySelectorAll("a.card")) old.remove();
  for (const { id, name, seconds, prepared } of shown.slice(0, most)) {
    const made = card(get("videos"), link(id), picture(id, seconds ? seconds / 10 : 1, 320), name, seconds ? clock(seconds, false) : "");
    made.classList.toggle("fresh", !prepared);
  }
  get("count").textContent = shown.length === videos.length ? String(videos.length) : `${shown.length} of ${videos.length}`;
  get("more").hidden = shown.length <= most;
  get("more").textContent = `Show ${Math.min(FIRST, shown.length - most)} more`;
}

async function listVideos() {
  try {
    videos = await fetchJSON("api/videos");
  } catch (error) {
    tell("notice", `the server does not answer (${error.message})`, true);
    return;
  }
  showVideos();
  if (!videos.length) tell("notice", "No videos yet: drop one, or start with `timesearch serve FOLDER`.");
}

function nothing({ videos: searched, said }) {
  if (!searched) return "No video can be searched yet: ask about one first, which prepares it, or serve a library.";
  return `${said[0].toUpperCase()}${said.slice(1)}.`;
}

async function findMoments(query) {
  searching.abort();
  const mine = searching = new AbortController();
  get("found").hidden = true;
  tell("notice", "searching");
  try {
    const found = await fetchJSON(`api/search?${new URLSearchParams({ query })}`, mine.signal);
    if (mine.signal.aborted) return;
    get("moments").replaceChildren();
    for (const { video, name, start, end, seconds } of found.moments) {
      const when = end > start ? `${clock(start)} – ${clock(end)}` : clock(start);
      card(get("moments"), link(video, seconds), picture(video, seconds, 320), name, when);
    }
    for (const { video, name, start, end, text } of found.heard) {
      card(get("moments"), link(video, start), picture(video, start, 320), name, `${clock(start)} – ${clock(end)}`, `“${text}”`);
    }
    get("found").hidden = !found.moments.length && !found.heard.length;
    get("among").textContent = `in ${found.videos} of ${Math.max(found.videos, videos.length)} videos; the others have not been prepared`;
    if (found.videos >= videos.length) get("among").textContent = `in ${found.videos} videos`;
    tell("notice", get("found").hidden ? nothing(found) : "");
  } catch (error) {
    if (!mine.signal.aborted) tell("notice", error.message, true);
  }
}

// Views

const fields = () => new URLSearchParams(location.hash.slice(1));

function view(name) {
  get("shelf").hidden = name !== "shelf";
  get("watch").hidden = name !== "watch";
}

function showKept() {
  get("history").hidden = !kept.list("kept", undefined, showKept);
  if (player.id()) get("here").hidden = !kept.list("kept-here", player.id(), showKept);
}

function route() {
  const asked = fields();
  const video = asked.get("v");
  if (video) {
    view("watch");
    const uid = asked.get("k") ?? undefined;
    const time = Number(asked.get("t") ?? NaN);
    const same = player.id() === video;
    if (!same) {
      get("title").textContent = videos.find(({ id }) => id === video)?.name ?? "";
      player.open(video, Number.isFinite(time) ? time : 0);
    }
    if (!same || uid) {
      const first = asking.show(uid);
      if (!Number.isFinite(time) && first !== undefined) player.seek(first);
    }
    if (same && Number.isFinite(time)) player.seek(time);
    showKept();
    if (!same) window.scrollTo(0, 0);
    return;
  }
  asking.cancel();
  player.close();
  document.title = "timesearch";
  view("shelf");
  showKept();
  const query = asked.get("q") ?? "";
  get("query").value = query;
  most = FIRST;
  const listed = listVideos();
  if (query.trim()) listed.then(() => findMoments(query));
  else { searching.abort(); get("found").hidden = true; tell("notice", ""); }
}

// The search of one of several videos begins: it comes onto the screen.
function begin({ id, name }) {
  if (player.id() === id) return;
  history.replaceState(null, "", link(id));
  player.open(id);
  get("title").textContent = name;
}

async function copyLink() {
  const address = asking.address();
  try {
    await navigator.clipboard.writeText(address);
    get("link").textContent = "Copied";
  } catch {
    prompt("A link to this moment", address);
  }
  setTimeout(() => { get("link").textContent = "Copy link"; }, 1500);
}

// Dropped files

function upload(file) {
  const place = get("watch").hidden ? "notice" : "status";
  const sending = new XMLHttpRequest();
  sending.open("PUT", `api/videos/${encodeURIComponent(file.name)}`);
  sending.responseType = "json";
  sending.upload.addEventListener("progress", ({ loaded, total }) => tell(place, `copying ${file.name}: ${Math.floor((100 * loaded) / Math.max(1, total))}%`));
  sending.addEventListener("load", () => {
    if (sending.status !== 200) tell(place, sending.response?.detail ?? "it was refused", true);
    else { tell(place, ""); location.hash = link(sending.response.id); }
  });
  sending.addEventListener("error", () => tell(place, `${file.name} could not be copied: the server does not answer, or refuses it`, true));
  sending.send(file);
}

const holdsFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
for (const kind of ["dragenter", "dragover"]) window.addEventListener(kind, (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  get("over").hidden = false;
});
window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) get("over").hidden = true; });
window.addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  get("over").hidden = true;
  if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
});
get("file").addEventListener("change", () => { if (get("file").files[0]) upload(get("file").files[0]); });

// Forms and buttons

get("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const query = get("query").value.trim();
  const hash = query ? `#${new URLSearchParams({ q: query })}` : "#";
  if (location.hash === hash) route();
  else location.hash = hash;
});
get("query").addEventListener("input", () => {
  if (!get("shelf").hidden) { most = FIRST; showVideos(); }
});
get("askall").addEventListener("click", () => {
  const question = get("query").value.trim();
  if (!question) { get("query").focus(); return; }
  history.pushState(null, "", "#v=");
  view("watch");
  player.close();
  get("screen").hidden = true;
  get("title").textContent = "All videos";
  get("here").hidden = true;
  get("question").value = question;
  asking.ask("all", question, [], begin);
});
get("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const choices = get("choices").value.split("\n").map((line) => line.trim()).filter(Boolean);
  asking.ask(player.id() || "all", get("question").value, choices, begin);
});
get("stop").addEventListener("click", () => { asking.cancel(); tell("status", "stopped"); });
get("forget").addEventListener("click", () => { kept.forgetAll(); showKept(); });
get("more").addEventListener("click", () => { most += FIRST; showVideos(); });
get("before").addEventListener("click", () => asking.step(-1));
get("after").addEventListener("click", () => asking.step(1));
get("link").addEventListener("click", copyLink);
get("keys").addEventListener("click", () => get("help").showModal());
asking.onChange(showKept);
player.onTick(player.moveNeedle);

// Light, dark, or as the system has it

const THEMES = { auto: "◐", light: "☀", dark: "☾" };
function theme(chosen) {
  document.documentElement.dataset.theme = chosen;
  get("theme").textContent = THEMES[chosen];
  get("theme").title = `Colours: ${chosen}`;
  get("theme").setAttribute("aria-label", get("theme").title);
}
function keptTheme() {
  try { return localStorage.getItem("timesearch.theme"); } catch { return null; }
}
theme(keptTheme() in THEMES ? keptTheme() : "auto");
get("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  theme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
  try { localStorage.setItem("timesearch.theme", document.documentElement.dataset.theme); } catch { /* until the reload, then */ }
});

// Keys

const onWatch = {
  a: () => get("question").focus(),
  k: player.toggle,
  " ": player.toggle,
  ArrowLeft: () => player.seek(player.now() - 5),
  ArrowRight: () => player.seek(player.now() + 5),
  ",": () => player.seek(player.now() - 0.1),
  ".": () => player.seek(player.now() + 0.1),
  "[": () => asking.step(-1),
  "]": () => asking.step(1),
  c: copyLink,
  Escape: () => { history.pushState(null, "", "#"); route(); }, // at once: what is typed next is not for the old view
};
const everywhere = { "/": () => { get("query").focus(); get("query").select(); }, "?": () => get("help").showModal() };

window.addEventListener("keydown", (event) => {
  const { target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || get("help").open) return;
  if (target.matches("input, textarea, select")) {
    if (event.key === "Escape") { target.blur(); event.preventDefault(); }
    return;
  }
  if (event.key === " " && target.matches("button, summary, a")) return; // presses it
  if (target.matches("video") && [" ", "ArrowLeft", "ArrowRight"].includes(event.key)) return; // the player's own
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const act = everywhere[key] ?? (get("watch").hidden ? undefined : onWatch[key]);
  if (!act) return;
  event.preventDefault();
  act();
});

window.addEventListener("hashchange", route);
route();
