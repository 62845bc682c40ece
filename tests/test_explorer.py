"""Does the page have the numbers of the modules, every text of it as text, and the same bytes twice?"""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from scbmlp.datasets import ExpressionDataset
from scbmlp.enrichment import enrich
from scbmlp.explorer import explorer
from scbmlp.modules import GeneModules, gene_modules

HOSTILE = ["</script><b>x</b>", '"quoted"', "'single'", "a & b", "<!--", "<img src=x onerror=alert(1)>", "é≤漢", "-->"]


@pytest.fixture(scope="module")
def modules(classifier, sets):
    return {name: gene_modules(classifier, name, 3) for name in sets[2].output_names}


@pytest.fixture(scope="module")
def enriched(cells, modules):
    programs = cells.uns["truth"]["programs"]
    return enrich(modules, {f"a program of cells: {name}": list(genes) for name, genes in programs.items()})


def data_of(shown):
    """What the page holds for its script, as a browser reads it."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', shown._repr_html_(), flags=re.S)
    assert len(found) == 1
    return json.loads(found[0])


def table_of(shown):
    """Texts of the table of all modules: an output, or a module and its two poles."""
    table = re.search(r'<table class="modules">.*?</table>', shown._repr_html_(), flags=re.S)[0]
    rows = [row for body in ElementTree.fromstring(table).iter("tbody") for row in body]
    return [[" ".join("".join(cell.itertext()).split()) for cell in row] for row in rows]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=5e-6, atol=1e-12)  # six digits


def test_genes_and_scores_are_those_of_the_modules(modules, sets):
    data, test = data_of(explorer(modules, sets[2], n_genes=7)), sets[2]
    x, label = test.x.toarray(), test.output_names.to_numpy()[test.y]
    assert [one["name"] for one in data["outputs"]] == list(modules)
    assert data["groups"] == [{"name": name, "cells": int((label == name).sum())} for name in test.output_names]
    for shown, one in zip(data["outputs"], modules.values(), strict=True):
        close([row["eigenvalue"] for row in shown["modules"]], one.eigenvalues)
        for k, row in enumerate(shown["modules"]):
            loading = one.loadings.to_numpy()[:, k]
            order = np.argsort(loading)
            for pole, at in (("positive", order[::-1][:7]), ("negative", order[:7])):
                assert [name for name, _ in row[pole]] == list(one.loadings.index[at])
                close([value for _, value in row[pole]], loading[at])
            scores = (x - one.origin.to_numpy()) @ one.weights.to_numpy()[:, k]
            for box, name in zip(row["scores"], test.output_names, strict=True):
                own = scores[label == name]
                close(box, [own.mean(), *np.percentile(own, [5, 25, 50, 75, 95])])


def test_gene_sets_are_the_significant_ones_of_the_module(modules, sets, enriched):
    assert {None} == {row["sets"] for one in data_of(explorer(modules, sets[2]))["outputs"] for row in one["modules"]}
    many = pd.concat([enriched] + [enriched.assign(term=enriched["term"] + f" {i}") for i in range(9)])
    many["pole"] = many["pole"].map({"+": "positive", "-": "negative"})
    columns, lengths = ["term", "overlap", "size", "genes", "pole"], []
    for one in data_of(explorer(modules, sets[2], enriched=many.replace({"positive": "+", "negative": "-"})))[
        "outputs"
    ]:
        for k, row in enumerate(one["modules"]):
            own = many[(many["output"] == one["name"]) & (many["module"] == f"module_{k + 1}")]
            own = own[own["q"] < 0.05].sort_values("q", kind="stable")[:10]
            assert [[found[name] for name in columns] for found in row["sets"]] == own[columns].to_numpy().tolist()
            close([found["q"] for found in row["sets"]], own["q"])
            lengths.append(len(own))
    assert min(lengths) == 0 and max(lengths) == 10


def test_trust_is_shown_where_it_is_known(modules, sets):
    name, one = next(iter(modules.items()))
    table = pd.DataFrame({
        "stability": [0.96, 0.5, np.nan], "p": [0.05, 1, 0.05], "trusted": [True, False, False], "low": 0.1,
    }, one.eigenvalues.index)  # fmt: skip
    shown = explorer(modules | {name: replace(one, trust=table)}, sets[2])
    trusted, untrusted = data_of(shown)["outputs"][0]["modules"], data_of(shown)["outputs"][1]["modules"]
    assert trusted[0]["trust"] == {"trusted": True, "stability": 0.96, "p": 0.05}
    assert trusted[2]["trust"] == {"trusted": False, "p": 0.05} and untrusted[0]["trust"] is None
    rows = table_of(shown)
    assert rows[1][0].endswith(", trusted") and rows[2][0].endswith(", not trusted") and "trusted" not in rows[5][0]


def test_table_of_all_modules_needs_no_script(modules, sets, enriched):
    rows, data = table_of(explorer(modules, sets[2], enriched=enriched)), iter(range(99))
    for name, one in modules.items():
        assert rows[next(data)] == [name]
        for k, value in enumerate(one.eigenvalues):
            module, *poles = rows[next(data)]
            sign = "up" if value > 0 else "down"
            assert module == f"{k + 1}, pushes {sign} eigenvalue {value:.3g}".replace("-", "−")
            for pole, text in zip("+-", poles, strict=True):
                own = enriched[(enriched["output"] == name) & (enriched["module"] == f"module_{k + 1}")]
                own = own[(own["pole"] == pole) & (own["q"] < 0.05)].sort_values("q")
                best = [f" {term} (q {q:.2g})".replace("e-", "e−") for term, q in own[["term", "q"]].to_numpy()[:1]]
                assert text == ", ".join(one.top_genes(k, 8, pole=pole).index) + "".join(best)
    assert next(data) == len(rows)


def test_groups_come_in_several_guises(cells, modules, tmp_path):
    one = {"Beta": modules["Beta"]}
    by_column = explorer(one, cells, "clusters").data
    labels = cells.obs["clusters"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert explorer(one, cells, labels[::-1]).data == by_column  # by name
    assert explorer(one, cells, labels.array).data == by_column
    assert explorer(one, tmp_path / "cells.h5ad", "clusters").data == by_column
    assert [group["name"] for group in by_column["groups"]] == list(labels.cat.categories)
    some = labels.astype(object).where(labels.isin(["Beta", "Alpha"]), None)
    shown = explorer(modules["Beta"], cells, some).data
    assert [group["name"] for group in shown["groups"]] == ["Alpha", "Beta"] and shown["outputs"][0]["name"] == "Beta"
    of = dict(zip(labels.cat.categories, by_column["outputs"][0]["modules"][0]["scores"], strict=True))
    assert shown["outputs"][0]["modules"][0]["scores"] == [of["Alpha"], of["Beta"]]
    numbers = explorer(one, cells, np.arange(cells.n_obs) % 2).data["groups"]
    assert numbers == [{"name": "0", "cells": 200}, {"name": "1", "cells": 200}]


def hostile():
    """Modules whose every name is out to be markup, and cells to score."""
    rng, names, genes = np.random.default_rng(0), ["module_1", "module_2"], pd.Index(HOSTILE, dtype=object)
    loadings = pd.DataFrame(rng.normal(size=(len(genes), 2)), genes, names)
    parts = pd.Series([1.0, -0.5], names), loadings, loadings, pd.Series(0.0, genes), pd.Series(1.0, genes)
    modules = {HOSTILE[0]: GeneModules(*parts, HOSTILE[0]), HOSTILE[3]: GeneModules(*parts, HOSTILE[3])}
    enriched = pd.DataFrame({
        "output": HOSTILE[0], "module": "module_1", "pole": ["+", "-"], "term": [HOSTILE[5], HOSTILE[0]], "overlap": 1,
        "size": 2, "q": [1e-4, 1e-3], "genes": ", ".join(HOSTILE),
    })  # fmt: skip
    cells = ExpressionDataset(rng.uniform(size=(8, len(genes))), np.arange(8) % 2, genes, pd.Index(HOSTILE[4:6]))
    return explorer(modules, cells, enriched=enriched)


def test_every_name_is_text():
    shown = hostile()
    html, data = shown._repr_html_(), data_of(shown)
    assert html.count("</script>") == 2 and "<b>" not in html and "<img" not in html and "<!--" not in html
    assert [one["name"] for one in data["outputs"]] == [HOSTILE[0], HOSTILE[3]]
    assert [one["name"] for one in data["groups"]] == HOSTILE[4:6]
    rows = data["outputs"][0]["modules"]
    assert {name for row in rows for name, _ in row["positive"] + row["negative"]} == {*HOSTILE}
    assert data["outputs"][0]["modules"][0]["sets"][0]["term"] == HOSTILE[5]
    rows = table_of(shown)
    assert rows[0] == [HOSTILE[0]] and f" {HOSTILE[5]} (q 0.0001)" in rows[1][1] and HOSTILE[0] in rows[1][2]


def test_the_page_is_the_same_every_time_and_small(modules, sets, enriched, tmp_path):
    first, second = (explorer(dict(modules), sets[2], enriched=enriched.copy()) for _ in range(2))
    assert first._repr_html_() == second._repr_html_()
    assert len(first._repr_html_().encode()) < 100_000
    first.save(tmp_path / "modules.html")
    page = (tmp_path / "modules.html").read_text("utf-8")
    assert first._repr_html_().strip() in page and page.startswith("<!DOCTYPE html>")
    assert not re.findall(r"""(?:src|href)=|url\(|@import|https?:""", page)  # nothing from elsewhere


def test_it_says_of_itself_what_it_holds(modules, sets):
    shown = explorer(modules, sets[2], n_genes=5, name="mine")
    assert repr(shown) == "Explorer: 24 modules of 8 outputs; 5 genes a pole; 60 cells in 8 groups"
    assert 'data-name="mine"' in shown._repr_html_()
    narrow = replace(modules["Beta"], loadings=modules["Beta"].loadings.clip(lower=0))
    row = explorer(narrow, sets[2]).data["outputs"][0]["modules"][0]
    assert row["negative"] == [] and len(row["positive"]) == 20
    assert table_of(explorer(narrow, sets[2]))[1][2] == "no gene"
