"""Does the table have the numbers of the modules, every text of it as text, and the same bytes twice?"""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from scbmlp.datasets import ExpressionDataset
from scbmlp.enrichment import enrich
from scbmlp.explorer import explorer
from scbmlp.modules import GeneModules, gene_modules

BeautifulSoup = pytest.importorskip("bs4").BeautifulSoup
HOSTILE = ["</script><b>x</b>", '"quoted"', "'single'", "a & b", "<!--", "<img src=x onerror=alert(1)>", "é≤漢", "-->"]


@pytest.fixture(scope="session")
def modules(classifier, sets):
    return {name: gene_modules(classifier, name, 3) for name in sets[2].output_names}


@pytest.fixture(scope="session")
def enriched(cells, modules):
    programs = cells.uns["truth"]["programs"]
    return enrich(modules, {f"a program of cells: {name}": list(genes) for name, genes in programs.items()})


def bodies(shown):
    """The page as a browser reads it, a module each."""
    return BeautifulSoup(shown._repr_html_(), "html.parser").find_all("tbody")


def text(element):
    return " ".join(element.get_text().split()).replace("−", "-")


def test_genes_and_scores_are_those_of_the_modules(modules, sets):
    test, shown = sets[2], iter(bodies(explorer(modules, sets[2])))
    label = test.output_names.to_numpy()[test.y]
    for name, one in modules.items():
        means = one.scores(test).groupby(label).mean()
        for k, (module, eigenvalue) in enumerate(one.eigenvalues.items(), 1):
            body = next(shown)
            head, detail = (text(row) for row in body.find_all("tr"))
            assert head.startswith(f"{name}, {k} {eigenvalue:.3g} {means[module].idxmax()}")
            sign = "up" if eigenvalue > 0 else "down"
            assert f"Module {k} pushes {name} {sign} (eigenvalue {eigenvalue:.3g})." in detail
            for group, mean in means[module].items():
                assert re.search(rf"(: |, ){re.escape(f'{group} {mean:.3g}')}[.,]", detail)
            for pole, items in zip("+-", body.find_all("ol"), strict=True):
                top = one.top_genes(module, 20, pole=pole)
                assert [text(item) for item in items.find_all("li")] == [f"{g} {x:.3g}" for g, x in top.items()]
                sizes = [float(item["style"].strip("-size: %")) for item in items.find_all("li")]
                np.testing.assert_allclose(sizes, 100 * top.abs() / one.loadings[module].abs().max(), atol=0.51)
    assert next(shown, None) is None


def test_gene_sets_are_the_significant_ones_of_the_module(modules, sets, enriched):
    assert "q below" not in explorer(modules, sets[2])._repr_html_()
    many, lengths = pd.concat([enriched] + [enriched.assign(term=enriched["term"] + f" {i}") for i in range(9)]), []
    shown = iter(bodies(explorer(modules, sets[2], enriched=many)))
    for name, one in modules.items():
        for module in one.eigenvalues.index:
            own = many[(many["output"] == name) & (many["module"] == module) & (many["q"] < 0.05)]
            own = own.sort_values("q", kind="stable")[:10]
            body = next(shown)
            lines = [
                f"{one.term}: q {one.q:.3g}, pole {one.pole}, {one.overlap} of {one.size} genes: {one.genes}"
                for one in own.itertuples()
            ]
            found = [text(line) for line in body.select("td > p")][2:]  # after what it pushes, and mean scores
            assert found == (lines or ["No gene set has q below 0.05 here."])
            assert (" q " in text(body.tr)) == bool(lines)
            lengths.append(len(own))
    assert min(lengths) == 0 and max(lengths) == 10


def test_trust_is_shown_where_it_is_known(modules, sets):
    name, one = next(iter(modules.items()))
    table = pd.DataFrame({
        "stability": [0.96, 0.5, np.nan], "p": [0.05, 1, 0.05], "trusted": [True, False, False], "low": 0.1,
    }, one.eigenvalues.index)  # fmt: skip
    shown = bodies(explorer(modules | {name: replace(one, trust=table)}, sets[2]))
    assert [body.find_all("td")[2].get_text() for body in shown[:4]] == ["yes", "no", "no", ""]
    assert "Trusted. Stability 0.96, p 0.05." in text(shown[0])
    assert "Not trusted, and not to be interpreted. P 0.05." in text(shown[2]) and "rusted" not in text(shown[3])


def test_modules_of_a_regressor_have_no_classes(modules, sets):
    test, one = sets[2], modules["Beta"]
    targets = ExpressionDataset(test.x, torch.randn(len(test), 2).numpy(), test.gene_names, pd.Index(["a", "b"]))
    (body, *_) = bodies(explorer(one, targets))
    assert text(body).startswith("Beta, 1 ") and "Mean score" not in text(body)


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
    cells = ExpressionDataset(rng.normal(size=(8, len(genes))), np.arange(8) % 2, genes, pd.Index(HOSTILE[4:6]))
    return explorer(modules, cells, enriched=enriched)


def test_every_name_is_text():
    html, (body, *_) = hostile()._repr_html_(), bodies(hostile())
    assert html.count("</script>") == 1 and "<b>" not in html and "<img" not in html and "<!--" not in html
    assert {name.get_text() for name in body.select("li .name")} == {*HOSTILE}
    assert body["data-output"] == HOSTILE[0] and f"{HOSTILE[5]} q 0.0001" in text(body)


def test_the_page_is_the_same_every_time_and_small(modules, sets, enriched, tmp_path):
    first, second = (explorer(dict(modules), sets[2], enriched=enriched.copy()) for _ in range(2))
    assert first._repr_html_() == second._repr_html_() and repr(first) == "Explorer: 24 modules of 8 outputs"
    assert len(first._repr_html_().encode()) < 150_000
    first.save(tmp_path / "modules.html")
    page = (tmp_path / "modules.html").read_text("utf-8")
    assert first._repr_html_().strip() in page and page.startswith("<!DOCTYPE html>")
    assert not re.findall(r"""(?:src|href)=|url\(|@import|https?:""", page)  # nothing from elsewhere
    narrow = replace(modules["Beta"], loadings=modules["Beta"].loadings.clip(lower=0))
    positive, negative = bodies(explorer(narrow, sets[2]))[0].find_all("ol")
    assert len(positive.find_all("li")) == 20 and text(negative) == "no gene"
