// The view of one module, built of the data in the page. Texts go in as text, never as markup.
(() => {
  "use strict";

  const POLES = ["positive", "negative"];
  const made = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const button = (text, onclick) => made("button", { type: "button", onclick }, text);
  const line = (head, ...texts) => made("tr", {}, made("th", { scope: "row" }, ...head), ...texts.map((text) => made("td", {}, text)));
  // Words, and a picture that only repeats the numbers beside it.
  const pair = (words, picture) => [made("span", { className: "pair" }, made("span", { className: "words" }, ...words), picture)];
  // A screen reader is told what is new, and nothing twice.
  const say = (place, ...parts) => {
    const words = made("p", {}, ...parts);
    if (words.textContent !== place.textContent) place.replaceChildren(...words.childNodes);
  };

  const sign = (value) => (value > 0 ? "up" : "down");
  const short = (value) =>
    (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)))).replace("-", "\u2212");
  // Numbers of one table have as many decimals as the largest of them needs for three digits.
  const fixed = (values) => {
    const largest = Math.max(...values.map(Math.abs));
    const decimals = largest > 0 ? Math.min(Math.max(2 - Math.floor(Math.log10(largest)), 0), 20) : 0;
    return (value) => value.toFixed(decimals).replace("-", Number(value.toFixed(decimals)) === 0 ? "" : "\u2212");
  };

  function headline(output, number, row) {
    const { trusted, stability, p, gain_curved: gain } = row.trust ?? {};
    const evidence = Object.entries({ stability, p }).filter(([, value]) => value !== undefined);
    const parts = [made("strong", {}, `${output}, module ${number}`), ` pushes ${output} ${sign(row.eigenvalue)} (eigenvalue ${short(row.eigenvalue)}).`];
    if (trusted === false) parts.push(made("strong", {}, " Not trusted, and not to be interpreted"));
    else if (trusted || evidence.length) parts.push(trusted ? " Trusted" : " Evidence");
    if (evidence.length) parts.push(`: ${evidence.map(([name, value]) => `${name} ${short(value)}`).join(", ")}`);
    if (trusted !== undefined || evidence.length) parts.push(".");
    if (gain !== undefined) parts.push(` Gain over single genes: ${short(gain)}.`);
    return parts;
  }

  function boxOf([mean, first, quarter, median, third, last], low, high) {
    const at = (value) => (high > low ? (100 * (value - low)) / (high - low) : 50);
    const box = made("span", { className: "box" });
    const draw = (className, from, to) => {
      const part = made("span", { className });
      part.style.left = `${at(from)}%`;
      if (to !== undefined) part.style.width = `${at(to) - at(from)}%`;
      box.append(part);
    };
    if (low <= 0 && high >= 0) draw("zero", 0);
    draw("whisker", first, last);
    draw("middle", quarter, third);
    draw("median", median);
    draw("mean", mean);
    return box;
  }

  function build(root) {
    const { outputs, groups, n_genes } = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    const find = (name) => root.querySelector(`.${name}`);
    const fill = (table, rows) => table.tBodies[0].replaceChildren(...rows);
    const [output, module, gene] = ["output", "module", "gene"].map((name) => root.querySelector(`[name="${name}"]`));
    root.id = root.dataset.name; // one explorer shown twice has two addresses
    for (let n = 2; document.querySelectorAll(`[id="${root.id}"]`).length > 1; n++) root.id = `${root.dataset.name}-${n}`;

    const places = outputs.flatMap((one, i) =>
      one.modules.flatMap((row, j) =>
        POLES.flatMap((pole) => row[pole].map(([name, loading], k) => ({ i, j, pole, name, loading, rank: k + 1 }))),
      ),
    );
    places.sort((a, b) => a.rank - b.rank);
    const names = [...new Set(places.map((one) => one.name))].sort();
    const list = made("datalist", { id: `${root.id}-genes` }, ...names.map((value) => made("option", { value })));
    gene.after(list);
    gene.setAttribute("list", list.id);

    const options = (select, texts) => select.replaceChildren(...texts.map((text, i) => made("option", { value: i }, text)));
    options(output, outputs.map((one) => one.name));
    function choose(i, j) {
      output.value = i;
      options(module, outputs[i].modules.map((row, k) => `${k + 1}, pushes ${sign(row.eigenvalue)}`));
      module.value = j;
    }

    function showFound(typed) {
      const same = (name) => name.toUpperCase() === typed.toUpperCase(); // whatever the case it is typed in
      const found = places.filter((one) => same(one.name));
      find("found").hidden = !found.length;
      if (found.length) {
        const text = fixed(found.map((one) => one.loading));
        const go = ({ i, j }) => button(`${outputs[i].name}, module ${j + 1}`, () => visit(i, j));
        find("found").caption.textContent = `Where ${found[0].name} is among the ${n_genes} strongest genes of a pole`;
        fill(find("found"), found.map((one) => line([go(one)], one.pole, one.rank, text(one.loading))));
        say(find("answer"), `${found[0].name}: in ${found.length} ${found.length === 1 ? "module" : "modules"}.`);
      } else {
        const near = typed ? names.filter((name) => name.toUpperCase().startsWith(typed.toUpperCase())).slice(0, 6) : [];
        const buttons = near.flatMap((name, k) => [k ? ", " : " There are: ", button(name, () => search(name))]);
        say(find("answer"), typed && `${typed} is not among the ${n_genes} strongest genes of any pole.`, ...buttons);
      }
      return found[0]?.name;
    }

    function show() {
      const [i, j, typed] = [Number(output.value), Number(module.value), gene.value.trim()];
      const row = outputs[i].modules[j];
      const known = showFound(typed);
      say(find("headline"), ...headline(outputs[i].name, j + 1, row));

      const loadings = POLES.flatMap((pole) => row[pole]).map(([, loading]) => loading);
      for (const pole of POLES) {
        const rows = row[pole].map(([name, loading]) => {
          const bar = made("span", { className: "bar" });
          bar.style.setProperty("--size", Math.abs(loading) / Math.max(...loadings.map(Math.abs)));
          const marked = name.toUpperCase() === typed.toUpperCase();
          return line(pair([marked ? made("mark", {}, name) : name], bar), fixed(loadings)(loading));
        });
        fill(root.querySelector(`.genes.${pole}`), rows.length ? rows : [made("tr", {}, made("td", { colSpan: 2 }, "no gene"))]);
      }

      const all = row.scores.flat();
      fill(find("scores"), groups.map(({ name, cells }, k) => {
        const [mean, , quarter, median, third] = row.scores[k];
        const words = [made(name === outputs[i].name ? "strong" : "span", {}, name), made("small", {}, ` ${cells.toLocaleString("en")}`)];
        const box = boxOf(row.scores[k], Math.min(...all), Math.max(...all));
        return line(pair(words, box), ...[mean, quarter, median, third].map(fixed(all)));
      }));

      const sets = row.sets ?? [];
      fill(find("sets"), sets.map((set) =>
        line([set.term, made("small", {}, ` ${set.overlap} of ${set.size}: ${set.genes}`)], set.pole, short(set.q))));
      find("sets").hidden = !sets.length;
      find("none").textContent = row.sets?.length === 0 ? "No gene set has q below 0.05 here." : "";

      const state = new URLSearchParams({ output: outputs[i].name, module: j + 1, ...(known && { gene: known }) });
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
    function visit(i, j) {
      choose(i, j);
      changed();
      find("headline").focus(); // what was pressed may be gone
    }
    function search(name) {
      gene.value = name;
      changed();
      gene.focus();
    }

    // Addresses of other places of the page are left alone.
    function read() {
      const [, who, state] = location.hash.match(/^#([\w-]+):(.*)$/) ?? [];
      if (who !== root.id) return false;
      const wanted = new URLSearchParams(state);
      const i = Math.max(outputs.findIndex((one) => one.name === wanted.get("output")), 0);
      const j = Number(wanted.get("module")) - 1;
      choose(i, outputs[i].modules[j] ? j : 0);
      gene.value = wanted.get("gene") ?? "";
      show();
      return true;
    }

    const all = find("all");
    root.querySelectorAll(".modules tbody").forEach((body, i) =>
      body.querySelectorAll(".pick").forEach((place, j) => {
        const choice = button(place.textContent, () => visit(i, j));
        choice.ariaLabel = `${outputs[i].name}, ${place.textContent}`;
        place.replaceChildren(choice);
      }),
    );
    all.open = false;
    let open = false;
    window.addEventListener("beforeprint", () => ((open = all.open), (all.open = true)));
    window.addEventListener("afterprint", () => (all.open = open));
    output.addEventListener("change", () => (choose(Number(output.value), 0), changed()));
    module.addEventListener("change", changed);
    gene.addEventListener("input", changed);
    window.addEventListener("hashchange", () => read() && root.scrollIntoView());

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
