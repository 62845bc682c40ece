"""Random but legal AnnData files through the command: each must end with a page, or with one sentence.

``python benchmarks/fuzz.py 100 --whole 10`` checks 100 files up to the first fit, and makes a report of every tenth.
"""

import argparse
import contextlib
import io
import tempfile
import traceback
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData, settings
from scipy import sparse

from scbmlp import report

ODD = ["a/b", "_index", "ß µ", "日本", "$x_1$", "<b>", "a`b", "nan", "", " ", "..", "x" * 90, "a\nb", "\\frac{", "{0}"]
ODD += ["%s", "'", "-1"]


def odd(rng, n, stem):
    """Return names of which some are odd, each its own."""
    names = [f"{stem}{i}" for i in range(n)]
    for i, name in zip(rng.permutation(n)[: rng.integers(0, 6)], rng.permutation(ODD), strict=False):
        names[i] = str(name)
    return names


def column(rng, n):
    """Return a column of obs of any kind."""
    whole = rng.integers(0, 4, n)
    holes = rng.random(n) < 0.2
    words = np.array(["", "é", "nan", "a/b"], object)[whole]
    return [
        lambda: whole, lambda: whole.astype(np.float32), lambda: whole > 1, lambda: pd.array(whole, "Int64"),
        lambda: words, lambda: pd.array(words, "string"), lambda: np.where(holes, None, words),
        lambda: pd.Categorical(words), lambda: pd.Categorical(whole, ordered=True), lambda: pd.Categorical(whole > 1),
        lambda: pd.Categorical(np.where(holes, None, words), categories=[*dict.fromkeys(words), "unused"]),
        lambda: pd.array(np.where(holes, None, whole > 1), "boolean"), lambda: np.where(holes, np.nan, whole),
    ][rng.integers(13)]()  # fmt: skip


def random_file(seed, path):
    """Write a random file, and return the words of a command for it."""
    rng = np.random.default_rng(seed)
    n, g, k = rng.integers(60, 151), rng.integers(12, 41), rng.integers(2, 5)
    label = np.arange(n) % k
    rate = rng.gamma(2, 0.6, g) * np.where(rng.random((k, g)) < 0.3, 4, 1)[label]
    rate[:, : rng.integers(0, 3)] = 0  # genes of no cell
    counts = rng.poisson(rate)
    x = np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 50)
    x = counts if rng.random() < 0.25 else x.astype(rng.choice([np.float32, np.float64]))
    x = x > 0 if rng.random() < 0.04 else x
    layout = [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array][rng.integers(4)]
    cells = odd(rng, n, "c") if rng.random() < 0.7 else [f"c{i % 50}" for i in range(n)]
    genes = odd(rng, g, "g") if rng.random() < 0.9 else [f"g{i % (g - 1)}" for i in range(g)]
    adata = AnnData(layout(x), pd.DataFrame(index=cells), pd.DataFrame(index=genes))
    classes = rng.permutation(ODD)[:k] if rng.random() < 0.6 else [f"t{i}" for i in range(k)]
    key = str(rng.choice(["type", "a/b", "cell type", "é", "$", "-x"]))
    kinds = [label, label > 0, np.array(classes, object)[label], label.astype(float)]
    values = kinds[rng.choice(4, p=[0.1, 0.1, 0.7, 0.1])]
    adata.obs[key] = pd.Categorical(values, ordered=rng.random() < 0.2) if rng.random() < 0.7 else values
    if rng.random() < 0.2:
        adata.obs[key] = adata.obs[key].astype(object).where(rng.random(n) > 0.05).astype("category")
    for name in rng.permutation([name for name in ODD if name.strip(".") and name != "_index"])[: rng.integers(0, 5)]:
        adata.obs[str(name)] = column(rng, n)
    colors = [["nan"] * k, ["#111111"] * 9, ["red"] * k, rng.random((k, 4)), {"a": "red"}, "red", 5, [1, 2]]
    adata.uns[f"{key}_colors"] = colors[rng.integers(len(colors))]
    adata.obsm["X_table"] = pd.DataFrame({"q/r": rng.random(n), "v": rng.normal(size=n)}, adata.obs_names)
    adata.obsm["numbers"] = rng.normal(size=(n, rng.integers(1, 4)))
    adata.layers["counts"] = layout(counts)
    if rng.random() < 0.3:
        adata.raw = adata.copy()
        if x.dtype.kind == "f" and layout is np.asarray:
            adata.X = adata.X - adata.X.mean(0)
    with settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(path)
    by_class = rng.random() < 0.8
    return [f"--class-key={key}" if by_class else f"--target-key={rng.choice(['numbers', 'X_table'])}"]


def ends(path, words, out, whole):
    """Run the command, up to the first fit or whole; return what is wrong with its end, if anything, and its words."""
    said, run = io.StringIO(), report._run
    if not whole:
        report._run = lambda folder, *rest: [(folder / name).touch() for name in report.FILES]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = report.main(["report", str(path), *words, "--quick", "--out", str(out)])
    except (Exception, SystemExit):  # noqa: BLE001
        return traceback.format_exc(), ""
    finally:
        report._run = run
    lines = [line for line in said.getvalue().splitlines() if line.startswith("scbmlp report:")]
    text = (out / "report.html").read_text("utf-8") if (out / "report.html").exists() else ""
    if status == 2:
        late = [word for word in ("--debug", "stopped at", "cannot be written or drawn") if word in said.getvalue()]
        return "half" * bool(text) or " ".join(late) or "no one sentence" * (len(lines) != 1), said.getvalue()
    if status:
        return f"status {status}", said.getvalue()
    if sorted(path.name for path in out.iterdir()) != sorted(report.FILES):
        return "not all files", said.getvalue()
    pictures, captions = text.count("<img "), text.count("<figcaption")
    if whole and ("Traceback (most" in text or pictures != captions or pictures < 2):
        return "a page without its figures", said.getvalue()
    return "", said.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--whole", type=int, default=10)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    refused = 0
    for seed in range(given.first, given.first + given.n):
        with tempfile.TemporaryDirectory() as folder:
            words = random_file(seed, path := Path(folder, "cells.h5ad"))
            wrong, said = ends(path, words, Path(folder, "out"), given.whole and seed % given.whole == 0)
            refused += "scbmlp report:" in said
            if wrong or "scbmlp report:" in said:
                print(seed, words, "WRONG" if wrong else "refused", wrong[-1500:], said[-500:], flush=True)
    print(f"{given.n} files, {refused} refused with a sentence")
