"""Gene sets over modules, tested against the genes that the model could see."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import gseapy
import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, hypergeom

from scbmlp.checks import by_case_alone, data_file, matched, warn, whole_number
from scbmlp.modules import GeneModules

GeneSets = str | Path | Mapping[str, Iterable[str]]


def read_gene_sets(gene_sets: GeneSets) -> dict[str, list[str]]:
    """Return gene sets as a dictionary of lists, without blanks around names and genes.

    Parameters
    ----------
    gene_sets
        A GMT file, a dictionary, or the name of an Enrichr library; ``$SCBMLP_DATA_DIR/gene_sets`` is searched first.

    Examples
    --------
    >>> enrichment.read_gene_sets({"insulin secretion ": ["Ins1", " Ins2"]})
    {'insulin secretion': ['Ins1', 'Ins2']}
    """
    if not isinstance(gene_sets, Mapping | str | Path):
        raise ValueError(f"gene_sets is of type {type(gene_sets).__name__}; pass a path, a name or a dictionary.")
    sets: dict[str, list[str]] = {}
    for term, genes in gene_sets.items() if isinstance(gene_sets, Mapping) else _loaded(gene_sets):
        name = str(term).strip()
        if isinstance(genes, str) or not isinstance(genes, Iterable):
            raise ValueError(f"gene_sets has {genes!r} for {name!r}; a list of genes is needed.")
        if name in sets:
            raise ValueError(f"gene_sets has {name!r} twice; merge the two sets, or give each a name of its own.")
        genes = [str(gene).strip() for gene in genes if not (pd.api.types.is_scalar(gene) and pd.isna(gene))]
        sets[name] = list(dict.fromkeys(filter(None, genes)))
    return sets


def _loaded(gene_sets: str | Path) -> list[tuple[str, list[str]]]:
    """Return names and genes of the sets of a file or a library."""
    path = Path(gene_sets).expanduser()
    local = None if path.suffix == ".gmt" else data_file("gene_sets", f"{gene_sets}.gmt")
    path = local if local and local.is_file() else path
    try:
        if not path.is_file() and ".gmt" not in path.suffixes:
            return list(gseapy.get_library(str(path), max_size=10**9).items())
        held = path.read_bytes()
        held = gzip.decompress(held) if held.startswith(b"\x1f\x8b") else held
        text = held.decode("utf-16" if held[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        # gseapy's reader silently keeps the last of two sets with one name.
        rows = [line.split("\t") for line in text.splitlines() if line.strip()]
        if short := [row[0] for row in rows if len(row) < 2]:
            raise ValueError(f"no tabs in the line of {short[0][:40]!r}")
        # Enrichr's files can have a weight behind each gene.
        return [(row[0], [re.sub(r",[-+.\deE]+$", "", gene) for gene in row[2:]]) for row in rows]
    except Exception as error:  # gseapy raises plain Exception, requests and OSError for one and the same cause
        what = f"gene_sets={str(gene_sets)!r} is neither a GMT file that can be read nor a library of Enrichr"
        raise ValueError(f"{what} that can be had ({error}); pass the path of a .gmt file or a dictionary.") from error


def enrich(
    modules: GeneModules | Mapping[str, GeneModules],
    gene_sets: GeneSets,
    background: Iterable[str] | None = None,
    *,
    n_top: int = 50,
    min_size: int = 5,
    max_size: int = 500,
) -> pd.DataFrame:
    """Test gene sets for over-representation among the top genes of each pole of each module.

    One Benjamini-Hochberg correction :cite:p:`benjamini1995` covers all hypergeometric tests of the call. Symbols match
    whatever their case, so that mouse genes meet human sets. ``attrs`` counts the sets tested, ``n_terms``, and the
    background genes that are in no set, ``n_unmatched``.

    Parameters
    ----------
    modules, gene_sets
        Modules of one output, or of several by name, and sets as in :func:`read_gene_sets`.
    background
        Genes that could have been found; if None, those of each output's own model.
    n_top, min_size, max_size
        Most genes taken from each pole, and how many genes of a set the background must have, and may.

    Examples
    --------
    >>> table = enrichment.enrich(on, programs, n_top=10)
    >>> table[["module", "pole", "term", "overlap", "size"]].head(2)
         module pole        term  overlap  size
    0  module_2    +  program_03       10    10
    1  module_2    -  program_04       10    10
    """
    n_top = whole_number(n_top, "n_top")
    if isinstance(background, str):
        raise ValueError(f"background is one name, {background!r}; pass a list of genes.")
    background = None if background is None else [str(gene).strip() for gene in background]
    named = modules if isinstance(modules, Mapping) else {str(modules.output): modules}
    if not named:
        raise ValueError("modules is empty; pass those of one output, or a dictionary of several by name.")
    if words := next(filter(None, (by_case_alone(module_set.loadings.index) for module_set in named.values())), ""):
        warn(words)
    sets, rows, terms, unmatched = read_gene_sets(gene_sets), [], set(), set()
    for output, module_set in named.items():
        # Each output is held against the genes that its own model could have found.
        genes, tested = _tested(sets, module_set.loadings.index, background, min_size, max_size)
        terms |= tested.keys()
        unmatched |= genes.difference(*matched(sets, genes).values())
        for module, pole in product(module_set.loadings, "+-"):
            top = genes & set(map(str, module_set.top_genes(module, n_top, pole=pole).index))
            for term, members in tested.items():
                hits = sorted(members & top)
                counts = len(hits), len(members), len(top), len(genes)
                rows.append((output, module, pole, term, ", ".join(hits), *counts))
    columns = ["output", "module", "pole", "term", "genes", "overlap", "size", "top", "all"]
    table = pd.DataFrame(rows, columns=columns)
    x, m, k, n = table[columns[-4:]].to_numpy(np.int64).T
    odds = (x + 0.5) * (n - m - k + x + 0.5) / ((m - x + 0.5) * (k - x + 0.5))  # 0.5 keeps it finite, as in gseapy
    p = hypergeom.sf(x - 1, n, m, k)
    table = table.assign(odds_ratio=np.where(x > 0, odds, 0.0), p=p, q=false_discovery_control(p) if len(p) else p)
    table = table.sort_values(["p", *columns[:4]], ignore_index=True)
    table = table[[*columns[:4], "overlap", "size", "odds_ratio", "p", "q", "genes"]]
    table.attrs = {"n_terms": len(terms), "n_unmatched": len(unmatched)}
    return table


def gsea(
    modules: GeneModules | Mapping[str, GeneModules],
    gene_sets: GeneSets,
    *,
    n_permutations: int = 1000,
    min_size: int = 5,
    max_size: int = 500,
    random_state: int = 0,
) -> pd.DataFrame:
    """Test whether the genes of a set gather at one pole of a module, over all genes and without a cut.

    Pre-ranked gene-set enrichment :cite:p:`subramanian2005` by gseapy :cite:p:`fang2023gseapy`. Its permutations take
    genes for independent, which they are not: compare with :func:`scbmlp.evidence.random_directions`.

    Parameters
    ----------
    modules, gene_sets, min_size, max_size
        As in :func:`enrich`; genes that never varied are left out.
    n_permutations, random_state
        Number of permutations of the genes, and their seed.

    Returns
    -------
    A row a module and set. ``nes``, the normalised enrichment score, is positive at the pole of positive loading.

    Examples
    --------
    >>> table = enrichment.gsea(on, programs, n_permutations=100)
    >>> table[["module", "term", "nes"]].head(1).round(1)
         module        term  nes
    0  module_1  program_01 -2.1
    """
    n_permutations = whole_number(n_permutations, "n_permutations")
    how = {"min_size": 1, "permutation_num": n_permutations, "seed": whole_number(random_state, "random_state", 0)}
    how |= {"threads": 1, "outdir": None, "no_plot": True, "verbose": False}
    named = modules if isinstance(modules, Mapping) else {str(modules.output): modules}
    sets, tables = read_gene_sets(gene_sets), []
    for output, module_set in named.items():
        varied = module_set.loadings[(module_set.loadings != 0).any(axis=1)]  # the others have no place in an order
        _, tested = _tested(sets, varied.index, None, min_size, max_size)
        # By place, for gseapy turns names to capitals and joins them by semicolons.
        names = list(map(str, varied.index))
        place = {gene: str(i) for i, gene in enumerate(names)}
        lists = {term: sorted(place[gene] for gene in members) for term, members in tested.items()}
        for module, loading in varied.set_axis(list(place.values())).items():
            ranked = loading.sort_values(ascending=False, kind="stable")
            found = gseapy.prerank(ranked, lists, max_size=len(names), **how).res2d
            table = pd.DataFrame({"output": output, "module": module, "term": found["Term"]})
            table["size"] = [len(tested[term]) for term in found["Term"]]
            table["nes"] = found["NES"].astype(float)
            # A p of 0 means that no permutation of that many was as good.
            table["p"] = found["NOM p-val"].astype(float).clip(lower=1 / (1 + n_permutations))
            table["genes"] = [", ".join(names[int(i)] for i in edge.split(";") if i) for edge in found["Lead_genes"]]
            tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    table.insert(6, "q", false_discovery_control(table["p"]))
    return table.sort_values(["p", "output", "module", "term"], ignore_index=True)


def _tested(
    sets: Mapping[str, list[str]], genes: Iterable[Any], background: list[str] | None, min_size: int, max_size: int
) -> tuple[set[str], dict[str, set[str]]]:
    """Return the background, in the names of the genes, and what it has of each set that is not too small."""
    genes = among = set(map(str, genes))
    if background is not None:
        found = matched({gene: [gene] for gene in background}, genes)
        among = {next(iter(found[gene]), gene) for gene in background}
    seen = {term: members & among for term, members in matched(sets, genes | among).items()}
    tested = {term: members for term, members in seen.items() if min_size <= len(members) <= max_size}
    if not tested:
        sizes = f"min_size={min_size} to max_size={max_size}"
        raise ValueError(f"none of {len(sets)} gene sets has {sizes} of {len(among)} genes; check the organism.")
    return among, tested
