import { $, duration, element, follow, post, setClock, setText, showState, timeOfDay, took } from "./common.js";

// As many as the service keeps; the page must not grow for ever.
const MAX_LINES = 2000;
const id = decodeURIComponent(location.pathname.split("/").pop());
const path = `/jobs/${encodeURIComponent(id)}`;
const output = $("output");
$("report").href = `${path}/files/report.html`;
let job = null;

// --- the job ------------------------------------------------------------------------------------

function show(news) {
  job = news;
  setClock(job.now);
  document.title = `#${job.number} ${job.state}`;
  setText($("title"), `Job #${job.number}`);
  showState($("state"), job);
  setText($("command"), job.command);
  $("cancel").hidden = job.ended !== null;
  $("cancel").disabled = job.stopping;
  $("files").hidden = !job.has_report;
  showFacts();
  showCulprit();
  showRanks();
}

function showFacts() {
  const facts = [["Submitted", timeOfDay(job.created)]];
  if (job.started !== null) facts.push(["Started", timeOfDay(job.started)]);
  if (job.state === "queued") facts.push(["Waits", took(job)]);
  else if (job.started !== null) facts.push([job.ended === null ? "Runs" : "Took", took(job)]);
  if (job.hang_timeout !== null) facts.push(["Hang timeout", duration(job.hang_timeout)]);
  if (job.env.length) facts.push(["Environment", job.env.join(", ")]);
  const list = $("facts");
  while (list.children.length > facts.length) list.lastChild.remove();
  facts.forEach(([name, value], index) => {
    if (!list.children[index]) {
      const pair = element("div");
      pair.append(element("dt"), element("dd"));
      list.append(pair);
    }
    setText(list.children[index].firstChild, name);
    setText(list.children[index].lastChild, value);
  });
}

function showCulprit() {
  const found = job.culprit;
  $("culprit").hidden = !found && !job.error;
  if (found) {
    setText($("culprit-title"), `Rank ${found.rank} failed first: ${found.how}`);
    setText($("culprit-message"), found.message);
    const stack = found.stack && `It was in ${found.stack}\n\n`;
    const traceback = found.traceback.includes("\n") ? found.traceback : "";
    setText($("culprit-text"), stack + (traceback || found.stderr_tail));
  } else if (job.error) {
    setText($("culprit-title"), job.state === "failed" ? "It could not be run" : "It was ended");
    setText($("culprit-message"), job.error);
  }
  $("culprit-more").hidden = !$("culprit-text").textContent.trim();
}

function showRanks() {
  const list = $("ranks");
  for (const rank of job.by_rank) {
    let node = list.children[rank.rank];
    if (!node) {
      node = element("li");
      node.append(element("span", "name"), element("span", "state"), element("progress"));
      list.append(node);
    }
    const [name, state, progress] = node.children;
    name.className = `name rank-${rank.rank % 6}`;
    setText(name, `[${rank.rank}]`);
    state.className = `state ${rank.state}`;
    setText(state, rank.how ? `${rank.state}: ${rank.how}` : rank.state);
    node.title = rank.pid ? `process ${rank.pid}` : "";
    progress.hidden = rank.done === null;
    progress.max = rank.total || 1;
    if (rank.total && rank.done !== null) progress.value = rank.done;
    else progress.removeAttribute("value"); // of an unknown total
  }
}

// --- its output ---------------------------------------------------------------------------------

function line(item) {
  const isNote = item.rank === undefined;
  const made = element("li", isNote ? "note" : item.stream);
  if (!isNote) made.append(element("span", `rank-${item.rank % 6}`, `[${item.rank}] `));
  made.append(item.text || " ");
  made.title = timeOfDay(item.time);
  return made;
}

const count = (lines) => `${lines.toLocaleString("en")} ${lines === 1 ? "line" : "lines"}`;
let missed = 0;

function showOutput(news) {
  const added = document.createDocumentFragment();
  if (news.lost) {
    added.append(element("li", "note lost", `${count(news.lost)} came too fast to be shown here`));
  }
  for (const item of news.items) added.append(line(item));
  output.append(added);
  missed += news.lost;
  while (output.children.length > MAX_LINES) {
    if (!output.firstChild.classList.contains("lost")) missed += 1;
    output.firstChild.remove();
  }
  if (missed) setText($("missed"), `${count(missed)} not shown: the files have them`);
  if ($("follow").checked) output.scrollTop = output.scrollHeight;
}

// Who scrolls up wants to read; who scrolls to the end again wants to follow.
output.addEventListener("scroll", () => {
  $("follow").checked = output.scrollTop + output.clientHeight > output.scrollHeight - 8;
});
$("follow").addEventListener("change", () => {
  if ($("follow").checked) output.scrollTop = output.scrollHeight;
});

// ------------------------------------------------------------------------------------------------

$("cancel").addEventListener("click", async () => {
  $("cancel").disabled = true;
  try {
    await post(`${path}/cancel`);
  } catch (error) {
    $("cancel").disabled = false;
    setText($("lost"), error.message);
    $("lost").hidden = false;
  }
});

if ((await fetch(path)).status === 404) {
  $("missing").hidden = false;
} else {
  follow(`${path}/stream`, { job: show, output: showOutput, end: (_, stream) => stream.close() });
  setInterval(() => { if (job && job.ended === null) showFacts(); }, 1000);
}
