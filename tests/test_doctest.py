"""Does every name of the API page have an example, and does what the examples say come out?"""

import copy
import doctest
import inspect
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pytest

from scbmlp import simulate
from tests.test_sources import REAL_ONLY, stand_in

PAGE = (Path(__file__).parent.parent / "api.md").read_text()
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def members(owner, chosen, left_out=()):
    """Public functions and classes of a module, or methods of a class, those of its base too; all if none is chosen."""
    home = getattr(owner, "__module__", owner.__name__)
    for name, shown in inspect.getmembers(owner, lambda one: inspect.isclass(one) or inspect.isroutine(one)):
        public = not name.startswith("_") and getattr(shown, "__module__", None) == home
        if public and name not in left_out and (name in chosen or not chosen):
            yield name, shown


def listed():
    """What the page's directives show, by name."""
    for kind, path, text in re.findall(r"^\.\. auto(\w+):: (\S+)\n((?:   :.*\n)*)", PAGE, flags=re.M):
        options = {key: re.findall(r"\w+", value) for key, value in re.findall(r":([\w-]+):(.*)", text)}
        if kind == "module" and "members" in options:
            for name, shown in members(import_module(path), options["members"], options.get("exclude-members", ())):
                yield f"{path}.{name}", shown
                if inspect.isclass(shown):
                    yield from ((f"{path}.{name}.{method}", each) for method, each in members(shown, ()))
        elif kind != "module":
            module, name = path.rsplit(".", 1)
            yield path, (shown := getattr(import_module(module), name))
            if "members" in options:
                named = members(shown, options["members"], options.get("exclude-members", ()))
                yield from ((f"{path}.{method}", each) for method, each in named)


SHOWN = dict(listed())
FOUND = (test for name in SHOWN for test in doctest.DocTestFinder(recurse=False).find(SHOWN[name], name))
EXAMPLES = {test.name: test for test in FOUND if test.examples}


def test_every_public_name_has_an_example():
    """A class that a function of the page returns has its example there."""
    functions = [shown for shown in SHOWN.values() if inspect.isfunction(shown)]
    returned = {
        word for shown in functions for word in re.findall(r"\w+", str(inspect.signature(shown).return_annotation))
    }
    lacking = [name for name in SHOWN if name not in EXAMPLES]
    assert len(SHOWN) > 100
    assert [name for name in lacking if not inspect.isclass(SHOWN[name]) or SHOWN[name].__name__ not in returned] == []


def test_examples_are_left_out_for_a_reason():
    skipped = {name for name, test in EXAMPLES.items() if any(doctest.SKIP in one.options for one in test.examples)}
    assert skipped == {"scbmlp.report.report"}  # it takes longer than all others together


@pytest.fixture(scope="module")
def namespace():
    """What the lines at the top of the page define."""
    names = {}
    exec(compile(re.search(r"```python\n(.*?)```", PAGE, flags=re.S)[1], "api.md", "exec"), names)
    return {name: value for name, value in names.items() if not name.startswith("__")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files like those that users have."""
    folder = tmp_path_factory.mktemp("data")
    simulate.pancreas(n_cells=80, n_genes=250).write_h5ad(folder / "pancreas.h5ad")
    simulate.sciplex3(n_cells=3000, n_genes=200).write_h5ad(folder / "sciplex3.h5ad")
    for name in REAL_ONLY:
        stand_in(name, folder / "pancreas.h5ad").write_h5ad(folder / f"{name}.h5ad")
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, namespace, data, tmp_path, monkeypatch):
    monkeypatch.setenv("SCBMLP_DATA_SOURCE", "local")
    monkeypatch.setenv("SCBMLP_DATA_DIR", str(data))
    monkeypatch.chdir(tmp_path)
    test = copy.copy(EXAMPLES[name])
    # Copies, so that no example sees what another has changed.
    test.globs = {key: one if isinstance(one, ModuleType) else copy.deepcopy(one) for key, one in namespace.items()}
    problem = None
    try:
        doctest.DebugRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
    except doctest.UnexpectedException as error:
        problem = error.exc_info[1]
    except doctest.DocTestFailure as failure:
        problem = AssertionError(f"\n{failure.example.source}gives\n{failure.got}not\n{failure.example.want}")
    plt.close("all")
    if problem:
        raise problem
