"""Model files: Python files with one ``MODEL = vi.Model(...)``."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pyro_vi_kit.core.errors import FileError, ModelError
from pyro_vi_kit.model.model import Model

NAME = "MODEL"

_EXAMPLE = f"{NAME} = vi.Model(function, *data)"


def load_model_file(path: str | os.PathLike[str]) -> Model:
    """The model of a model file.

    The file is run as a module of its own, afresh at each call. It may import its neighbours, as a
    script may.

    Args:
        path: The file.

    Raises:
        FileError: If there is no such file.
        ModelError: If it does not import, or has no ``MODEL`` that is a `Model`.
    """
    source = _existing(path)
    module = _run(source)
    if not hasattr(module, NAME):
        raise ModelError(f"{source} has no {NAME}: {_remedy(module)}")
    model = getattr(module, NAME)
    if not isinstance(model, Model):
        raise ModelError(
            f"{NAME} in {source} must be a vi.Model, got {type(model).__name__}: write {_EXAMPLE}"
        )
    return model


def run_file(name: str) -> ModuleType:
    """Run a Python file, or import a module by its dotted name, for what it registers.

    Args:
        name: A file, ``my_guides.py``, or a module, ``my_package.guides``, from the working folder.

    Raises:
        FileError: If there is no such file.
        ModelError: If it does not import.
    """
    if name.endswith(".py") or os.sep in name:
        return _run(_existing(name, "file"))
    with _neighbours(Path.cwd(), keep=True):
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"module {name} does not import: {_words(error, Path(name))}"
            ) from error


def model_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Model files by name: files as they are, and for a folder the files in it.

    In a folder, files whose name starts with an underscore are no model files.

    Args:
        paths: Files and folders.

    Returns:
        Files, in the order asked for and by name within a folder, each once.

    Raises:
        FileError: If one does not exist, or a folder has no model files.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(_existing(path))
            continue
        inside = sorted(p for p in path.glob("*.py") if p.is_file() and p.name[0] != "_")
        if not inside:
            raise FileError(f"no model files in {path}: each is a .py file with {_EXAMPLE}")
        found += inside
    unique = {path.resolve(): path for path in reversed(found)}
    return [path for path in found if unique.get(path.resolve()) is path]


def _existing(path: str | os.PathLike[str], kind: str = "model file") -> Path:
    source = Path(path)
    if source.is_dir():
        raise FileError(f"{source} is a folder: name a model file in it (a .py with {_EXAMPLE})")
    if not source.is_file():
        folder = source.parent
        there = [p.name for p in folder.glob("*.py")] if folder.is_dir() else []
        nearest = difflib.get_close_matches(source.name, there, n=1)
        hint = f"did you mean {folder / nearest[0]}?" if nearest else "check the path"
        raise FileError(f"no {kind} {source}: {hint}")
    return source


def _run(source: Path) -> ModuleType:
    """Import a file by its path, leaving nothing behind but the module itself."""
    where = source.resolve()
    name = f"vi_model_{where.stem}_{hashlib.sha256(str(where).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, where)
    if spec is None or spec.loader is None:
        raise FileError(f"{source} is no Python file: a model file ends in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look the module up by its name.
    sys.modules[name] = module
    try:
        with _neighbours(where.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise ModelError(f"{source} does not import: {_words(error, where)}") from error
    return module


@contextlib.contextmanager
def _neighbours(folder: Path, *, keep: bool = False) -> Iterator[None]:
    """Let a file import its neighbours, which another folder's file may have under the same names.

    They are forgotten behind it, unless they are to be kept.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
        for name in set() if keep else set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if (
                file is not None
                and Path(file).parent == folder
                and not name.startswith("vi_model_")
            ):
                del sys.modules[name]


def _words(error: BaseException, source: Path) -> str:
    """Line, exception and its message; for a missing package, what to do."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(source)]
    at = f"line {lines[-1]}: " if lines else ""
    words = f"{at}{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError):
        return f"{words}; install it in the environment that runs this: {sys.executable}"
    return words


def _remedy(module: ModuleType) -> str:
    """What to write, from what the file has."""
    values: dict[str, Any] = {k: v for k, v in vars(module).items() if not k.startswith("__")}
    models = [name for name, value in values.items() if isinstance(value, Model)]
    if len(models) == 1:
        return f"its vi.Model is called {models[0]!r}, rename it or add {NAME} = {models[0]}"
    if models:
        return f"it has the vi.Models {', '.join(models)}, name one of them {NAME}"
    own = [
        name
        for name, value in values.items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    if own:
        return f"add {NAME} = vi.Model({own[-1]}, *data); it defines {', '.join(own)}"
    return f"add {_EXAMPLE}"
