"""Model files: what loads, what is refused and in which words."""

import sys

import pytest
import torch
from toys import MODELS

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import FileError, ModelError
from pyro_vi_kit.model.modelfile import load_model_file, model_files

GOOD = """
import pyro
import pyro.distributions as dist
import pyro_vi_kit as vi

def coin(y):
    p = pyro.sample("p", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(p, 1.0), obs=y)

"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="model.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("path", sorted(MODELS.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_the_zoo_loads(path):
    assert isinstance(load_model_file(path), vi.Model)


def test_a_file_runs_afresh_and_leaves_the_path_alone(write):
    path = write(GOOD + "import torch\nMODEL = vi.Model(coin, torch.tensor(0.5))")
    before = list(sys.path)
    one, two = load_model_file(path), load_model_file(str(path))
    assert one is not two
    assert one.name == "coin"
    assert torch.equal(one.args[0], torch.tensor(0.5))
    assert sys.path == before


def test_neighbours_of_one_name_do_not_meet(tmp_path):
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "data.py").write_text(f"Y = {value}")
        (tmp_path / folder / "m.py").write_text(
            GOOD + "import torch\nfrom data import Y\nMODEL = vi.Model(coin, torch.tensor(Y))"
        )
    loaded = [load_model_file(tmp_path / folder / "m.py") for folder in ("a", "b")]
    assert [float(model.args[0]) for model in loaded] == [1.0, 2.0]
    assert "data" not in sys.modules


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\nimport no_such_package", r"line 2: ModuleNotFoundError: .*install it in"),
        ("x = (", "line 1: SyntaxError"),
        ("a = 1\nb = 2\n1 / 0", "line 3: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "line 1: SystemExit: 3"),
        ("import pyro_vi_kit as vi\nMODEL = vi.Model(3)", "line 2: ModelError: a model must be"),
        (GOOD + "model = vi.Model(coin, 1.0)", "called 'model', rename it"),
        (GOOD + "a = vi.Model(coin)\nb = a", "has the vi.Models a, b, name one"),
        (GOOD, r"add MODEL = vi.Model\(coin, \*data\); it defines coin"),
        ("", r"add MODEL = vi.Model\(function, \*data\)"),
        (GOOD + "MODEL = coin", "must be a vi.Model, got function"),
    ],
)
def test_refused_in_one_message(write, text, words):
    path = write(text)
    with pytest.raises(ModelError, match=words) as caught:
        load_model_file(path)
    assert str(path) in str(caught.value)


def test_the_cause_is_chained(write):
    with pytest.raises(ModelError) as caught:
        load_model_file(write("1 / 0"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_files_that_are_not_there(write, tmp_path):
    path = write(GOOD, "eight.py")
    with pytest.raises(FileError, match=r"did you mean .*eight\.py"):
        load_model_file(path.with_name("eigth.py"))
    with pytest.raises(FileError, match="check the path"):
        load_model_file(tmp_path / "nowhere" / "m.py")
    with pytest.raises(FileError, match="is a folder"):
        load_model_file(tmp_path)
    with pytest.raises(FileError, match=r"ends in \.py"):
        load_model_file(write("MODEL = 1", "model.txt"))


def test_model_files(write, tmp_path):
    for name in ("b.py", "a.py", "_data.py", "__init__.py", "README.md"):
        write("", name)
    names = [path.name for path in model_files([tmp_path / "b.py", tmp_path])]
    assert names == ["b.py", "a.py"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="no model files in"):
        model_files([tmp_path / "empty"])
    with pytest.raises(FileError, match="no model file"):
        model_files([tmp_path / "c.py"])
