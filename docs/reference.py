"""Write what the public modules, classes and functions are, from their docstrings, as pages that open offline.

python docs/reference.py build/docs
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import pdoc

REPO = Path(__file__).parent.parent
PACKAGES = ("mtl_dist", "tune")


def public_modules() -> list[str]:
    """Name the modules of the packages, those within packages too; commands' `__main__` are told of by --help."""
    found = list(PACKAGES)
    for package in PACKAGES:
        walked = pkgutil.walk_packages([str(REPO / package)], f"{package}.")
        found += [module.name for module in walked if not module.name.rpartition(".")[2].startswith("_")]
    return sorted(found)


def write_reference(out: Path) -> list[str]:
    """Write a page for every module, an index and a search; return the modules."""
    names = public_modules()
    modules = {name: importlib.import_module(name) for name in names}
    # pdoc goes by `__all__` where there is one, and names of our package's are those of its API alone.
    package = modules["mtl_dist"]
    package.__all__ = [
        *package.__all__,
        *(name.removeprefix("mtl_dist.") for name in names if name.startswith("mtl_dist.") and name.count(".") == 1),
    ]
    pdoc.render.configure(docformat="markdown", footer_text="mtl_dist", show_source=False)
    pdoc.pdoc(*names, output_directory=out)
    return names


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    place = Path(sys.argv[1])
    print(f"{len(write_reference(place))} modules: {place / 'index.html'}")
