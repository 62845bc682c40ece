"""Are the tests those that were announced, against the right background, and corrected for all of them?"""

import gzip

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, fisher_exact, hypergeom

from scbmlp.enrichment import enrich, gsea, read_gene_sets
from scbmlp.modules import GeneModules

GENES = [f"Gene{i:02d}" for i in range(60)]


def modules_of(n_modules=2, seed=0, genes=GENES, output="Beta"):
    names = [f"module_{i + 1}" for i in range(n_modules)]
    loadings = np.random.default_rng(seed).normal(size=(len(genes), n_modules))
    weights, ones = pd.DataFrame(loadings, genes, names), pd.Series(1.0, pd.Index(genes))
    return GeneModules(pd.Series(1.0, names), weights, weights, ones, ones, output)


def expected_tests(named, sets, background, n_top):
    """Every test by its own formula: (output, module, pole, term) -> overlap, size and p, then q over all of them."""
    background, rows = {gene.upper() for gene in background}, {}
    for output, modules in named.items():
        for module, loading in modules.loadings.items():
            for pole, order in (("+", -loading.to_numpy()), ("-", loading.to_numpy())):
                at = np.argsort(order, kind="stable")[:n_top]
                top = {gene.upper() for gene in loading.index[at[order[at] < 0]]} & background
                for term, members in sets.items():
                    members = {gene.upper() for gene in members} & background
                    overlap = len(top & members)
                    p = hypergeom.sf(overlap - 1, len(background), len(members), len(top))
                    rows[output, module, pole, term] = overlap, len(members), p
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["overlap", "size", "p"])
    table.index = pd.MultiIndex.from_tuples(table.index, names=["output", "module", "pole", "term"])
    return table.assign(q=false_discovery_control(table["p"]))


@settings(max_examples=15)
@given(
    members=st.lists(st.sets(st.sampled_from(GENES + ["Other1", "Other2"]), min_size=1), min_size=1, max_size=6),
    background=st.none() | st.sets(st.sampled_from(GENES), min_size=30).map(sorted),
    n_top=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_every_test_is_hypergeometric_and_q_is_over_all_of_them(members, background, n_top, seed):
    named = {"Beta": modules_of(2, seed), "Alpha": modules_of(1, seed + 1, output="Alpha")}
    seen = background or GENES
    sets = {
        f"set {i}": genes | set(GENES[:1]) for i, genes in enumerate(members) if (genes | set(GENES[:1])) & set(seen)
    }
    if not sets:
        return
    table = enrich(named, sets, background, n_top=n_top, min_size=1)
    expected = expected_tests(named, sets, seen, n_top)
    assert len(table) == 2 * 3 * len(sets) and table["p"].is_monotonic_increasing
    keyed = table.set_index(["output", "module", "pole", "term"]).reindex(expected.index)
    np.testing.assert_array_equal(keyed[["overlap", "size"]], expected[["overlap", "size"]])
    np.testing.assert_allclose(keyed[["p", "q"]], expected[["p", "q"]], rtol=1e-9)


def test_planted_set_is_found_at_its_pole_by_fishers_test():
    modules = modules_of()
    planted = modules.top_genes("module_2", 8, pole="-").index.str.upper()
    sets = {"planted": [*planted, *modules.top_genes("module_2", 4).index], "chance": GENES[10:25]}
    table = enrich(modules, sets, n_top=10)
    best = table.iloc[0]
    assert (best["output"], best["module"], best["pole"], best["term"]) == ("Beta", "module_2", "-", "planted")
    # 8 of 12 members among the 10 genes, 2 of the others; 4 and 46 are not among them.
    assert best["p"] == pytest.approx(fisher_exact([[8, 4], [2, 46]], alternative="greater").pvalue)
    assert best["q"] == pytest.approx(best["p"] * 8) and best["odds_ratio"] > 10
    # In one order whatever the hash seed, so that two builds of a page read the same.
    assert best["genes"].split(", ") == sorted(modules.top_genes("module_2", 8, pole="-").index)


def test_symbols_are_matched_whatever_their_case():
    mouse = ["Ins1", "Iapp", "Gcg", "Nkx6-1", "Pdx1", "Mafb", *GENES]
    for case in (str.upper, str.lower):
        table = enrich(modules_of(1, genes=mouse), {"islet": [case(gene) for gene in mouse[:6]]}, n_top=66)
        assert sorted(", ".join(table["genes"]).split(", ")) == sorted(mouse[:6])  # a gene is in one pole or the other


@pytest.mark.parametrize("background", [None, [f"GENE{i}" for i in range(30)] + [f"Gene{i}" for i in range(10)]])
def test_genes_that_differ_by_case_alone_are_matched_by_their_exact_names(background):
    genes = [f"{case}{i}" for i in range(30) for case in ("Gene", "GENE")] + ["Alone"]
    modules, seen = modules_of(1, genes=genes), genes if background is None else background
    # No gene is named gene1, and two have it in another case; ALONE is one gene in any.
    sets = {"upper": genes[1:24:2], "lower": genes[:24:2], "other": ["gene1", "ALONE", *genes[1:10:2]]}
    truly = sets | {"other": ["Alone", *genes[1:10:2]]}
    with pytest.warns(UserWarning, match="30 genes differ from another by case alone; gene sets match") as record:
        table = enrich(modules, sets, background, n_top=15)
    assert len(record) == 1
    for row in table.itertuples():
        members = set(truly[row.term]) & set(seen)
        top = set(modules.top_genes("module_1", 15, pole=row.pole).index) & set(seen)
        hits = sorted(members & top)
        assert row.genes == ", ".join(hits) and (row.overlap, row.size) == (len(hits), len(members))
        assert row.p == pytest.approx(hypergeom.sf(len(hits) - 1, len(seen), row.size, len(top)))
    if background is None:
        assert set(table["size"]) == {12, 6} and table["overlap"].sum() > 0


def test_background_in_another_case_than_the_genes_of_the_model():
    modules, sets = modules_of(1), {"set": GENES[:20]}
    table = enrich(modules, sets, [gene.upper() for gene in GENES[10:]] + ["Elsewhere"], n_top=60)
    assert set(table["size"]) == {10} and sorted(", ".join(table["genes"]).split(", ")) == GENES[10:20]


def test_sets_of_other_sizes_are_not_tested_but_their_genes_are_known():
    sets = {"small": GENES[:4], "right": GENES[4:9], "large": GENES[9:30]}
    table = enrich(modules_of(), sets, min_size=5, max_size=20)
    assert set(table["term"]) == {"right"}
    assert table.attrs == {"n_terms": 1, "n_unmatched": 30}
    # A set is as large as what the background has of it.
    assert set(enrich(modules_of(), sets, GENES[5:], min_size=5, max_size=21)["term"]) == {"large"}


def test_a_model_without_products_has_no_modules_to_test():
    table = enrich(modules_of(0), {"five": GENES[:5]})
    assert len(table) == 0 and table.attrs["n_terms"] == 1
    assert list(table.columns) == list(enrich(modules_of(), {"five": GENES[:5]}).columns)


def test_gmt_file_is_read_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my sets.gmt"
    rows = {"insulin secretion (GO:0030073)": GENES[:6], "cell cycle": GENES[6:12]}
    path.write_text("".join("\t".join([term, "a note", *genes]) + "\n" for term, genes in rows.items()))
    assert read_gene_sets(path) == read_gene_sets(str(path)) == rows
    pd.testing.assert_frame_equal(enrich(modules_of(), str(path)), enrich(modules_of(), rows))
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def offline(monkeypatch):
    """No local folder, and a download that fails but says what was asked for."""

    def refuse(name, *args, **kwargs):
        raise Exception(f"no connection for {name}")

    monkeypatch.delenv("SCBMLP_DATA_DIR", raising=False)
    monkeypatch.setattr("gseapy.get_library", refuse)


def test_library_is_taken_from_the_local_folder_first(tmp_path, monkeypatch, offline):
    (tmp_path / "gene_sets").mkdir()
    (tmp_path / "gene_sets" / "Some_Library.v1.gmt").write_text("term\t\tINS1\tINS2\n")
    monkeypatch.setenv("SCBMLP_DATA_DIR", str(tmp_path))
    assert read_gene_sets("Some_Library.v1") == {"term": ["INS1", "INS2"]}
    with pytest.raises(ValueError, match="no connection for Other"):
        read_gene_sets("Other")
    monkeypatch.setattr("gseapy.get_library", lambda name, max_size: {name: ["INS1"]})
    assert read_gene_sets("Other") == {"Other": ["INS1"]}


@pytest.mark.parametrize(
    ("name", "cause"), [("KEGG_2019_Mouse", "no connection for KEGG_2019_Mouse"), ("absent.gmt", "absent.gmt")]
)
def test_gene_sets_that_cannot_be_had_are_an_error_with_advice(offline, name, cause):
    with pytest.raises(ValueError, match=rf"gene_sets='{name}' is neither .*{cause}.*; pass the path of a \.gmt file"):
        read_gene_sets(name)


@pytest.mark.parametrize("content", [b"a set without tabs\n", b"set\tnote\tINS1\nset\tnote\tINS2\n", b"set\t\t\xff\n"])
def test_spoiled_gmt_files_are_refused_in_words(tmp_path, content):
    (tmp_path / "sets.gmt").write_bytes(content)
    with pytest.raises(ValueError, match="gene_sets"):
        read_gene_sets(tmp_path / "sets.gmt")


def test_ranks_find_a_set_at_its_pole_with_names_that_gseapy_would_change():
    genes = [f"{'h' if i % 2 else 'H'}{i // 2}; x" for i in range(60)]  # the same in capitals, with its separator
    modules = modules_of(1, genes=genes)
    top = list(modules.loadings["module_1"].nlargest(8).index)
    table = gsea(modules, {"top": top, "low": list(modules.loadings["module_1"].nsmallest(8).index)})
    assert table.set_index("term")["nes"].loc["top"] > 1.5 and table.set_index("term")["nes"].loc["low"] < -1.5
    assert set(table.set_index("term").loc["top", "genes"].split(", ")) <= set(top) and (table["p"] >= 1 / 1001).all()


@pytest.mark.parametrize(
    ("name", "change"),
    {
        "sets.gmt": lambda text: text.encode("utf-16"),
        "marked.gmt": lambda text: text.encode("utf-8-sig"),
        "old.gmt": lambda text: text.replace("\n", "\r").encode(),
        "dos.txt": lambda text: text.replace("\n", "\r\n").encode(),
        "zipped.gmt.gz": lambda text: gzip.compress(text.encode()),
        "weights.gmt": lambda text: text.replace("Ins2", "Ins2,0.5").replace("Gcg", "Gcg,1e-3").encode(),
    }.items(),
)
def test_gene_sets_of_any_spelling_of_a_file_are_the_same(name, change, tmp_path):
    (tmp_path / name).write_bytes(change("beta\tnote\tIns1\tIns2\nalpha\t\tGcg\tH2-Aa\n"))
    assert read_gene_sets(tmp_path / name) == {"beta": ["Ins1", "Ins2"], "alpha": ["Gcg", "H2-Aa"]}
