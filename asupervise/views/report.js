"use strict";
// Searches the logs and filters them. All that is on the page is there without this, too.
(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const find = document.getElementById("find");
  const only = document.getElementById("only");
  const stream = document.getElementById("stream");
  const attempt = document.getElementById("attempt");
  const found = document.getElementById("found");
  const none = document.getElementById("none");
  const more = document.getElementById("more");
  const mostMarked = 5000;

  // "0,2-5" as pairs of numbers; null for all.
  const ranges = (text) => {
    const parts = [...text.matchAll(/(\d+)(?:\s*-\s*(\d+))?/g)];
    return parts.length ? parts.map(([, a, b]) => [Number(a), Number(b ?? a)]) : null;
  };
  const meet = (some, others) =>
    !some || others.some(([a, b]) => some.some(([c, d]) => a <= d && c <= b));

  const logs = [...document.querySelectorAll("details.log")].map((box) => ({
    box,
    pre: box.querySelector("pre"),
    hits: box.querySelector(".hits"),
    ranks: ranges(box.dataset.ranks) ?? [],
    wasOpen: box.open,
    lines: null,
  }));

  for (const log of logs) {
    log.box.addEventListener("toggle", () => {
      if (!find.value) log.wasOpen = log.box.open;
    });
  }

  // Lines become elements only where something was found: until then they are text.
  const split = (log) => {
    if (log.lines) return log.lines;
    const rows = [document.createElement("div")];
    for (const node of [...log.pre.childNodes]) {
      if (node.nodeType !== Node.TEXT_NODE) {
        rows.at(-1).append(node);
        continue;
      }
      node.data.split("\n").forEach((part, place) => {
        if (place) rows.push(document.createElement("div"));
        if (part) rows.at(-1).append(part);
      });
    }
    log.pre.replaceChildren(...rows);
    return (log.lines = rows);
  };

  const matcher = (text) => {
    const pattern = /^\/(.+)\/$/.exec(text);
    if (!pattern) {
      const wanted = text.toLowerCase();
      return { test: (line) => line.toLowerCase().includes(wanted), wanted };
    }
    try {
      const regex = new RegExp(pattern[1], "i");
      return { test: (line) => regex.test(line) };
    } catch {
      return null;
    }
  };

  // Where a position in a row's text stands: its pieces of one colour are nodes of their own.
  const place = (pieces, at, isEnd) => {
    const piece = pieces.findLast(([start]) => (isEnd ? start < at : start <= at));
    return [piece[1], at - piece[0]];
  };

  const mark = (rows, wanted, marks) => {
    for (const row of rows) {
      const pieces = [];
      let text = "";
      const walker = document.createTreeWalker(row, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        pieces.push([text.length, walker.currentNode]);
        text += walker.currentNode.data;
      }
      const lower = text.toLowerCase();
      // Of some letters the small one is longer: then the positions are not the same.
      if (lower.length !== text.length) continue;
      for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, at + wanted.length)) {
        if (marks.size >= mostMarked) return;
        const range = new Range();
        range.setStart(...place(pieces, at, false));
        range.setEnd(...place(pieces, at + wanted.length, true));
        marks.add(range);
      }
    }
  };

  const search = (log, match, marks) => {
    const text = log.pre ? log.pre.textContent : "";
    if (!log.lines && match.wanted && !match.test(text)) return 0;
    if (!log.pre) return 0;
    const rows = split(log);
    const shown = rows.filter((row) => !(row.hidden = !match.test(row.textContent)));
    if (marks && match.wanted) mark(shown, match.wanted, marks);
    return shown.length;
  };

  const apply = () => {
    const text = find.value;
    const match = text ? matcher(text) : null;
    find.setCustomValidity(text && !match ? "This is no pattern." : "");
    const wanted = ranges(only.value);
    const marks = globalThis.CSS?.highlights && globalThis.Highlight ? new Highlight() : null;
    let files = 0;
    let total = 0;
    for (const log of logs) {
      const data = log.box.dataset;
      let fits = meet(wanted, log.ranks);
      fits &&= !stream.value || data.stream === stream.value;
      fits &&= !attempt?.value || data.attempt === attempt.value;
      let lines = 0;
      if (fits && match) {
        lines = search(log, match, marks);
        fits = lines > 0;
      } else if (log.lines) {
        for (const row of log.lines) row.hidden = false;
      }
      log.hits.textContent = lines ? `${lines.toLocaleString("en")} ${lines === 1 ? "line" : "lines"}` : "";
      log.box.hidden = !fits;
      log.box.open = match ? fits && files < 20 : log.wasOpen;
      files += fits;
      total += lines;
    }
    if (marks) CSS.highlights.set("found", marks);
    none.hidden = files > 0;
    if (more) {
      const some = logs.some((log) => !log.box.hidden && more.contains(log.box));
      more.hidden = !some;
      more.open = some && (match !== null || files < 40);
    }
    const said = [];
    if (match) said.push(`${total.toLocaleString("en")} ${total === 1 ? "line" : "lines"}`);
    if (match || files < logs.length) said.push(`${files.toLocaleString("en")} of ${logs.length.toLocaleString("en")} logs`);
    found.textContent = said.join(" in ");
  };

  let soon = 0;
  const later = () => {
    clearTimeout(soon);
    soon = setTimeout(apply, 120);
  };
  form.addEventListener("input", later);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    apply();
  });
  document.addEventListener("keydown", (event) => {
    const typing = /^(input|select|textarea)$/i.test(event.target.tagName ?? "");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      find.focus();
    }
  });
  form.hidden = false;
})();
