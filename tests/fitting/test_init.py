"""Starting points: values, functions of the site, and models that few points suit."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import initialization as pyros
from pyro.nn import PyroModule

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import ModelError, OptionError
from pyro_vi_kit.model.log_density import Density

Y = torch.tensor([0.5, -0.4])


def two_modes():
    """Modes at -2 and 2: a fit stays at the one where it starts."""
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    pyro.sample("y", dist.Normal(x.square(), 0.2), obs=torch.tensor(4.0))


def matrix(y):
    """Raises at the origin, where [[a, 1], [1, a]] has no Cholesky factor."""
    a = pyro.sample("a", dist.Normal(4.0, 0.3))
    ones = torch.ones(2, 2, dtype=a.dtype)
    covariance = ones + (a - 1) * torch.eye(2, dtype=a.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2, dtype=a.dtype), covariance), obs=y)


def logarithm(y):
    """NaN wherever a < 5."""
    a = pyro.sample("a", dist.Normal(9.0, 0.5))
    pyro.factor("f", (a - 5).log())
    pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def at(value):
    return lambda site: value if site["name"] == "x" else None


@pytest.mark.parametrize(
    "start",
    [
        at,
        lambda value: pyros.init_to_value(values={"x": torch.tensor(value)}),
        lambda value: pyros.init_to_generated(
            generate=lambda: pyros.init_to_value(values={"x": torch.tensor(value)})
        ),
        lambda value: {"x": value},
    ],
    ids=["function", "init_to_value", "init_to_generated", "dict"],
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_fit_starts_where_it_says(start, sign):
    posterior = vi.fit(vi.Model(two_modes), "full_rank", init=start(1.5 * sign), seed=0)
    assert (sign * posterior.sample(50, seed=0)["x"] > 1.5).all()


@pytest.mark.parametrize(
    ("name", "value"), [("median", 3.0), ("mean", 3.0), ("sample", 3.0), ("feasible", 0.0)]
)
@pytest.mark.parametrize("named", [False, True])
def test_pyros_functions(name, value, named):
    def model():
        pyro.sample("x", dist.Normal(3.0, 1e-3))
        pyro.sample("s", dist.HalfNormal(1.0))

    density = Density(vi.Model(model))
    function = getattr(pyros, f"init_to_{name}")
    found = density.unconstrain(function if named else function())
    assert float(found[0]) == pytest.approx(value, abs=0.01)
    posterior = vi.fit(vi.Model(model), init=name if named else function, seed=0)
    assert float(posterior.sample(10, seed=0)["x"].mean()) == pytest.approx(3.0, abs=0.01)


def test_a_function_sees_supports_that_follow_from_its_values():
    def model():
        a = pyro.sample("a", dist.LogNormal(2.0, 0.1))
        pyro.sample("b", dist.Uniform(0.0, a))

    density = Density(vi.Model(model))
    z = density.unconstrain(lambda site: 8.0 if site["name"] == "a" else site["fn"].mean)
    values = density.constrain(z.unsqueeze(0))
    assert float(values["a"]) == pytest.approx(8.0)
    assert float(values["b"]) == pytest.approx(4.0)


@pytest.mark.parametrize("init", [{"a": 4.0}, "mean", pyros.init_to_median])
def test_a_model_that_raises_at_the_origin(init):
    model = vi.Model(matrix, Y)
    with pytest.raises(ModelError, match=r"(?s)raised .*init="):
        vi.fit(model, seed=0)
    posterior = vi.fit(model, init=init, seed=0)
    # By quadrature.
    grid = torch.linspace(2.0, 6.0, 4001, dtype=torch.float64)
    up, down = (Y.double().sum() / 2**0.5), (Y.double()[0] - Y.double()[1]) / 2**0.5
    log_p = (
        dist.Normal(4.0, 0.3).log_prob(grid)
        + dist.Normal(0.0, (grid + 1).sqrt()).log_prob(up)
        + dist.Normal(0.0, (grid - 1).sqrt()).log_prob(down)
    )
    mean = float((log_p.softmax(0) * grid).sum())
    # 4,000 draws: four standard errors, and the guide's own error, which is small.
    assert abs(posterior.resample(4000, seed=0)["a"].mean() - mean) < 4 * 0.3 / 4000**0.5 + 0.005
    chains = vi.nuts(model, init=init, chains=2, draws=500, seed=0).posterior
    assert abs(float(chains.a.mean()) - mean) < 4 * 0.3 / 200**0.5


def test_a_density_that_is_not_finite_at_the_origin():
    """N(9, 0.5^2) times N(y; a, 1) times a - 5."""
    y = torch.tensor(9.0)
    posterior = vi.fit(vi.Model(logarithm, y), init={"a": 9.0}, seed=0)
    grid = torch.linspace(5.001, 13.0, 4001, dtype=torch.float64)
    log_p = dist.Normal(9.0, 0.2**0.5).log_prob(grid) + (grid - 5).log()
    mean = float((log_p.softmax(0) * grid).sum())
    assert abs(posterior.resample(4000, seed=0)["a"].mean() - mean) < 4 * 0.45 / 4000**0.5


def test_a_point_where_nothing_is_finite_is_refused():
    def above(y):
        a = pyro.sample("a", dist.Normal(9.0, 0.5))
        pyro.sample("y", dist.Pareto(a, 2.0), obs=y)

    with pytest.raises(ModelError, match=r"not finite near .* init= names \(site\(s\) y\)"):
        vi.fit(vi.Model(above, torch.tensor(9.0)), init={"a": 12.0}, seed=0)
    assert vi.fit(vi.Model(above, torch.tensor(20.0)), init={"a": 8.0}, seed=0).elbo < 0


def test_nuts_starts_as_near_as_the_model_needs():
    def model(y):
        a = pyro.sample("a", dist.Normal(4.0, 0.02))
        pyro.sample(
            "y", dist.Normal(0.0, torch.linalg.cholesky((a - 3.9).reshape(1, 1))[0, 0]), obs=y
        )

    chains = vi.nuts(
        vi.Model(model, torch.tensor(0.1)), init={"a": 4.0}, chains=2, draws=1000, seed=0
    ).posterior
    assert abs(float(chains.a.mean()) - 4.0) < 0.05


@pytest.mark.parametrize(
    ("init", "error", "match"),
    [
        (lambda site: 1 / 0, OptionError, "init= raised ZeroDivisionError at site 'x'"),
        (lambda site: "here", OptionError, "gives site 'x' a str"),
        (lambda site: torch.zeros(3), ModelError, r"'x' has shape \(\); .* has \(3,\)"),
        ({"z": 0.0}, ModelError, "no latent site named 'z'"),
        ("mode", OptionError, "must be 'auto', 'origin', 'median'"),
        (3, OptionError, "a function of the site such as"),
    ],
)
def test_what_is_no_start_is_refused(init, error, match):
    with pytest.raises(error, match=match):
        vi.fit(vi.Model(two_modes), init=init, seed=0)


def test_nuts_refuses_what_is_no_start():
    with pytest.raises(OptionError, match="init= must be 'auto', 'median'"):
        vi.nuts(vi.Model(two_modes), init="origin")


def test_a_guide_of_the_users_has_a_start_of_its_own():
    with pytest.raises(OptionError, match="init_loc_fn="):
        vi.fit(
            vi.Model(two_modes), pyro.infer.autoguide.AutoNormal(two_modes), init={"x": 1.0}, seed=0
        )


def rows(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)) as i:
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])


@pytest.mark.parametrize("options", [{"guide": "amortized"}, {"batch_size": 1}])
def test_a_guide_takes_of_a_function_what_it_can_hold(options):
    posterior = vi.fit(vi.Model(rows, Y), init="median", steps=20, seed=0, **options)
    assert posterior.elbo < 0
    # One step of it: the globals begin where they are told to.
    init = {"m": 3.0} if "guide" in options else "median"
    vi.fit(vi.Model(rows, Y), init=init, steps=20, seed=0, **options)


def test_a_guide_that_is_built_and_guide_auto():
    model = vi.Model(two_modes)
    built = vi.guides.make("full_rank", model, dtype=torch.float64)
    assert (vi.fit(model, built, init=at(-1.5), seed=0).sample(50, seed=0)["x"] < -1.5).all()
    assert vi.fit(model, "auto", init=at(-1.5), budget=5.0, seed=0).elbo < 0


def test_a_pyro_module_starts_there_too():
    class Flat(PyroModule):
        def forward(self, y):
            matrix(y)

    assert vi.fit(vi.Model(Flat(), Y), init={"a": 4.0}, seed=0).verdict.level == "good"


def test_what_comes_after_a_fit_starts_there_too(tmp_path):
    model = vi.Model(matrix, Y)
    posterior = vi.fit(model, "mean_field", init="median", steps=20, seed=0)
    posterior.save(tmp_path / "a.nc")
    loaded = vi.load(tmp_path / "a.nc", model)
    assert loaded.elbo == posterior.elbo
    assert math.isfinite(vi.fit(model, resume=loaded, steps=10).elbo)
    assert math.isfinite(float(posterior.to_arviz().log_likelihood["y"].mean()))

    def by_rows(y):
        a = pyro.sample("a", dist.Normal(4.0, 0.3))
        with pyro.plate("datum", len(y)) as i:
            factor = torch.linalg.cholesky((a - 1.0).reshape(1, 1))[0, 0]
            pyro.sample("y", dist.Normal(0.0, factor), obs=y[i])

    posterior = vi.fit(vi.Model(by_rows, Y), init={"a": 4.0}, batch_size=1, steps=20, seed=0)
    assert math.isfinite(posterior.elbo)
