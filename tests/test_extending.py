"""A guide and an objective from files of one's own are taken wherever the package's are.

The files are those of docs/EXTENDING.md; no other file is touched.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from click.testing import CliRunner

import pyro_vi_kit as vi
from pyro_vi_kit import guides, objectives
from pyro_vi_kit.cli import main
from pyro_vi_kit.core import registry
from pyro_vi_kit.core.errors import OptionError, RegistrationWarning, UnknownNameError

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
GUIDE, USE, OBJECTIVE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
HEAD = "from dataclasses import dataclass\n\nimport torch\n\nimport pyro_vi_kit as vi\n"
FILES = {
    "laplace_product": GUIDE,
    "halfway": HEAD + OBJECTIVE.partition("\n\nhalfway = ")[0],
}
ABOUT = guides.About("this", "that", "then", "there")

# A Laplace distribution is its own posterior: independent normals cannot follow it.
MODEL = """
import pyro
import numpy as np
import pyro.distributions as dist
import torch
import pyro_vi_kit as vi

def f():
    pyro.sample("z", dist.Laplace(torch.zeros(()), 1.0))

MODEL = vi.Model(f)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files of the page, and a model."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name, None)


@pytest.fixture
def theirs(folder):
    """The guide and the objective, registered."""
    guide, objective = (importlib.import_module(name) for name in FILES)
    return guide.LaplaceProduct, objective.Halfway


def pages_model():
    names = {"torch": torch, "dist": dist, "vi": vi}
    exec(USE.partition("posterior = ")[0], names)
    return names["model"]


def laplace_model(folder):
    from pyro_vi_kit.model.modelfile import load_model_file

    return load_model_file(folder / "model.py")


# -- one file, nothing else touched -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "suite"),
    [
        ("laplace_product", "tests/guides/test_contract.py"),
        ("halfway", "tests/objectives/test_objectives.py"),
    ],
)
def test_the_contract_suite_runs_on_it(folder, name, suite):
    """Registered before tests are collected, it is one more entry of the registry."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", name, suite, "-k", name]
    command += ["-p", "no:cacheprovider"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    count = int(re.search(r"(\d+) passed", done.stdout).group(1))
    # Of a guide and of an objective of the package there are as many.
    assert count >= {"laplace_product": 25, "halfway": 8}[name]


def test_it_is_listed_and_made_by_name(theirs):
    spec, objective = theirs
    assert guides.specify("laplace_product", init_scale=0.3) == spec(init_scale=0.3)
    assert objectives.make("halfway", weight=0.25) == objective(weight=0.25)
    assert guides.choices()["laplace_product"].startswith("Independent Laplace")
    assert objectives.about()["halfway"].cost == "K"
    with pytest.raises(UnknownNameError, match="Did you mean 'laplace_product'"):
        guides.specify("laplace_produkt")


def test_auto_takes_it_behind_the_guide_that_it_names(folder, theirs):
    posterior = vi.fit(laplace_model(folder), "auto", seed=0)
    tried = [rung.guide for rung in posterior.record.ladder]
    assert tried[:2] == ["full_rank", "laplace_product"]
    # It holds the posterior, which a Gaussian does not.
    assert posterior.spec == theirs[0]()
    assert posterior.khat < 0.5 < posterior.record.ladder[0].khat


def test_what_cannot_be_had_for_a_model_is_left_out_of_auto_with_the_reason(folder, theirs):
    spec, _ = theirs

    @vi.guides.register
    @dataclass(frozen=True)
    class Refusing(vi.guides.GuideSpec):
        """Refuses."""

        name = "refusing"
        about = ABOUT
        after = "full_rank"

        def family(self, dim):
            raise OptionError("not for this model")

    posterior = vi.fit(laplace_model(folder), "auto", seed=0)
    rungs = {rung.guide: rung for rung in posterior.record.ladder}
    assert rungs["refusing"].ended == "not tried: not for this model"
    assert posterior.spec == spec()


def test_fit_verdict_resume_checkpoint_save_and_load(folder, theirs):
    spec, objective = theirs
    model = pages_model()
    first = vi.fit(model, "laplace_product", objective="halfway", steps=150, seed=0)
    assert first.method == "stochastic"
    assert first.bound > first.elbo
    assert first.verdict.level in ("good", "resample")
    first.save("first.nc")
    again = vi.load("first.nc", model)
    assert again.spec == spec()
    assert again.record.objective == objective()
    assert torch.equal(
        torch.as_tensor(again.sample(20, seed=1)["slope"]),
        torch.as_tensor(first.sample(20, seed=1)["slope"]),
    )
    on = vi.fit(model, resume=again, steps=100)
    assert on.spec == spec()
    assert on.record.objective == objective()
    kept = vi.fit(model, spec(), steps=60, checkpoint="kept.ckpt", seed=3)
    found = vi.fit(model, "laplace_product", steps=60, checkpoint="kept.ckpt", seed=3)
    assert found.losses.tolist() == kept.losses.tolist()


def test_a_file_of_a_guide_that_is_not_registered_says_which(folder, theirs):
    spec, _ = theirs
    model = pages_model()
    vi.fit(model, "laplace_product", steps=20).save("guide.nc")
    vi.fit(model, "mean_field", objective="halfway", steps=20).save("objective.nc")
    guides.REGISTRY.remove("laplace_product")
    objectives.REGISTRY.remove("halfway")
    with pytest.raises(
        OptionError, match=r"guide\.nc has guide 'laplace_product', which is not registered: import"
    ):
        vi.load("guide.nc", model)
    assert vi.load("guide.nc", model, guide=spec()).spec == spec()
    with pytest.raises(OptionError, match=r"has objective 'halfway'.*@vi\.objectives\.register"):
        vi.load("objective.nc", model)


# -- bad registrations ------------------------------------------------------------------------


def made(base=guides.GuideSpec, frozen=True, **attributes):
    """A class of a guide, as somebody might write it."""
    own = {"name": "theirs", "about": ABOUT, "family": lambda self, dim: None, "__doc__": "Theirs."}
    cls = type("Theirs", (base,), {k: v for k, v in (own | attributes).items() if v is not None})
    return dataclass(frozen=True)(cls) if frozen else cls


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: 3, "it takes the class"),
        (guides.MeanField, "it takes the class"),
        (lambda: int, r"int is no guide: write class int\(vi\.guides\.GuideSpec\)"),
        (lambda: objectives.Elbo, r"Elbo is no guide"),
        (lambda: made(frozen=False), r"decorated with @dataclass\(frozen=True\)"),
        (lambda: made(name=None), 'needs a name, one word such as name = "my_guide"'),
        (lambda: made(name="two words"), "needs a name"),
        (lambda: made(about=None), r"needs an about = vi\.guides\.About\(does"),
        (lambda: made(name="auto"), "the name 'auto' is taken"),
        (lambda: made(name="full_rank"), "the name 'full_rank' is taken, of pyro_vi_kit"),
        (lambda: made(family=None), r"needs a family\(self, dim\), or a build\(self, density\)"),
        (lambda: made(methods=("newton",)), r"methods are some of lbfgs.*got \('newton',\)"),
        (lambda: made(after=3), "after is a guide's name, got 3"),
        (
            lambda: made(__annotations__={"size": "int"}),
            r"Theirs\(\) has to work, with a default for each option \(.*size",
        ),
    ],
)
def test_a_bad_guide_is_refused(folder, part, message):
    with pytest.raises(OptionError, match=message):
        guides.register(part())


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "Theirs lacks bound"),
        (
            {"bound": lambda self, log_w: log_w.mean(0), "particles": None},
            "needs an option particles",
        ),
        (
            {"bound": lambda self, log_w: log_w.mean(0), "estimators": ("best",)},
            r"estimators are some of pathwise.*got \('best',\)",
        ),
    ],
)
def test_a_bad_objective_is_refused(folder, attributes, message):
    own = {"family": None, "particles": 5, "__annotations__": {"particles": "int"}}
    if attributes.get("particles", 5) is None:
        own |= {"__annotations__": {}, "__post_init__": lambda self: None}
    with pytest.raises(OptionError, match=message):
        objectives.register(made(objectives.Objective, **(own | attributes)))


def test_the_same_class_may_be_registered_again(folder):
    first, again = made(), made()
    guides.register(first)
    assert guides.register(again) is again
    assert guides.REGISTRY["theirs"] is again
    with pytest.raises(UnknownNameError, match="unknown registered guide 'full_rank'"):
        guides.REGISTRY.remove("full_rank")


# -- entry points -----------------------------------------------------------------------------


def test_entry_points_are_found_and_broken_ones_told(folder, monkeypatch):
    points = {
        "pyro_vi_kit.guides": [
            EntryPoint("laplace_product", "laplace_product:LaplaceProduct", "pyro_vi_kit.guides"),
            EntryPoint("missing", "no_such_module:Guide", "pyro_vi_kit.guides"),
        ],
        "pyro_vi_kit.objectives": [
            EntryPoint("halfway", "halfway:Halfway", "pyro_vi_kit.objectives")
        ],
    }
    monkeypatch.setattr(registry, "entry_points", lambda group: points[group])
    monkeypatch.setattr(guides.REGISTRY, "_looked", False)
    monkeypatch.setattr(objectives.REGISTRY, "_looked", False)
    assert guides.REGISTRY["mean_field"] is guides.MeanField  # without a look at them
    with pytest.warns(
        RegistrationWarning, match=r"missing = no_such_module:Guide .* left out: Module"
    ):
        assert guides.specify("laplace_product").name == "laplace_product"
    assert objectives.make("halfway").weight == 0.5


# -- the command line -------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(main, [*arguments], catch_exceptions=False)


@pytest.mark.parametrize("how", ["a file", "a module", "by the model file"])
def test_the_command_line_takes_it(folder, how):
    imports = {"a file": ["laplace_product.py"], "a module": ["laplace_product"]}.get(how, [])
    if not imports:
        (folder / "model.py").write_text("import laplace_product\n" + MODEL, encoding="utf-8")
    asked = [part for each in imports for part in ("--import", each)]
    done = run(
        "fit", "model.py", "--guide", "laplace_product", "--steps", "200", "--json", *asked,
        "--guide-option", "init_scale=0.5", "--out", "fit.nc", "--quiet",
    )  # fmt: skip
    assert done.exit_code in (0, 3), done.output
    assert json.loads(done.stdout)["guide"] == "laplace_product"
    assert (folder / "fit.nc").exists()


def test_the_command_line_lists_it(folder):
    done = run("guides", "--json", "--import", "laplace_product.py")
    assert json.loads(done.stdout)["laplace_product"]["cost"] == "D"
    done = run("objectives", "--json", "--import", "halfway.py")
    assert json.loads(done.stdout)["halfway"]["estimators"] == "pathwise, score"
    done = run("guides", "--import", "no_such.py")
    assert done.exit_code == 2
    assert "no_such.py" in done.output


@pytest.mark.slow
def test_the_suite_takes_both(folder):
    done = run(
        "bench", "model.py", "--guides", "laplace_product", "--objectives", "halfway",
        "--import", "laplace_product.py", "--import", "halfway.py", "--out", "results", "--quiet",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (record,) = Path("results/model").glob("laplace_product-halfway-seed*.json")
    assert json.loads(record.read_text())["row"]["status"] == "done"


# -- Gaussians --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "own"), [("diagonal", "mean_field"), ("dense", "full_rank")])
def test_a_gaussian_that_says_so_is_fitted_by_lbfgs_and_has_a_linear_response(folder, kind, own):
    """In parameters of its own, it comes to the member that the package's guide comes to."""

    class Precision(vi.guides.GaussianFamily):
        gaussian = kind

        def __init__(self, dim):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(dim))
            self.root = torch.nn.Parameter(torch.eye(dim) if kind == "dense" else torch.ones(dim))

        def forward(self, context=None):
            if kind == "diagonal":
                return dist.Normal(self.loc, self.root.rsqrt()).to_event(1)
            return dist.MultivariateNormal(self.loc, precision_matrix=self.root @ self.root.T)

        @torch.no_grad()
        def start_from(self, loc, scale_tril):
            self.loc.copy_(loc)
            precision = torch.cholesky_inverse(scale_tril)
            dense = kind == "dense"
            self.root.copy_(torch.linalg.cholesky(precision) if dense else precision.diagonal())

        @torch.no_grad()
        def centre_on(self, loc):
            self.loc.copy_(loc)

    @vi.guides.register
    @dataclass(frozen=True)
    class ByPrecision(vi.guides.GuideSpec):
        """A normal by its precision."""

        name = "by_precision"
        about = ABOUT
        methods = ("lbfgs", "stochastic")

        def family(self, dim):
            return Precision(dim)

    model = pages_model()
    found, known = vi.fit(model, "by_precision", seed=0), vi.fit(model, own, seed=0)
    assert found.method == known.method == "lbfgs"
    # The same search on the same fixed draws; its result is written in other parameters.
    assert found.elbo == pytest.approx(known.elbo, abs=1e-6)
    ours, theirs = (each.linear_response(draws=64).summary() for each in (known, found))
    np.testing.assert_allclose(theirs["sd"], ours["sd"], rtol=1e-3)
