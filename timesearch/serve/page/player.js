// One video on the screen: played as it is, or from a file that the server makes of it, or shown frame by frame.

import { add, clock, fetchJSON, get, link, picture, stream, tell } from "./dom.js";

const player = get("player");
const AHEAD = 0.02; // seconds after a frame's time, so that no rounding shows the one before
let shown = null; // what the server says of the video
let start = 0; // of its first frame, on the player's clock
let wanted = 0; // where to be once it plays
let playing = false; // whether the player shows it; else the frames do
let ways = []; // that are left to try
let leaving = new AbortController();

export const id = () => shown?.id;
export const length = () => shown?.seconds || 0;
export const now = () => (playing ? Math.max(0, player.currentTime - start) : Number(get("slider").value));

// Show a video from a time on.
export async function open(video, seconds = 0) {
  close();
  const signal = leaving.signal;
  shown = { id: video, name: "", seconds: 0 };
  wanted = seconds;
  showFrames();
  try {
    const said = await fetchJSON(`api/video?${new URLSearchParams({ video })}`, signal);
    if (signal.aborted) return;
    shown = said;
  } catch (error) {
    if (!signal.aborted) { tell("note", error.message, true); get("screen").hidden = true; }
    return;
  }
  get("title").textContent = shown.name;
  document.title = `${shown.name} · timesearch`;
  ready();
  const plain = shown.type && player.canPlayType(shown.type) ? [playFile] : [];
  const making = shown.making ? [() => make(false, signal)] : [];
  const again = shown.making === "copy" ? [() => make(true, signal)] : [];
  ways = [...plain, ...making, ...again, giveUp];
  ways.shift()();
}

export function close() {
  leaving.abort();
  leaving = new AbortController();
  ways = [];
  playing = false;
  shown = null;
  player.pause();
  player.removeAttribute("src");
  player.load();
  get("screen").hidden = false;
  tell("note", "");
}

function ready() {
  get("end").textContent = clock(length(), false);
  get("slider").max = String(length());
  get("line").dispatchEvent(new Event("length"));
}

function playFile() {
  start = shown.start;
  player.src = `api/media?${new URLSearchParams({ video: shown.id })}`;
}

async function make(encode, signal) {
  showFrames();
  try {
    await stream("api/playable", { video: shown.id, encode }, (kind, said) => {
      if (signal.aborted) return;
      if (kind === "status") tell("note", `${said.text}; until then, its frames`);
      if (kind === "error") { tell("note", said.text, true); ways.shift()?.(); }
      if (kind === "ready") {
        tell("note", "");
        start = said.start;
        player.src = said.address;
      }
    }, signal);
  } catch (error) {
    if (!signal.aborted) { tell("note", error.message, true); ways.shift()?.(); }
  }
}

function giveUp() {
  showFrames();
  const said = shown.why || get("note").textContent || "This browser does not play the video.";
  tell("note", `${said.replace(/[.:;]?$/, ".")} Its frames are shown instead.`);
}

function showFrames() {
  wanted = shown && playing ? now() : wanted;
  playing = false;
  player.hidden = true;
  get("frames").hidden = false;
  still(wanted);
}

// The picture at a time; while one loads, only the latest of those asked for meanwhile follows.
let loading = false;
let following = null;
function still(seconds) {
  get("slider").value = String(seconds);
  tick();
  if (!shown) return;
  if (loading) { following = seconds; return; }
  loading = true;
  following = null;
  const image = get("still");
  image.onload = image.onerror = () => {
    loading = false;
    if (following !== null) still(following);
  };
  image.alt = `frame at ${clock(seconds)}`;
  image.src = picture(shown.id, seconds, 960);
}

export function seek(seconds) {
  const time = Math.max(0, length() ? Math.min(seconds, length()) : seconds);
  wanted = time;
  if (playing) player.currentTime = time + start + AHEAD;
  else still(time);
  get("screen").scrollIntoView({ block: "nearest" }); // on a phone, the times stand far below it
  remember();
}

export function toggle() {
  if (!playing) return;
  if (player.paused) player.play().catch(() => {});
  else player.pause();
}

// The address names the moment, so that a reload or a copied address comes back to it.
function remember() {
  if (!shown) return;
  const fields = new URLSearchParams(location.hash.slice(1));
  const kept = fields.get("k");
  const address = link(shown.id, playing ? wanted : now());
  history.replaceState(null, "", kept && fields.get("v") === shown.id ? `${address}&k=${encodeURIComponent(kept)}` : address);
}

let ticked = () => {};
export const onTick = (listener) => { ticked = listener; };
function tick() {
  get("clock").textContent = clock(now());
  ticked(now());
}

player.addEventListener("loadedmetadata", () => {
  if (!player.videoWidth) { failed(); return; } // it would play the sound alone
  playing = true;
  get("frames").hidden = true;
  player.hidden = false;
  if (!shown.seconds && Number.isFinite(player.duration)) {
    shown.seconds = player.duration - start;
    ready();
  }
  player.currentTime = wanted + start + AHEAD;
});
function failed() {
  if (!player.hasAttribute("src") || !shown) return;
  player.removeAttribute("src");
  if (playing) wanted = now();
  showFrames();
  ways.shift()?.();
}
player.addEventListener("error", failed);
player.addEventListener("timeupdate", tick);
player.addEventListener("seeking", tick);
for (const kind of ["pause", "seeked"]) player.addEventListener(kind, () => {
  if (!playing || player.seeking) return;
  if (Math.abs(now() - wanted) > 2 * AHEAD) wanted = now();
  remember();
});
get("slider").addEventListener("input", () => { wanted = Number(get("slider").value); still(wanted); });
get("slider").addEventListener("change", remember);

// The time line: a click goes there, and a needle shows where the player is.
const line = get("line");
export const place = (time) => `${Math.min(100, Math.max(0, (100 * time) / Math.max(length(), 0.001)))}%`;
line.addEventListener("click", (event) => {
  const box = line.getBoundingClientRect();
  if (length()) seek(((event.clientX - box.left) / box.width) * length());
});

export function clearLine() {
  line.replaceChildren();
  add(line, "i", "needle");
}
export function moveNeedle(time) {
  const needle = line.querySelector(".needle");
  if (needle) needle.style.left = place(time);
}
