"use strict";
// Everything that a model, a user or a file name says is put on the page by textContent, never as HTML.

const get = (id) => document.getElementById(id);
const seconds = (time) => `${time.toFixed(1)} s`;
let video = null; // {cache, times, size} of the question that is shown
let choices = []; // its options

function add(parent, tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  parent.append(made);
  return made;
}

function tell(text, bad = false) {
  get("status").textContent = text;
  get("status").classList.toggle("bad", bad);
}

async function listVideos(chosen) {
  const found = await (await fetch("api/videos")).json();
  get("video").replaceChildren(...found.map(({ id, name }) => new Option(name, id, false, id === chosen)));
  if (!found.length) tell("No videos yet: drop one, or start with `timesearch serve FOLDER`.");
}

async function upload(file) {
  tell(`copying ${file.name}`);
  const response = await fetch(`api/videos/${encodeURIComponent(file.name)}`, { method: "PUT", body: file });
  const said = await response.json();
  if (!response.ok) return tell(said.detail, true);
  await listVideos(said.id);
  tell(`${said.name} is chosen`);
}

const frameURL = (index) => `api/frames/${encodeURIComponent(video.cache)}/${index}`;
const position = (time) => `${(100 * time) / Math.max(video.times.at(-1), 0.001)}%`;

function nearest(time) {
  let best = 0;
  video.times.forEach((other, index) => { if (Math.abs(other - time) < Math.abs(video.times[best] - time)) best = index; });
  return best;
}

// The frames around a time, the one at that time marked.
function look(index) {
  const last = video.times.length - 1;
  const around = [-2, -1, 0, 1, 2].map((step) => index + step).filter((other) => other >= 0 && other <= last);
  get("strip").replaceChildren(...around.map((other) => {
    const image = document.createElement("img");
    image.src = frameURL(other);
    image.alt = `frame at ${seconds(video.times[other])}`;
    image.classList.toggle("here", other === index);
    return image;
  }));
  get("caption").textContent = `around ${seconds(video.times[index])}`;
  get("look").hidden = false;
}

function mark(frame, kind) {
  const made = add(get("line"), "button", kind);
  made.type = "button";
  made.style.left = position(frame.seconds);
  made.title = `${kind} at ${seconds(frame.seconds)}`;
  made.setAttribute("aria-label", made.title);
  made.addEventListener("click", (event) => { event.stopPropagation(); look(frame.frame ?? nearest(frame.seconds)); });
}

function markWindow({ arguments: given }) {
  const end = video.times.at(-1);
  const from = Number(given.start_time ?? 0), to = Number(given.end_time ?? -1);
  if (!Number.isFinite(from) || !Number.isFinite(to)) return;
  const first = Math.min(Math.max(from, 0), end), last = to < 0 ? end : Math.min(to, end);
  if (last <= first || (first === 0 && last === end)) return;
  const made = add(get("line"), "div", "window");
  made.style.left = position(first);
  made.style.width = position(last - first);
}

const on = {
  status: ({ text }) => tell(text),
  error: ({ text }) => tell(text, true),
  video(said) {
    video = said;
    tell("searching");
    get("result").hidden = false;
    get("end").textContent = seconds(video.times.at(-1));
  },
  preview: ({ frames }) => frames.forEach((frame) => mark(frame, "preview")),
  turn({ thought, calls }) {
    const step = add(get("steps"), "li");
    if (thought) add(step, "p", "thought", thought);
    calls.forEach((call) => { add(step, "p", "call", call.said); markWindow(call); });
  },
  found({ frames, words, said, said_at: times }) {
    const step = get("steps").lastElementChild;
    words.forEach((line) => add(step, "p", "words", line));
    times.filter((time) => time !== null).forEach((time) => mark({ seconds: time }, "heard"));
    if (!frames.length) return words.length ? undefined : add(step, "p", "wrong", said);
    const row = add(step, "div", "frames");
    frames.forEach((frame) => {
      mark(frame, "found");
      const shown = add(row, "button");
      shown.type = "button";
      const image = add(shown, "img");
      image.src = frame.picture ?? frameURL(frame.frame);
      image.alt = "";
      add(shown, "span", "", seconds(frame.seconds));
      shown.addEventListener("click", () => look(frame.frame ?? nearest(frame.seconds)));
    });
  },
  reanswer: () => {},
  answer({ predicted_answer: answer, reanswer, searched_seconds: times, heard_seconds: heard }) {
    tell("");
    get("answer").textContent = answer === null ? "No answer." : named(answer);
    get("answer").scrollIntoView({ block: "nearest" });
    if (!times.length && !heard.length) get("support").textContent = "Nothing was found: this is a guess from the preview.";
    else {
      const verdict = reanswer !== null && reanswer === answer ? "the same answer" : (reanswer === null ? "no answer" : named(reanswer));
      get("support").textContent = `${[["Seen", times], ["Heard", heard]].filter(([, at]) => at.length).map(([how, at]) => `${how} at ${at.map(seconds).join(", ")}`).join("; ")}; from this alone: ${verdict}.`;
    }
  },
};

// A choice that is answered by its letter is shown with its words.
function named(answer) {
  const chosen = /^[A-Z]$/.test(answer) ? choices[answer.charCodeAt(0) - 65] : undefined;
  return chosen === undefined ? answer : `${answer}. ${chosen}`;
}

async function ask() {
  choices = get("choices").value.split("\n").map((line) => line.trim()).filter(Boolean);
  ["line", "steps", "answer", "support", "strip"].forEach((id) => get(id).replaceChildren());
  get("look").hidden = get("result").hidden = true;
  get("go").disabled = true;
  tell("starting");
  try {
    const response = await fetch("api/ask", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ video: get("video").value, question: get("question").value, options: choices }),
    });
    if (!response.ok) return tell((await response.json()).detail, true);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const [, kind, data] = event.match(/^event: (\w+)\ndata: (.*)$/s);
        on[kind](JSON.parse(data));
      }
    }
  } catch (error) {
    tell(`the server does not answer (${error.message})`, true);
  } finally {
    get("go").disabled = false;
  }
}

get("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
get("file").addEventListener("change", () => { if (get("file").files[0]) upload(get("file").files[0]); });
for (const kind of ["dragenter", "dragover"]) get("drop").addEventListener(kind, (event) => {
  event.preventDefault();
  get("drop").classList.add("over");
});
get("drop").addEventListener("dragleave", () => get("drop").classList.remove("over"));
get("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  get("drop").classList.remove("over");
  if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
});
get("line").addEventListener("click", (event) => {
  const box = get("line").getBoundingClientRect();
  look(nearest(((event.clientX - box.left) / box.width) * video.times.at(-1)));
});
listVideos();
