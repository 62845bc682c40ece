// The view of one module, built of the data in the page. Texts go in as text, never as markup.
(() => {
  "use strict";

  const made = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // Numbers of one table have as many decimals as the largest of them needs for three digits.
  const fixed = (values) => {
    const largest = Math.max(...values.map(Math.abs));
    const decimals = largest > 0 ? Math.min(Math.max(2 - Math.floor(Math.log10(largest)), 0), 20) : 0;
    return (value) => {
      const text = value.toFixed(decimals);
      return text.replace("-", Number(text) === 0 ? "" : "\u2212");
    };
  };
  const short = (value) =>
    (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)))).replace("-", "\u2212");

  function build(root) {
    const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    const find = (name) => root.querySelector(`.${name}`);
    const [output, module, gene] = ["output", "module", "gene"].map((name) => root.querySelector(`[name="${name}"]`));

    root.id = root.dataset.name; // one explorer shown twice has two addresses
    for (let n = 2; document.querySelectorAll(`[id="${root.id}"]`).length > 1; n++) root.id = `${root.dataset.name}-${n}`;

    // Gene to its places, whatever the case it is typed in.
    const places = new Map();
    data.outputs.forEach((one, i) =>
      one.modules.forEach((row, j) => {
        for (const pole of ["positive", "negative"])
          row[pole].forEach(([name, loading], rank) => {
            const key = name.toUpperCase();
            if (!places.has(key)) places.set(key, { name, at: [] });
            places.get(key).at.push({ i, j, pole, rank: rank + 1, loading });
          });
      }),
    );
    for (const one of places.values()) one.at.sort((a, b) => a.rank - b.rank);
    const names = [...places.values()].map((one) => one.name).sort();
    const list = made("datalist", { id: `${root.id}-genes` }, ...names.map((value) => made("option", { value })));
    gene.after(list);
    gene.setAttribute("list", list.id);

    const label = (i, j) => `${data.outputs[i].name}, module ${j + 1}`;
    const options = (select, texts) => select.replaceChildren(...texts.map((text, i) => made("option", { value: i }, text)));
    const fill = (table, rows) => table.tBodies[0].replaceChildren(...rows);
    // A first cell of words and a picture that says nothing which the numbers beside it do not say.
    const head = (words, picture) =>
      made("th", { scope: "row" }, made("span", { className: "pair" }, made("span", { className: "words" }, ...words), picture));
    // A reader of the screen is told what is new, and nothing twice.
    const say = (place, ...parts) => {
      const words = made("p", {}, ...parts);
      if (words.textContent !== place.textContent) place.replaceChildren(...words.childNodes);
    };
    const cells = (...texts) => texts.map((text) => made("td", {}, text));
    const button = (text, onclick) => made("button", { type: "button", onclick }, text);

    options(output, data.outputs.map((one) => one.name));
    const sign = (value) => (value > 0 ? "up" : "down");
    function choose(i, j) {
      output.value = i;
      options(module, data.outputs[i].modules.map((row, k) => `${k + 1}, pushes ${sign(row.eigenvalue)}`));
      module.value = j;
    }

    function showGenes(row) {
      const both = [...row.positive, ...row.negative].map(([, loading]) => loading);
      const text = fixed(both);
      const largest = Math.max(...both.map(Math.abs));
      for (const pole of ["positive", "negative"]) {
        const rows = row[pole].map(([name, loading]) => {
          const bar = made("span", { className: "bar" });
          bar.style.setProperty("--size", Math.abs(loading) / largest);
          const marked = name.toUpperCase() === gene.value.trim().toUpperCase();
          return made("tr", {}, head([marked ? made("mark", {}, name) : name], bar), ...cells(text(loading)));
        });
        fill(root.querySelector(`.genes.${pole}`), rows.length ? rows : [made("tr", {}, made("td", { colSpan: 2 }, "no gene"))]);
      }
    }

    function showScores(row, own) {
      const all = row.scores.flat();
      const text = fixed(all);
      const [low, high] = [Math.min(...all), Math.max(...all)];
      const at = (value) => (high > low ? (value - low) / (high - low) : 0.5);
      const rows = data.groups.map((group, k) => {
        const [mean, first, quarter, median, third, last] = row.scores[k];
        const box = made("span", { className: "box" });
        for (const name of ["whisker", "middle", "median", "mean"]) box.append(made("span", { className: name }));
        if (low <= 0 && high >= 0) box.prepend(made("span", { className: "zero" }));
        const place = { zero: 0, first, quarter, median, third, last, mean };
        for (const [name, value] of Object.entries(place)) box.style.setProperty(`--${name}`, at(value));
        const words = group.name === own ? made("strong", {}, group.name) : group.name;
        const count = made("small", {}, ` ${group.cells.toLocaleString("en")}`);
        return made("tr", {}, head([words, count], box), ...cells(...[mean, quarter, median, third].map(text)));
      });
      fill(find("scores"), rows);
    }

    function showSets(row) {
      const rows = (row.sets ?? []).map((set) =>
        made(
          "tr",
          {},
          made("th", { scope: "row" }, set.term, made("small", {}, ` ${set.overlap} of ${set.size}: ${set.genes}`)),
          ...cells(set.pole, short(set.q)),
        ),
      );
      fill(find("sets"), rows);
      find("sets").hidden = !rows.length;
      find("none").hidden = rows.length > 0;
      find("none").textContent = row.sets === null ? "" : "No gene set has q below 0.05 here.";
    }

    function headline(i, j) {
      const row = data.outputs[i].modules[j];
      const parts = [made("strong", {}, label(i, j)), ` pushes ${data.outputs[i].name} ${sign(row.eigenvalue)} (eigenvalue ${short(row.eigenvalue)}).`];
      const known = row.trust ?? {};
      if ("trusted" in known) parts.push(known.trusted ? " Trusted" : made("strong", {}, " Not trusted, and not to be interpreted"));
      const evidence = [];
      if ("stability" in known) evidence.push(`stability ${short(known.stability)}`);
      if ("p" in known) evidence.push(`p ${short(known.p)}`);
      if (evidence.length) parts.push(`${"trusted" in known ? ": " : " Evidence: "}${evidence.join(", ")}`);
      if (evidence.length || "trusted" in known) parts.push(".");
      if ("gain_curved" in known) parts.push(` Gain over single genes: ${short(known.gain_curved)}.`);
      return parts;
    }

    function showFound() {
      const typed = gene.value.trim();
      const known = places.get(typed.toUpperCase());
      const number = known ? known.at.length : 0;
      find("found").hidden = !known;
      if (known) {
        const text = fixed(known.at.map((one) => one.loading));
        find("found").caption.textContent = `Where ${known.name} is among the ${data.n_genes} strongest genes of a pole`;
        fill(
          find("found"),
          known.at.map(({ i, j, pole, rank, loading }) =>
            made(
              "tr",
              {},
              made("th", { scope: "row" }, button(label(i, j), () => go(i, j))),
              ...cells(pole, rank, text(loading)),
            ),
          ),
        );
        say(find("answer"), `${known.name}: in ${number} ${number === 1 ? "module" : "modules"}.`);
      } else if (typed) {
        const near = names.filter((name) => name.toUpperCase().startsWith(typed.toUpperCase())).slice(0, 6);
        say(
          find("answer"),
          `${typed} is not among the ${data.n_genes} strongest genes of any pole.`,
          ...near.flatMap((name, k) => [k ? ", " : " There are: ", button(name, () => search(name))]),
        );
      } else {
        say(find("answer"));
      }
      return known;
    }

    function show() {
      const [i, j] = [Number(output.value), Number(module.value)];
      const row = data.outputs[i].modules[j];
      const known = showFound();
      say(find("headline"), ...headline(i, j));
      showGenes(row);
      showScores(row, data.outputs[i].name);
      showSets(row);
      const state = new URLSearchParams({ output: data.outputs[i].name, module: j + 1, ...(known && { gene: known.name }) });
      find("view").href = `#${root.id}:${state}`;
    }

    function changed() {
      show();
      try {
        history.replaceState(history.state, "", find("view").hash); // no step of its own in the history
      } catch {
        // A frame without an address shows the same, and cannot be shared.
      }
    }
    function pick(i, j) {
      choose(i, j);
      changed();
    }
    // What was pressed may be gone, so the keyboard goes where the view begins.
    function go(i, j) {
      pick(i, j);
      find("headline").focus();
    }
    function search(name) {
      gene.value = name;
      changed();
      gene.focus();
    }

    // Addresses of other places of the page are none of ours.
    function read() {
      const [, who, state] = location.hash.match(/^#([\w-]+):(.*)$/) ?? [];
      if (who !== root.id) return false;
      const wanted = new URLSearchParams(state);
      const i = Math.max(data.outputs.findIndex((one) => one.name === wanted.get("output")), 0);
      const j = Number(wanted.get("module")) - 1;
      choose(i, data.outputs[i].modules[j] ? j : 0);
      gene.value = wanted.get("gene") ?? "";
      show();
      return true;
    }

    output.addEventListener("change", () => pick(Number(output.value), 0));
    module.addEventListener("change", changed);
    gene.addEventListener("input", changed);
    window.addEventListener("hashchange", () => read() && root.scrollIntoView());

    const all = find("all");
    root.querySelectorAll(".pick").forEach((place) => {
      const row = place.closest("tr");
      const [i, j] = [[...row.closest("table").tBodies].indexOf(row.parentNode), row.sectionRowIndex - 1];
      const choice = button(place.textContent, () => go(i, j));
      choice.ariaLabel = `${data.outputs[i].name}, ${place.textContent}`;
      place.replaceChildren(choice);
    });
    all.open = false;
    let open = false;
    window.addEventListener("beforeprint", () => ((open = all.open), (all.open = true)));
    window.addEventListener("afterprint", () => (all.open = open));

    find("live").hidden = false;
    if (read()) {
      window.addEventListener("load", () => root.scrollIntoView());
    } else {
      choose(0, 0);
      show();
    }
  }

  document.querySelectorAll(".scbmlp-explorer:not([id])").forEach(build);
})();
