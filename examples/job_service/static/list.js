import { $, element, follow, post, setClock, setText, showState, timeOfDay, took } from "./common.js";

const jobs = new Map();
const rows = new Map();

function makeRow(job) {
  const row = element("li");
  const link = element("a", "job");
  link.href = `/follow/${encodeURIComponent(job.id)}`;
  link.append(
    element("span", "number", `#${job.number}`),
    element("span", "state"),
    element("code", "command", job.command),
    element("span", "meta"),
    element("span", "why"),
  );
  row.append(link);
  return row;
}

function showRow(row, job) {
  const ranks = job.ranks === 1 ? "1 rank" : `${job.ranks} ranks`;
  const since = job.state === "queued" ? "waits" : timeOfDay(job.started ?? job.created);
  showState(row.querySelector(".state"), job);
  setText(row.querySelector(".meta"), `${ranks} · ${since} · ${took(job)}`);
  setText(row.querySelector(".why"), job.why);
}

function show(news) {
  setClock(news.now);
  setText($("counts"), `${news.running} of ${news.at_once} running, ${news.queued} queued`);
  for (const job of news.rows) jobs.set(job.id, job);
  const kept = new Set(news.ids);
  for (const id of [...jobs.keys()]) {
    if (kept.has(id)) continue;
    jobs.delete(id);
    rows.get(id)?.remove();
    rows.delete(id);
  }
  for (const job of news.rows) {
    if (!rows.has(job.id)) rows.set(job.id, makeRow(job));
    showRow(rows.get(job.id), job);
  }
  putInOrder();
  $("none").hidden = jobs.size > 0;
}

// What runs, then what waits, each in its turn; then what has ended, the newest first.
function putInOrder() {
  const place = (job) => {
    if (job.ended !== null) return [2, -job.number];
    return [job.started === null ? 1 : 0, job.number];
  };
  const sorted = [...jobs.values()]
    .map((job) => [...place(job), rows.get(job.id)])
    .sort((one, other) => one[0] - other[0] || one[1] - other[1]);
  const list = $("jobs");
  sorted.forEach(([, , row], index) => {
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
  });
}

function environment(text) {
  const found = {};
  for (const line of text.split("\n").filter((each) => each.trim())) {
    const [name, ...value] = line.split("=");
    if (!value.length) throw new Error(`environment: ${line}: expected NAME=value`);
    found[name.trim()] = value.join("=");
  }
  return found;
}

async function submit(event) {
  event.preventDefault();
  const form = new FormData($("form"));
  const problem = $("problem");
  try {
    const timeout = form.get("hang_timeout");
    const job = await post("/jobs", {
      command: form.get("command"),
      ranks: Number(form.get("ranks")),
      env: environment(form.get("env")),
      hang_timeout: timeout ? Number(timeout) : null,
    });
    location.href = `/follow/${encodeURIComponent(job.id)}`;
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
  }
}

$("new").addEventListener("click", () => $("dialog").showModal());
$("dismiss").addEventListener("click", () => $("dialog").close());
$("form").addEventListener("submit", submit);

follow("/stream", { jobs: show });
setInterval(() => {
  for (const [id, job] of jobs) if (job.ended === null) showRow(rows.get(id), job);
}, 1000);
