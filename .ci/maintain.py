"""Chores of a maintainer: python .ci/maintain.py outputs, figure, lock, lowest or archives."""

import base64
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "_build" / "jupyter_execute" / "chapters"
CHECKED = "nbval-check-output"


def outputs() -> None:
    """Keep what the checked cells of the chapters printed in the last build, which has to be of simulated cells."""
    import nbformat

    for built in sorted(BUILT.glob("*.ipynb")):
        path = ROOT / "chapters" / built.name
        notebook, count = nbformat.read(path, as_version=4), 0
        for cell, ran in zip(notebook.cells, nbformat.read(built, as_version=4).cells, strict=True):
            if cell.cell_type != "code":
                continue
            checked = CHECKED in cell.metadata.get("tags", [])
            count += checked
            cell.outputs = ran.outputs if checked else []
            # nbval lets a cell without a count pass unseen
            cell.execution_count = count if checked else None
            for output in cell.outputs:
                output.get("metadata", {}).pop("execution", None)
                if "execution_count" in output:
                    output["execution_count"] = count
        nbformat.write(notebook, path)
        print(f"{path.name}: {count} checked cells")


def figure() -> None:
    """Write the README's figure, of the cell tagged ``readme-figure``, from the last build, of real cells."""
    import nbformat

    cells = [cell for path in BUILT.glob("*.ipynb") for cell in nbformat.read(path, as_version=4).cells]
    [cell] = [cell for cell in cells if "readme-figure" in cell.metadata.get("tags", [])]
    [image] = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    (ROOT / "_static" / "readme.png").write_bytes(base64.b64decode(image))


def lock() -> None:
    """Write the versions of this environment to constraints.txt and environment.yml."""
    pins = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        # CUDA libraries come with torch where it needs them; they are not the same on every machine.
        if name not in {"scbmlp", "pip", "setuptools"} and not name.startswith(("nvidia-", "cuda-", "triton")):
            pins[name] = distribution.version.split("+")[0]
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    head = f"# Every version that the book was last proven with, on Python {python}. Written by make lock.\n"
    (ROOT / "constraints.txt").write_text(head + "".join(lines))
    head = f"""\
# Binder's environment: the versions of constraints.txt, with conda's CPU build of torch, of which any recent
# release will do: Binder has 2 GB of memory and no GPU. Written by make lock; postBuild adds the package.
name: scbmlp
channels: [conda-forge, nodefaults]
dependencies:
  - python={python}
  - pip
  - numpy={pins["numpy"]}
  - pytorch-cpu>=2.6
  - pip:
"""
    tail = [f"      - {line}" for line in lines if not line.startswith("torch==")]
    (ROOT / "environment.yml").write_text(head + "".join(tail))


def lowest() -> None:
    """Run the unit tests with the lowest versions that pyproject.toml allows, where no book extra is needed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [line.replace(">=", "==") for line in project["dependencies"]]
    left_out = [f"--ignore=tests/test_{name}.py" for name in ("chapters", "project", "readme", "site")]
    left_out += ["--deselect=tests/test_targets.py::test_nothing_global_changes"]
    for words in (
        [sys.executable, "-m", "venv", ".venv-min"],
        [".venv-min/bin/python", "-m", "pip", "install", "--quiet", *pins, "-e", ".", "hypothesis", "pytest"],
        [".venv-min/bin/python", "-m", "pytest", "tests", *left_out, "-W", "default"],
    ):
        subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def archives() -> None:
    """Hold what was built against git: the sdist has every file that is committed, the wheel the package, no more."""
    if not (ROOT / ".git").exists():
        print("This is no checkout of git, so that there is nothing to hold the archives against.")
        return
    # A checkout may be another user's, as in a container.
    listed = subprocess.check_output(["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, text=True)
    committed = set(listed.split("\0")) - {""}
    [sdist], [wheel] = (ROOT / "dist").glob("*.tar.gz"), (ROOT / "dist").glob("*.whl")
    with tarfile.open(sdist) as tar, ZipFile(wheel) as archive:
        shipped = {file.name.partition("/")[2] for file in tar if not file.isdir()} - {"PKG-INFO"}
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
    wrong = shipped ^ committed | installed ^ {name for name in committed if name.startswith("scbmlp/")}
    if wrong:
        sys.exit("\n".join(["Missing in an archive, or not committed:", *sorted(wrong)]))
    print(f"{sdist.name}: {len(shipped)} files, {wheel.name}: {len(installed)}, and all of them are git's")


if __name__ == "__main__":
    {each.__name__: each for each in (outputs, figure, lock, lowest, archives)}[sys.argv[1]]()
