"""The README's own programs, taken from the file and run on simulated cells."""

import re
from pathlib import Path

import numpy as np
import pytest
import scvelo
import torch

from scbmlp import simulate
from scbmlp.interactions import interaction_matrix

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
# A dense eigendecomposition at 10,000 genes takes minutes a class: the same program, smaller.
SMALLER = {
    "10000": "300", "n_epochs=100": "n_epochs=3", "lr=1e-4": "lr=1e-2", "10, \"half\"": "4, \"half\"",
    'validation, "Beta", metric': 'validation, "Beta", 99, metric',
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    program = "".join(BLOCKS)
    for size, smaller in SMALLER.items():
        assert size in program
        program = program.replace(size, smaller)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("written"))
        patch.setattr(scvelo.datasets, "pancreas", lambda: simulate.pancreas(n_cells=800, n_genes=500))
        names = {}
        exec(compile(program, "README.md", "exec"), names)
    return names


def test_quick_start_trains_a_model_of_cells_in_memory_or_on_disk(ran):
    model = ran["model"]
    assert model.w_l.shape == (128, 300) and model.w_p.shape == (8, 128)
    assert model.score(ran["test"]) > 0.5  # the largest type is a quarter of the cells
    assert model.gene_names.equals(ran["adata"].var_names)
    assert ran["on_disk"][0].stored and abs(ran["large"].score(ran["test"]) - model.score(ran["test"])) < 0.1


def test_plain_decomposition_finds_the_modules_of_the_package(ran):
    q, vecs, values = ran["q"], ran["vecs"], ran["values"]
    assert torch.equal(q, q.mT)
    leading = values[values.abs().argmax()]
    torch.testing.assert_close(q[-1] @ vecs[:, 0], leading * vecs[:, 0], atol=1e-4, rtol=1e-3)
    for i, name in enumerate(ran["train"].output_names):
        expected = np.sort(np.abs(np.linalg.eigvalsh(q[i].double().numpy())))[::-1][:5]
        values, _ = interaction_matrix(ran["model"], {name: 1.0}).eigh(5)
        np.testing.assert_allclose(np.abs(values), expected, rtol=1e-3)


def test_commands_and_files_of_the_readme_exist():
    commands = set(re.findall(r"^make (\w+)", README, flags=re.M))
    assert commands == {"book", "test"}
    assert commands <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for path in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_readme_asks_whether_it_is_worth_it_and_what_speaks_for_modules(ran):
    trials = ran["solved"].trials
    assert trials["val_loss"][:-1].min() <= trials["val_loss"][0] and trials["chosen"].sum() == 1
    assert (ran["report"]["interaction"].fillna(0) <= 1.0).all() and ran["report"]["gain"].notna().all()
    table = ran["beta"].trust
    assert list(table.columns) == ["eigenvalue", "stability", "low", "r", "p", "similarity", "trusted"]
    assert len(table) == 5 and (table["p"] >= 0.01).all()
