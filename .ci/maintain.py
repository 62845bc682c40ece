"""Chores of a maintainer, called by the Makefile: stored outputs, the README's figure, versions, what is shipped."""

import base64
import re
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
CHECKED = "nbval-check-output"


def outputs() -> None:
    """Keep what the checked cells of the chapters printed in the last build, which has to be of simulated cells."""
    import nbformat

    for built in sorted((ROOT / "_build" / "jupyter_execute" / "chapters").glob("*.ipynb")):
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
    """Write the figure of the cell tagged ``readme-figure`` from the last build."""
    import nbformat

    for path in sorted((ROOT / "_build" / "jupyter_execute" / "chapters").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if "readme-figure" in cell.metadata.get("tags", []):
                images = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
                target = ROOT / "_static" / "readme.png"
                target.write_bytes(base64.b64decode(images[0]))
                print(f"{target.relative_to(ROOT)} from {path.name}")
                return
    sys.exit("no built chapter has a cell tagged readme-figure; run make book first")


def logo_svg() -> str:
    """Return the logo, which is the favicon too: the interactions of one module, v v', in the book's colours."""
    from scbmlp.plotting import MUTED, POSITIVE

    v = [1, 0.6, -0.6, -1]
    squares = [
        f'  <rect x="{16 * j + 1}" y="{16 * i + 1}" width="14" height="14" rx="3" '
        f'fill="{POSITIVE if a * b > 0 else MUTED[1]}" fill-opacity="{abs(a * b):.2f}"/>'
        for i, a in enumerate(v)
        for j, b in enumerate(v)
    ]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">'
    return "\n".join([head, *squares, "</svg>\n"])


def logo() -> None:
    (ROOT / "_static" / "logo.svg").write_text(logo_svg())


def lock() -> None:
    """Write the versions of this environment to constraints.txt and environment.yml."""
    pins = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        # CUDA libraries come with torch where it needs them; they are not the same on every machine.
        if name not in {"scbmlp", "pip", "setuptools"} and not name.startswith(("nvidia-", "cuda-", "triton")):
            pins[name] = distribution.version.split("+")[0]
    lines = [f"{name}=={version}" for name, version in sorted(pins.items())]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    (ROOT / "constraints.txt").write_text(
        f"# Every version that the book was last proven with, on Python {python}. Written by make lock.\n"
        + "\n".join(lines)
        + "\n"
    )
    head = [
        "# Binder's environment: the versions of constraints.txt, with conda's CPU build of torch, of which any recent",
        "# release will do: Binder has 2 GB of memory and no GPU. Written by make lock; postBuild adds the package.",
        "name: scbmlp",
        "channels: [conda-forge, nodefaults]",
        "dependencies:",
        f"  - python={python}",
        "  - pip",
        f"  - numpy={pins['numpy']}",
        "  - pytorch-cpu>=2.6",
        "  - pip:",
    ]
    tail = [f"      - {line}" for line in lines if not line.startswith("torch==")]
    (ROOT / "environment.yml").write_text("\n".join(head + tail) + "\n")
    subprocess.run(["git", "diff", "--stat", "constraints.txt", "environment.yml"], cwd=ROOT, check=False)


def lowest() -> None:
    """Print the lowest version of every dependency that pyproject.toml allows."""
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        print(line.replace(">=", "=="))


def archives() -> None:
    """Hold what was built against git: the sdist has every file that is committed, the wheel the package, no more."""
    if not (ROOT / ".git").exists():
        print("This is no checkout of git, so that there is nothing to hold the archives against.")
        return
    # A checkout may be another user's, as in a container.
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    committed = set(listed.stdout.split("\0")) - {""}
    [sdist], [wheel] = (ROOT / "dist").glob("*.tar.gz"), (ROOT / "dist").glob("*.whl")
    with tarfile.open(sdist) as tar, ZipFile(wheel) as archive:
        shipped = {file.name.partition("/")[2] for file in tar if not file.isdir()} - {"PKG-INFO"}
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {name for name in committed if name.startswith("scbmlp/")}
    wrong = [f"{sdist.name}: {name}" for name in sorted(shipped ^ committed)]
    wrong += [f"{wheel.name}: {name}" for name in sorted(installed ^ package)]
    if wrong:
        sys.exit("\n".join(["Missing, or not committed:", *wrong]))
    print(f"{sdist.name}: {len(shipped)} files, {wheel.name}: {len(installed)}, and all of them are git's")


if __name__ == "__main__":
    chores = {
        "outputs": outputs, "figure": figure, "logo": logo, "lock": lock, "lowest": lowest, "archives": archives,
    }  # fmt: skip
    chores[sys.argv[1]]()
