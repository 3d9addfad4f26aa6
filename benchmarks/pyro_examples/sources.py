"""What a checkout of Pyro has to run: the scripts of its examples, and the notebooks of its tutorial."""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

_NEEDS = re.compile(r"^\s*(?:import|from) (funsor|zuko|horovod|scvi)\b", re.MULTILINE)
_MAGIC = re.compile(r"^([ \t]*)[%!].*$", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One script with its command line, or one notebook.

    Attributes:
        name: The command line, or the notebook's name; what ``--only`` looks in.
        path: The file.
        arguments: The script's arguments.
    """

    name: str
    path: Path
    arguments: tuple[str, ...] = ()

    def code(self) -> str:
        """The Python code to execute; of a notebook, its cells without magics."""
        text = self.path.read_text(encoding="utf-8")
        if self.path.suffix != ".ipynb":
            return text
        cells = [c["source"] for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
        joined = "\n\n".join("".join(cell) for cell in cells)
        return _MAGIC.sub(r"\1pass", joined.replace("%pylab inline", "from pylab import *"))

    def needs(self) -> str | None:
        """A package that it cannot do without and that nothing here stands for."""
        found = _NEEDS.search(self.code())
        if found and found.group(1) == "horovod":
            return None  # imported only where it is asked for
        return "funsor" if "funsor" in self.path.parts else found and found.group(1)


def sources(pyro: Path) -> list[Source]:
    """Scripts with the arguments that Pyro's own test of them has, then notebooks."""
    examples, listed = pyro / "examples", _command_lines(pyro / "tests" / "test_examples.py")
    found = [
        Source(f"examples/{line}", examples / words[0], tuple(words[1:]))
        for line in dict.fromkeys(" ".join(line.split()) for line in listed)
        if (words := shlex.split(line)) and (examples / words[0]).is_file()
    ]
    known = {source.path for source in found}
    found += [
        Source(f"examples/{path.relative_to(examples)}", path)
        for path in sorted(examples.rglob("*.py"))
        if path not in known and "__main__" in path.read_text(encoding="utf-8")
    ]
    notebooks = sorted((pyro / "tutorial" / "source").glob("*.ipynb"))
    return found + [Source(f"tutorial/{path.stem}", path) for path in notebooks]


def _command_lines(path: Path) -> list[str]:
    """The strings of the list CPU_EXAMPLES, also those wrapped in a ``pytest.param``."""
    if not path.is_file():
        return []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CPU_EXAMPLES":
            items = node.value.elts if isinstance(node.value, ast.List) else []
            first = [item.args[0] if isinstance(item, ast.Call) else item for item in items]
            return [str(ast.literal_eval(item)) for item in first]
    return []
