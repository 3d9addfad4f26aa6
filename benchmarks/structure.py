"""The structure of the package in figures: its table stands in docs/DESIGN.md.

    python -m benchmarks.structure             # prints the table
    python -m benchmarks.structure --update    # and writes it into docs/DESIGN.md

Sizes and imports are read off the source. Complexity is cyclomatic. What a fit passes through is
counted by a tracer, as somebody reads it who follows the run: functions in the order in which they are
first called; a hop is where the next one stands in another file.
"""

from __future__ import annotations

import ast
import datetime
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.processes import ROOT
from benchmarks.lib.tables import markdown

PACKAGE = ROOT / "pyro_vi_kit"
DOCUMENT = ROOT / "docs" / "DESIGN.md"
BEGIN, END = "<!-- structure: begin -->", "<!-- structure: end -->"
# Before the package was put into folders, on 2026-11-26.
BEFORE = {
    "lines": 40_007,
    "files": 261,
    "names at the root": 62,
    "functions of complexity >= 15": 23,
    "functions of over 10 parameters, public ones aside": None,
    "modules of under 40 lines, __init__ aside": None,
    "import circles": None,
    "files that a fit passes through": 47,
    "hops of a fit": 131,
}
AIMS = {
    "lines": 33_500,
    "names at the root": 12,
    "functions of complexity >= 15": 0,
    "functions of over 10 parameters, public ones aside": 0,
    "modules of under 40 lines, __init__ aside": 0,
    "import circles": 0,
    "files that a fit passes through": 25,
    "hops of a fit": 60,
}
MOST_PARAMETERS, SHORT, COMPLEX = 10, 40, 15


def sources() -> list[Path]:
    """Every file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def lines_of(path: Path) -> int:
    """The lines of one file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def root_names() -> list[str]:
    """Modules and folders directly under the package."""
    found = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    return sorted(found - {"__init__", "__main__"})


def complex_functions() -> list[str]:
    """Functions of too many ways through, the worst first."""
    found = [
        (complexity(node), f"{path.relative_to(PACKAGE)}:{node.lineno}")
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    return [f"{where} ({n})" for n, where in sorted(found, reverse=True) if n >= COMPLEX]


def complexity(function: ast.AST) -> int:
    """Cyclomatic complexity as Radon counts it: boolean operators and comprehensions too."""
    branches = (
        ast.If,
        ast.IfExp,
        ast.For,
        ast.While,
        ast.ExceptHandler,
        ast.Assert,
        ast.match_case,
    )
    count = 1
    for node in ast.walk(function):
        if isinstance(node, branches):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
    return count


def crowded_functions() -> list[str]:
    """Functions of too many parameters that are not part of the public face."""
    public = set(_facade())
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in public:
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([each for each in every if each.arg not in ("self", "cls")])
                if count > MOST_PARAMETERS:
                    found.append(f"{path.relative_to(PACKAGE)}:{node.name} ({count})")
    return found


def _facade() -> list[str]:
    import pyro_vi_kit

    return list(pyro_vi_kit.__all__)


def short_modules() -> list[str]:
    """Modules that hardly hold anything."""
    return [
        str(path.relative_to(PACKAGE))
        for path in sources()
        if path.name not in ("__init__.py", "__main__.py") and lines_of(path) < SHORT
    ]


def imports() -> dict[str, set[str]]:
    """Which module imports which, those in functions and under TYPE_CHECKING too."""
    modules = {_dotted(path): path for path in sources()}
    return {
        name: {found for found in _imported(path, name) if found in modules and found != name}
        for name, path in modules.items()
    }


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, own: str) -> Iterator[str]:
    package = own if path.name == "__init__.py" else own.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            parents = parents[: len(parents) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                # What a package hands on comes from a file of its own, which is looked at by itself.
                whole = f"{base}.{alias.name}"
                place = ROOT / whole.replace(".", "/")
                yield whole if place.is_dir() or place.with_suffix(".py").exists() else base


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


def passed_through(work: Callable[[], Any]) -> tuple[Counter[str], list[tuple[str, str]]]:
    """The package's files that a call passes through, and the hops between them, in order."""
    files: Counter[str] = Counter()
    hops: list[tuple[str, str]] = []
    met: set[Any] = set()
    last: list[str] = []
    names: dict[str, str | None] = {}

    def file_of(frame: FrameType) -> str | None:
        path = frame.f_code.co_filename
        if path not in names:
            inside = path.startswith(str(PACKAGE))
            names[path] = str(Path(path).relative_to(PACKAGE)) if inside else None
        return names[path]

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_code.co_name.startswith("<"):  # lambdas, modules
            return
        here = file_of(frame)
        if here is None:
            return
        files[here] += 1
        if frame.f_code in met:
            return
        met.add(frame.f_code)
        if last and last[0] != here:
            hops.append((last[0], here))
        last[:] = [here]

    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return files, hops


def a_fit() -> tuple[Counter[str], list[tuple[str, str]]]:
    """What the simplest fit passes through."""
    import pyro_vi_kit as vi
    from models.eight_schools import MODEL

    vi.fit(MODEL, "mean_field", seed=0, progress=False)  # imports are not what is counted
    return passed_through(lambda: vi.fit(MODEL, "mean_field", seed=0, progress=False))


def measure() -> dict[str, Any]:
    """Every figure, and what stands behind it where it is no plain size."""
    paths = sources()
    files, hops = a_fit()
    behind: dict[str, Any] = {
        "names at the root": root_names(),
        "functions of complexity >= 15": complex_functions(),
        "functions of over 10 parameters, public ones aside": crowded_functions(),
        "modules of under 40 lines, __init__ aside": short_modules(),
        "import circles": circles(imports()),
        "files that a fit passes through": sorted(files),
        "hops of a fit": [f"{a} -> {b}" for a, b in hops],
    }
    figures = {"lines": sum(map(lines_of, paths)), "files": len(paths)}
    return {
        "figures": figures | {name: len(each) for name, each in behind.items()},
        "behind": behind,
    }


def report(figures: Mapping[str, int]) -> str:
    """The table as Markdown."""
    today = datetime.date.today().isoformat()
    rows = [
        {
            "what": name,
            "2026-11-26": "" if BEFORE[name] is None else f"{BEFORE[name]:,}",
            today: f"{figures[name]:,}",
            "aim": f"{AIMS[name]:,}" if name in AIMS else "",
        }
        for name in BEFORE
    ]
    return markdown(["what", "2026-11-26", today, "aim"], rows)


def write(table: str) -> None:
    """Put the table where docs/DESIGN.md keeps it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__)
    words.add_argument("--update", action="store_true", help="write the table into docs/DESIGN.md")
    words.add_argument("--behind", action="store_true", help="list what stands behind each figure")
    asked = words.parse_args(argv)
    found = measure()
    table = report(found["figures"])
    print(table)
    if asked.behind:
        print(json.dumps(found["behind"], indent=1))
    if asked.update:
        write(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
