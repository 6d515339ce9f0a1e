(() => {
  "use strict";
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); });
  dark.addEventListener("change", label);
  label();

  const value = (row, column) => {
    const cell = row.cells[column];
    const number = parseFloat(cell.dataset.v);
    return Number.isNaN(number) ? cell.textContent.trim() : number;
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a === "number") return -1;
    if (typeof b === "number") return 1;
    return a.localeCompare(b, "en", { numeric: true });
  };
  const sort = (head) => {
    const column = head.cellIndex;
    const body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [value(row, column), row]);
    rows.sort(([a], [b]) => (up ? 1 : -1) * compare(a, b));
    body.append(...rows.map(([, row]) => row));
  };
  document.addEventListener("click", (event) => {
    const head = event.target.closest("table.sortable thead th");
    if (head && event.target.closest("button")) sort(head);
  });

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const part of opened) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of opened) part.open = false; });

  if (!("live" in document.body.dataset)) return;
  const state = document.getElementById("live");
  const say = (text, good) => { state.textContent = text; state.classList.toggle("off", !good); };
  const refresh = async () => {
    const answer = await fetch(location.href, { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const open = [...document.querySelectorAll("details[open]")].map((part) => part.id);
    const sorted = [...document.querySelectorAll("table.sortable")].map((table) => {
      const head = table.querySelector("th[aria-sort]");
      return head && [table.caption.textContent, head.cellIndex, head.getAttribute("aria-sort")];
    });
    document.querySelector("main").replaceWith(page.querySelector("main"));
    for (const part of ["h1", ".lead", "footer"]) {
      document.querySelector(part).textContent = page.querySelector(part).textContent;
    }
    document.title = page.title;
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    for (const table of document.querySelectorAll("table.sortable")) {
      const own = sorted.find((entry) => entry && entry[0] === table.caption.textContent);
      if (!own) continue;
      const head = table.tHead.rows[0].cells[own[1]];
      sort(head);
      if (own[2] === "descending") sort(head);
    }
  };
  const events = new EventSource("events");
  events.addEventListener("open", () => say("live", true));
  // One refresh at a time: of two at once the older page could arrive last, and stay.
  let running = false, behind = false;
  const follow = async () => {
    behind = true;
    if (running) return;
    running = true;
    while (behind) {
      behind = false;
      try {
        await refresh();
        say("live", true);
      } catch {
        say("not reached", false);
        behind = true;
        await new Promise((resolve) => setTimeout(resolve, 1000));
      }
    }
    running = false;
  };
  events.addEventListener("change", follow);
  events.addEventListener("error", () => say("not reached", false));
})();
