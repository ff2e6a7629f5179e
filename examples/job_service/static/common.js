// What both pages use. Whatever comes from the service is put in as text, never as HTML.

export const $ = (id) => document.getElementById(id);

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Only what has changed: replaced text loses its selection.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function duration(seconds) {
  if (seconds < 10) return `${Math.max(0, seconds).toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const [minutes, rest] = [Math.floor(whole / 60), whole % 60];
  if (minutes < 60) return `${minutes} min ${rest} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function timeOfDay(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString();
}

// How far this machine's clock is from the service's.
let clockOffset = 0;
export const setClock = (now) => { clockOffset = now - Date.now() / 1000; };

// How long a job has run, or waits.
export function took(job) {
  const now = Date.now() / 1000 + clockOffset;
  const from = job.started ?? job.created;
  return duration((job.ended ?? now) - from);
}

export function showState(node, job) {
  const state = job.stopping ? "cancelling" : job.state;
  node.className = `state ${state}`;
  setText(node, state);
}

// The answer's JSON; throws an Error that says what is wrong.
export async function post(path, data) {
  const options = { method: "POST" };
  if (data !== undefined) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(data);
  }
  const answer = await fetch(path, options);
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error ?? answer.statusText);
  return said;
}

// Follows a stream. The browser connects again by itself, and says how far it had got.
export function follow(path, handlers) {
  const stream = new EventSource(path);
  const lost = $("lost");
  stream.addEventListener("open", () => { lost.hidden = true; });
  stream.addEventListener("error", () => {
    const gone = stream.readyState === EventSource.CLOSED;
    setText(lost, gone ? "The service knows nothing of this any more." : "No connection to the service. Trying again …");
    lost.hidden = false;
  });
  for (const [name, handle] of Object.entries(handlers)) {
    stream.addEventListener(name, (event) => handle(JSON.parse(event.data), stream));
  }
}
