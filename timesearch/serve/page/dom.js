// What all parts of the page share. Whatever a model, a user or a file name says is shown by textContent, never as HTML.

export const get = (id) => document.getElementById(id);

export function add(parent, tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  parent.append(made);
  return made;
}

export function tell(id, text, bad = false) {
  get(id).textContent = text;
  get(id).classList.toggle("bad", bad);
}

// A time as players show it: 1:02.5, 1:02:03.5.
export function clock(seconds, tenths = true) {
  const all = Math.max(0, tenths ? Math.round(seconds * 10) / 10 : Math.floor(seconds));
  const hours = Math.floor(all / 3600), minutes = Math.floor(all / 60) % 60;
  const rest = (all % 60).toFixed(tenths ? 1 : 0).padStart(tenths ? 4 : 2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

// A link to a video, or to one moment of it.
export function link(video, seconds) {
  const fields = new URLSearchParams({ v: video });
  if (seconds !== undefined) fields.set("t", String(Math.round(seconds * 100) / 100));
  return `#${fields}`;
}

export const picture = (video, seconds, width) =>
  `api/picture?${new URLSearchParams({ video, seconds: String(Math.max(0, seconds)), width })}`;

// An image that says so where there is no picture.
export function image(parent, source, alt = "") {
  const made = add(parent, "img");
  made.loading = "lazy";
  made.decoding = "async";
  made.alt = alt;
  made.addEventListener("error", () => made.classList.add("broken"));
  made.src = source;
  return made;
}

// Text in which each time, such as 23.0s, is a button.
export function withTimes(parent, text, longest, go) {
  let last = 0;
  for (const found of text.matchAll(/(?<![\w.])(\d{1,6}(?:\.\d{1,3})?) ?s\b/g)) {
    const seconds = Number(found[1]);
    if (seconds > longest) continue;
    parent.append(text.slice(last, found.index));
    const made = add(parent, "button", "time", clock(seconds));
    made.type = "button";
    made.addEventListener("click", () => go(seconds));
    last = found.index + found[0].length;
  }
  parent.append(text.slice(last));
}

// Send a question or a request, and be told of each event of the answer. The server's refusals are errors.
export async function stream(address, body, on, signal) {
  const response = await fetch(address, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error((await response.json()).detail);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const [, kind, data] = event.match(/^event: (\w+)\ndata: (.*)$/s);
      on(kind, JSON.parse(data));
    }
  }
}

export async function fetchJSON(address, signal) {
  const response = await fetch(address, { signal });
  const said = await response.json();
  if (!response.ok) throw new Error(said.detail);
  return said;
}
