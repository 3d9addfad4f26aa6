"""Imports go downwards only, and importing the package costs nothing."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyro_vi_kit as vi
from benchmarks.structure import circles, imports

# From the bottom to the top. A package imports from lower layers and from itself; packages of one layer
# do not know each other. `benchmarks.structure` looks for circles, inside of packages too.
LAYERS = (
    ("core",),
    ("capture",),
    ("model",),
    ("guides",),
    ("objectives",),
    ("optimize",),
    ("posterior",),
    ("fitting",),
    ("validation",),
    ("plots",),
    ("cli",),
)
PACKAGE = "pyro_vi_kit"
NEVER = ("models", "benchmarks", "tests")
HEAVY = ("torch", "pyro", "arviz", "pandas", "scipy", "xarray", "matplotlib")

ROOT = Path(__file__).parents[1] / PACKAGE
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TABLE_ENTRY = re.compile(rf"{PACKAGE}(\.\w+)+")


def own_name(path: Path, root: Path) -> str:
    """The module or sub-package directly under the package that a file belongs to."""
    return path.relative_to(root).with_suffix("").parts[0]


def imported(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of all that a file imports.

    Imports in functions and under TYPE_CHECKING count, and so do the names in lazy tables
    (``"pyro_vi_kit.guides.gaussian.laplace"``).
    """
    parents = (PACKAGE, *path.relative_to(root).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) + 1 - node.level] if node.level else ()
            names = (*base, *([node.module] if node.module else []))
            yield from ((node.lineno, ".".join((*names, alias.name))) for alias in node.names)
        elif isinstance(node, ast.Constant) and TABLE_ENTRY.fullmatch(str(node.value)):
            yield node.lineno, str(node.value)


def violations(path: Path, root: Path = ROOT) -> list[str]:
    """What a file may not import, each with the reason."""
    own = own_name(path, root)
    if own not in LEVEL:
        return [f"{own} has no layer: place it in LAYERS of tests/test_layers.py"]
    problems = []
    for line, name in imported(path, root):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        where = f"{path.relative_to(root)}:{line} imports {name}"
        if top in NEVER:
            problems.append(f"{where}: the library never imports {top}/")
        elif top != PACKAGE or target == own or (name == PACKAGE and own in LAYERS[-1]):
            continue  # the command line is a user of the package as others are
        elif target not in LEVEL:
            problems.append(f"{where}: import from the module that defines it, or place it")
        elif LEVEL[target] >= LEVEL[own]:
            problems.append(f"{where}: layer {LEVEL[target]} is not below {own}'s ({LEVEL[own]})")
    return problems


SOURCES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    assert violations(path) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("guides/a.py", "from pyro_vi_kit.model.model import Model", None),
        ("guides/a.py", "from pyro_vi_kit.guides.b import B", None),
        ("guides/__init__.py", "from .b import B", None),
        ("guides/a.py", "from ..model import Model", None),
        ("posterior/a.py", "from pyro_vi_kit import core, guides", None),
        ("guides/a.py", "import torch.distributions", None),
        ("guides/a.py", "from pyro_vi_kit.objectives import Elbo", "is not below"),
        ("guides/a.py", "import pyro_vi_kit.posterior", "is not below"),
        ("guides/a.py", "from ..fitting import fit", "is not below"),
        ("guides/a.py", "def f():\n    from pyro_vi_kit import fitting", "is not below"),
        ("guides/a.py", "T = {'fit': 'pyro_vi_kit.fitting.fit'}", "is not below"),
        ("guides/a.py", "if TYPE_CHECKING:\n    from pyro_vi_kit.cli import main", "is not below"),
        ("fitting/a.py", "from pyro_vi_kit import Model", "import from the module"),
        ("fitting/a.py", "import pyro_vi_kit", "import from the module"),
        ("fitting/a.py", "from models.eight_schools import MODEL", "never imports models"),
        ("fitting/a.py", "import benchmarks.demo", "never imports benchmarks"),
        ("cli/a.py", "import pyro_vi_kit as vi", None),
        ("brand_new.py", "", "brand_new has no layer"),
    ],
)
def test_the_rule_itself(tmp_path, file, source, complaint):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    problems = violations(path, tmp_path)
    if complaint is None:
        assert problems == []
    else:
        assert len(problems) == 1
        assert complaint in problems[0]


def test_no_module_imports_itself_through_others():
    assert circles(imports()) == []


def test_no_module_has_two_layers():
    assert len(LEVEL) == sum(map(len, LAYERS))


def python(code: str) -> object:
    """What a fresh interpreter prints as JSON."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_import_is_light():
    loaded = python("import json, sys, pyro_vi_kit; print(json.dumps(list(sys.modules)))")
    assert isinstance(loaded, list)
    assert set(HEAVY).isdisjoint(loaded)


@pytest.mark.parametrize("name", vi.__all__)
def test_public_names_resolve(name):
    assert getattr(vi, name) is not None
    assert name in dir(vi)


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = vi.nonsense


def test_public_names_outlive_the_import_of_a_namesake_module():
    """Importing ``pyro_vi_kit.fit`` must not turn the function ``vi.fit`` into that module."""
    modules = {module.name for module in pkgutil.iter_modules(vi.__path__)}
    namesakes = sorted(modules & set(vi.__all__))
    shadowed = python(f"""
import importlib, json
import pyro_vi_kit as vi

home = {{name: importlib.import_module("{PACKAGE}." + name) for name in {namesakes}}}
print(json.dumps([n for n, m in home.items() if getattr(vi, n) is not getattr(m, n, m)]))
""")
    assert shadowed == []
