"""One truth for versions, one direction for imports, and the public names that users rely on."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import yaml

import scbmlp
from tests.test_chapters import glued_in

ROOT = Path(__file__).parent.parent
CONFIG, CITATION = (yaml.safe_load((ROOT / name).read_text()) for name in ("_config.yml", "CITATION.cff"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M))
API = (ROOT / "api.md").read_text()
ORDER = (
    "checks display simulate stores sources datasets targets effects baselines exact nested moments training storage "
    "models solving sklearn interactions audit knockoffs modules stability evidence enrichment plotting explorer "
    "preparing report look annotate"
).split()
PUBLIC = {
    "sources": "pancreas sciplex3 dexamethasone norman glioblastoma data_card run_card",
    "simulate": "pancreas sciplex3 planted_interactions",
    "stores": "StoredMatrix",
    "datasets": "get_classification_datasets get_regression_datasets",
    "targets": "laplacian_frequencies perturbation_response noise_ceiling",
    "baselines": "linear_baseline LinearModel",
    "exact": "Mixture Solution solution",
    "moments": "Moments",
    "models": "Config ScBMLPClassifier ScBMLPRegressor solve solve_replicas tune statistics",
    "interactions": "gain interaction_matrix InteractionMatrix decompose audit similarity attributions contrast "
    "group_means",
    "knockoffs": "knockoffs pair_discoveries",
    "modules": "gene_modules all_gene_modules GeneModules consensus stability permutation_null truncation_curve",
    "evidence": "trust without_pairs random_directions",
    "enrichment": "enrich read_gene_sets",
    "plotting": "palette category_colors trust",
    "explorer": "explorer Explorer",
    "report": "report prepare",
    "look": "look",
    "annotate": "annotate calibrate calibration_error",
    "sklearn": "BilinearClassifier BilinearRegressor",
}


def test_versions_are_those_of_the_constraints_here_and_on_binder():
    assert {name: version(name).split("+")[0] for name in PINS} == PINS
    text = (ROOT / "environment.yml").read_text()
    pip = dict(re.findall(r"^      - ([\w.-]+)==(\S+)$", text, flags=re.M))
    conda = dict(re.findall(r"^  - ([\w.-]+)=(\S+)$", text, flags=re.M))
    assert conda == {"python": "3.11", "numpy": PINS["numpy"]} and "  - pytorch-cpu>=2.6\n" in text
    assert pip == {name: pin for name, pin in PINS.items() if name != "torch"}
    declared = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    assert {re.match(r"[\w.-]+", line)[0].lower() for line in declared} <= PINS.keys()


def test_imports_run_one_way():
    assert set(ORDER) == {path.stem for path in (ROOT / "scbmlp").glob("[a-z]*.py")}
    for i, module in enumerate(ORDER):
        tree = ast.parse((ROOT / "scbmlp" / f"{module}.py").read_text())
        found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        imported = {alias.name for node in found if node.module == "scbmlp" for alias in node.names}
        imported |= {node.module.split(".")[1] for node in found if node.module.startswith("scbmlp.")}
        assert imported <= set(ORDER[:i]), module


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_exist_and_are_documented(module):
    loaded = importlib.import_module(f"scbmlp.{module}")
    assert all(getattr(loaded, name).__doc__ for name in PUBLIC[module].split()) and f"scbmlp.{module}" in API


def test_modules_are_found_by_completion_and_imported_when_asked_for():
    code = "import scbmlp, sys; print(*dir(scbmlp), 'torch' in sys.modules, scbmlp.models.Config.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    *names, before, loaded = run.stdout.split()
    documented = set(re.findall(r"^\.\. auto\w+:: scbmlp\.(\w+)", API, flags=re.M))
    assert set(scbmlp.__all__) == documented <= set(names) and (before, loaded) == ("False", "Config")
    with pytest.raises(AttributeError, match="module 'scbmlp' has no attribute 'nothing'"):
        scbmlp.nothing  # noqa: B018


def test_validation_is_never_by_assert():
    for path in (ROOT / "scbmlp").glob("*.py"):
        assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)], path.name


def test_every_equation_of_the_method_is_named_by_a_test():
    labels = re.findall(r"^\$\$ \((eq-[\w-]+)\)", (ROOT / "method.md").read_text(), flags=re.M)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(labels) >= 8 and [label for label in labels if label not in tests] == []


def wrong_addresses(text):
    """Addresses of this project's repository, and any that git is to clone, that are not those of the configuration."""
    url, hub = CONFIG["repository"]["url"], CONFIG["launch_buttons"]["binderhub_url"]
    named = re.findall(r"""(?:https?://|git@)[^\s)"'>`]*scbmlp[^\s)"'>`]*|(?<=git clone )(?!{)\S+""", text)
    path = url.removeprefix("https://").partition("/")[2]
    return [at for at in named if not (url and (at.startswith(url) or (at.startswith(hub) and f"/{path}/" in at)))]


def test_configuration_alone_says_where_the_repository_is():
    url = CONFIG["repository"]["url"]
    assert {CITATION.get("repository-code", url), *PROJECT.get("urls", {}).values()} == {url}
    for path in [ROOT / "CITATION.cff", ROOT / "pyproject.toml", *ROOT.glob("*.md"), *ROOT.glob("chapters/*.ipynb")]:
        assert wrong_addresses(path.read_text()) == [], path.name
    for other in ("https://github.com/a/scbmlp", "git clone https://b.org/c", "git@d.org:e/scbmlp.git"):
        assert wrong_addresses(other)
    assert not wrong_addresses("https://github.com/a/b and git clone {url}")


def test_landing_page_runs_and_shows_numbers_that_chapters_glue(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "index.md").read_text()
    names = {}
    # The second raises if the beginning of an assertion is not found once in its chapter.
    for _, cell in re.findall(r"^(```+){code-cell}.*?\n---\n.*?\n---\n(.*?)^\1$", page, flags=re.S | re.M):
        exec(compile(cell, "index.md", "exec"), names)
    plt.close("all")
    shown = re.findall(r"chapters/(\w+)\.ipynb::(\w+):s`", "\n".join([page, *names["rows"]]))
    assert len(names["CLAIMS"]) >= 8 and len(shown) >= 8
    for chapter, key in shown:
        cells = nbformat.read(ROOT / "chapters" / f"{chapter}.ipynb", as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        assert key in glued_in(code), (chapter, key)


def test_one_version_and_no_date_before_its_release():
    number, date = re.search(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M).groups()
    assert scbmlp.__version__ == CITATION["version"] == number
    assert CITATION.get("date-released", "unreleased") == date


def test_a_commit_and_make_lint_are_held_to_the_same_pinned_tools():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.M)[1]
    lines = re.findall(r"\$\(BIN\)/([\w-]+(?: check| format)?)", recipe)
    hooks = re.findall(r"\.venv/bin/([\w-]+(?: check| format)?)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == lines and {line.split()[0] for line in lines} <= PINS.keys()


def test_what_others_ask_for_is_where_the_table_says():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (.+) \| ([spj ]+) \| (.+) \|$", page, flags=re.M)
    assert len(rows) >= 20
    assert [what for what, _, state in rows if not (state.startswith(("open", "this page")) or "](" in state)] == []
    for path in re.findall(r"\]\(([\w./]+)\)", page):
        assert (ROOT / path).exists(), path
