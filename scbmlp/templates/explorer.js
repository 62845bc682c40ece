// Search, filter, sort and open; what is chosen is kept in the address.
(() => {
  "use strict";

  function build(root) {
    const [find, output, status, link, table] = ["input", "select", "[role=status]", "a", "table"].map((one) => root.querySelector(one));
    const [bodies, heads] = [[...table.tBodies], [...table.querySelectorAll("[data-sort]")]];
    const place = document.querySelectorAll(".scbmlp-explorer[id]").length + 1;
    root.id = place > 1 ? `explorer-${place}` : "explorer";
    let sort = ""; // name of a column, with "-" before it where values fall

    function open(body, opened) {
      body.rows[1].hidden = !opened;
      body.querySelector("button").ariaExpanded = opened;
    }

    function arrange(wanted) {
      const at = heads.findIndex((head) => head.dataset.sort === wanted.replace(/^-/, ""));
      const falls = at >= 0 && wanted.startsWith("-") ? -1 : 1;
      const key = (body) => body.rows[0].cells[Math.max(at, 0)].dataset.key; // of the first column: the given order
      const compare = (a, b) => (!a || !b ? !a - !b : falls * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b)); // unknown last
      sort = at < 0 ? "" : wanted;
      table.append(...bodies.toSorted((a, b) => compare(key(a), key(b))));
      heads.forEach((head, i) => (head.ariaSort = i !== at ? "none" : falls < 0 ? "descending" : "ascending"));
    }

    function show() {
      const typed = find.value.trim().toLowerCase();
      for (const body of bodies) {
        const hit = (name) => typed !== "" && name.textContent.toLowerCase().includes(typed);
        body.querySelectorAll(".name").forEach((name) => name.classList.toggle("hit", hit(name)));
        body.hidden = (output.value && body.dataset.output !== output.value) || (typed && !body.querySelector(".hit"));
      }
      status.textContent = `${bodies.filter((body) => !body.hidden).length} of ${bodies.length} modules.`;
      const opened = bodies.flatMap((body, i) => (body.rows[1].hidden ? [] : [i + 1])).join(" ");
      const state = Object.entries({ find: find.value.trim(), output: output.value, sort, open: opened });
      link.href = `#${root.id}:${new URLSearchParams(state.filter(([, value]) => value))}`;
    }

    function changed() {
      show();
      try {
        history.replaceState(history.state, "", link.hash); // no step of its own in the history
      } catch {
        // A frame without an address shows the same, and cannot be shared.
      }
    }

    // Addresses of other places of the page are left alone.
    function read(first) {
      const [, who, text] = location.hash.match(/^#([\w-]+):(.*)$/) ?? [];
      if (who !== root.id && !first) return;
      const state = new URLSearchParams(who === root.id ? text : "");
      const get = (name) => state.get(name) ?? "";
      find.value = get("find");
      output.selectedIndex = Math.max([...output.options].findIndex(({ value }) => value === get("output")), 0);
      bodies.forEach((body, i) => open(body, get("open").split(" ").includes(String(i + 1))));
      arrange(get("sort"));
      show();
      if (who === root.id) root.scrollIntoView();
    }

    bodies.forEach((body) => (body.querySelector("button").onclick = () => (open(body, body.rows[1].hidden), changed())));
    heads.forEach((head) => (head.firstChild.onclick = () => (arrange(sort === head.dataset.sort ? `-${sort}` : head.dataset.sort), changed())));
    [find, output].forEach((one) => one.addEventListener("input", changed));
    ["hashchange", "load"].forEach((event) => window.addEventListener(event, () => read(false)));
    root.querySelectorAll("button").forEach((one) => (one.disabled = false));
    root.querySelector(".controls").hidden = false;
    read(true);
  }

  document.querySelectorAll(".scbmlp-explorer:not([id])").forEach(build);
})();
