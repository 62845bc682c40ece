"""Gene sets over modules, tested against the genes that the model could see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import gseapy
import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from scbmlp.checks import data_file, warn, whole_number
from scbmlp.modules import GeneModules

GeneSets = str | Path | Mapping[str, Iterable[str]]


def read_gene_sets(gene_sets: GeneSets) -> dict[str, list[str]]:
    """Return gene sets as a dictionary of lists, without blanks around names and genes.

    Parameters
    ----------
    gene_sets
        Path of a GMT file, a dictionary, or the name of an Enrichr library: ``<name>.gmt`` in
        ``$SCBMLP_DATA_DIR/gene_sets`` if it is there, else the download.

    Raises
    ------
    ValueError
        There is no such file and the library cannot be had, a set comes twice, or one is no list of genes.

    Examples
    --------
    >>> enrichment.read_gene_sets({"insulin secretion ": ["Ins1", " Ins2"]})
    {'insulin secretion': ['Ins1', 'Ins2']}
    """
    if isinstance(gene_sets, Mapping):
        named = list(gene_sets.items())
    elif not isinstance(gene_sets, str | Path):
        raise ValueError(f"gene_sets is of type {type(gene_sets).__name__}; pass a path, a name or a dictionary.")
    else:
        path = Path(gene_sets).expanduser()
        local = None if path.suffix == ".gmt" else data_file("gene_sets", f"{gene_sets}.gmt")
        path = local if local and local.is_file() else path
        try:
            if path.suffix == ".gmt":
                # gseapy's reader keeps the last of two sets of one name, and says nothing
                rows = [line.split("\t") for line in path.read_text("utf-8").splitlines() if line.strip()]
                if short := [row[0] for row in rows if len(row) < 2]:
                    raise ValueError(f"no tabs in the line of {short[0][:40]!r}")
                named = [(row[0], row[2:]) for row in rows]
            else:
                named = list(gseapy.get_library(str(path), max_size=10**9).items())
        except Exception as error:  # gseapy raises plain Exception, requests and OSError for one and the same cause
            raise ValueError(
                f"gene_sets={str(gene_sets)!r} is neither a GMT file that can be read nor an Enrichr library that can "
                f"be downloaded ({error}); pass the path of a .gmt file or a dictionary."
            ) from error
    sets: dict[str, list[str]] = {}
    for term, genes in named:
        name = str(term).strip()
        if isinstance(genes, str) or not isinstance(genes, Iterable):
            raise ValueError(f"gene_sets has {genes!r} for {name!r}; a list of genes is needed.")
        if name in sets:
            raise ValueError(f"gene_sets has {name!r} twice; merge the two sets, or give each a name of its own.")
        genes = [str(gene).strip() for gene in genes if not (pd.api.types.is_scalar(gene) and pd.isna(gene))]
        sets[name] = list(dict.fromkeys(gene for gene in genes if gene))
    return sets


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

    Hypergeometric tests by gseapy :cite:p:`fang2023gseapy`, one Benjamini-Hochberg correction
    :cite:p:`benjamini1995` over all that is tested in the call. Symbols are matched whatever their case, so that
    mouse genes meet human sets; genes whose names differ by case alone count once.

    Parameters
    ----------
    modules
        Modules of one output, or of several by name.
    gene_sets
        As in :func:`read_gene_sets`.
    background
        Genes that could have been found; those of each output's own model if None.
    n_top
        Most genes taken from each pole.
    min_size, max_size
        Gene sets are tested if that many of their genes are in the background.

    Returns
    -------
    A row a test: ``output``, ``module``, ``pole``, ``term``, ``overlap`` and ``size`` (genes), ``odds_ratio``,
    ``p``, ``q``, ``genes``; the most significant first. ``attrs["n_terms"]`` counts the sets tested and
    ``attrs["n_unmatched"]`` the genes of the background that are in none of the sets given.

    Raises
    ------
    ValueError
        No gene set has `min_size` to `max_size` genes in the background, or there are no modules.

    Examples
    --------
    >>> table = enrichment.enrich(on, programs, n_top=10)
    >>> table[["module", "pole", "term", "overlap", "size"]].head(2)
         module pole        term  overlap  size
    0  module_1    +  program_03       10    10
    1  module_1    -  program_04       10    10
    """
    named, n_top = _by_name(modules), whole_number(n_top, "n_top")
    if isinstance(background, str):
        raise ValueError(f"background is one name, {background!r}; pass a list of genes.")
    background = None if background is None else [str(gene).strip() for gene in background]
    sets = {term: {gene.upper() for gene in genes} for term, genes in read_gene_sets(gene_sets).items()}
    known, tables, terms, unmatched = set().union(*sets.values()), [], set(), set()
    for output, module_set in named.items():
        # Each output is held against the genes that its own model could have found.
        genes = module_set.loadings.index if background is None else background
        symbol, tested = _tested(sets, genes, output, min_size, max_size)
        terms |= tested.keys()
        unmatched |= symbol.keys() - known
        for module in module_set.loadings:
            for pole in "+-":
                top = [gene.upper() for gene in map(str, module_set.top_genes(module, n_top, pole=pole).index)]
                table = _over_representation([gene for gene in top if gene in symbol], tested, list(symbol))
                table["genes"] = [", ".join(symbol[gene] for gene in row) for row in table["genes"]]
                tables.append(table.assign(output=output, module=module, pole=pole))
    columns = ["output", "module", "pole", "term", "overlap", "size", "odds_ratio", "p", "q", "genes"]
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
    table["q"] = false_discovery_control(table["p"]) if len(table) else 0.0
    table = table.sort_values(["p", "output", "module", "pole", "term"], ignore_index=True)[columns]
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

    Pre-ranked gene-set enrichment :cite:p:`subramanian2005` by gseapy :cite:p:`fang2023gseapy`, genes in the order of
    their loadings, those that never varied left out, gene labels permuted. Such permutations take genes for
    independent, which they are not: compare with :func:`scbmlp.evidence.random_directions`.

    Parameters
    ----------
    modules, gene_sets, min_size, max_size
        As in :func:`enrich`.
    n_permutations
        Number of permutations.
    random_state
        Seed of the permutations.

    Returns
    -------
    A row a module and set: ``output``, ``module``, ``term``, ``size``, ``nes`` (normalised enrichment score, positive
    where the set is at the pole of positive loading), ``p``, ``q`` (Benjamini-Hochberg over all tests of the call, as
    in :func:`enrich`), ``genes`` of the leading edge; the most significant first.

    Raises
    ------
    ValueError
        As for :func:`enrich`.

    Examples
    --------
    >>> table = enrichment.gsea(on, programs, n_permutations=100)
    >>> table[["module", "term", "nes"]].head(2).round(1)
         module        term  nes
    0  module_1  program_03  2.4
    1  module_1  program_04 -2.3
    """
    named, n_permutations = _by_name(modules), whole_number(n_permutations, "n_permutations")
    random_state = whole_number(random_state, "random_state", 0)
    sets, tables = {term: {gene.upper() for gene in genes} for term, genes in read_gene_sets(gene_sets).items()}, []
    for output, module_set in named.items():
        varied = module_set.loadings[(module_set.loadings != 0).any(axis=1)]  # the others have no place in an order
        symbol, tested = _tested(sets, varied.index, output, min_size, max_size)
        for module, loading in varied.items():
            ranked = loading.set_axis(loading.index.map(str)).loc[list(symbol.values())]
            ranked = ranked.set_axis(list(symbol)).sort_values(ascending=False, kind="stable")
            found = gseapy.prerank(
                ranked, tested, min_size=1, max_size=len(symbol), permutation_num=n_permutations, seed=random_state,
                threads=1, outdir=None, no_plot=True, verbose=False
            ).res2d.set_index("Term")  # fmt: skip
            # A library's p of 0 means that no permutation of that many was as good.
            p = found["NOM p-val"].astype(float).clip(lower=1 / (1 + n_permutations))
            edge = [", ".join(symbol[gene] for gene in genes.split(";") if gene) for genes in found["Lead_genes"]]
            columns = {"nes": found["NES"].astype(float), "p": p, "genes": edge}
            size = [len(tested[term]) for term in found.index]
            tables.append(pd.DataFrame(columns).assign(output=output, module=module, size=size).rename_axis("term"))
    table = pd.concat(tables).reset_index()
    table["q"] = false_discovery_control(table["p"])
    table = table.sort_values(["p", "output", "module", "term"], ignore_index=True)
    return table[["output", "module", "term", "size", "nes", "p", "q", "genes"]]


def _by_name(modules: GeneModules | Mapping[str, GeneModules]) -> Mapping[str, GeneModules]:
    named = modules if isinstance(modules, Mapping) else {str(modules.output): modules}
    if not named:
        raise ValueError("modules is empty; pass those of one output, or a dictionary of several by name.")
    return named


def _tested(
    sets: Mapping[str, set[str]], genes: Iterable[str], output: str, min_size: int, max_size: int
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the symbols of genes, in capitals and as they are, and the genes of each set that is not too small."""
    genes = [str(gene) for gene in genes]
    symbol = {gene.upper(): gene for gene in genes}
    if len(symbol) < len(genes):
        warn(
            f"{len(genes) - len(symbol)} genes of {output} differ from another by case alone, and count as one symbol."
        )
    seen = {term: members & symbol.keys() for term, members in sets.items()}
    tested = {term: sorted(members) for term, members in seen.items() if min_size <= len(members) <= max_size}
    if not tested:
        raise ValueError(
            f"none of {len(sets)} gene sets has {min_size} to {max_size} of the {len(symbol)} background genes; "
            f"check the organism of the symbols, or lower min_size={min_size}."
        )
    return symbol, tested


def _over_representation(genes: list[str], sets: dict[str, list[str]], background: list[str]) -> pd.DataFrame:
    """Test one list; gseapy leaves out sets without a hit, which were tested all the same."""
    table = pd.DataFrame({"term": list(sets), "size": [len(members) for members in sets.values()]})
    if not set().union(*sets.values()).intersection(genes):
        return table.assign(overlap=0, odds_ratio=0.0, p=1.0, genes=[[] for _ in sets])
    found = gseapy.enrich(genes, sets, background=background, outdir=None, no_plot=True, verbose=False).results
    found = found.set_index("Term").reindex(table["term"])
    hits = [sorted(row.split(";")) if isinstance(row, str) else [] for row in found["Genes"]]  # gseapy's order varies
    return table.assign(
        overlap=[len(row) for row in hits],
        odds_ratio=found["Odds Ratio"].fillna(0.0).to_numpy(np.float64),
        p=found["P-value"].fillna(1.0).to_numpy(np.float64),
        genes=hits,
    )
