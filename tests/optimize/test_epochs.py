"""Training by epochs: the schedule, the early stop, what is kept, and the bound on data held out."""

from __future__ import annotations

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from toys import load, local_and_global_model, local_model, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import OptionError, UnknownNameError
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo, Iwae
from pyro_vi_kit.optimize.engines import Window
from pyro_vi_kit.optimize.result import Budget
from pyro_vi_kit.optimize.stochastic import by_epochs
from pyro_vi_kit.optimize.stochastic.by_epochs import Course
from pyro_vi_kit.optimize.stochastic.validation import HeldOut, Validation

# -- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1"),
        ({"epochs": True}, "epochs must be"),
        ({"rate": 0.0}, "rate must be a positive number"),
        ({"clip": math.nan}, "clip must be a positive number"),
        ({"warmup": 1.0}, "warmup must be a share"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"precision": "bf16"}, "unknown precision"),
        ({"validation": torch.zeros(3)}, "must be a tuple of the model's arguments"),
        ({"patience": 3}, "give validation="),
        ({"patience": 0, "validation": ()}, "patience must be"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        vi.Epochs(**options)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.0]),
        ("cosine", [1.0, 0.5 + 0.25 * math.sqrt(2), 0.0]),
        (lambda share: 0.1**share, [1.0, 0.1**0.25, 0.1]),
    ],
)
def test_schedules(schedule, expected):
    plan = vi.Epochs(schedule=schedule)
    assert [plan.factor(share) for share in (0.0, 0.25, 1.0)] == pytest.approx(expected)
    warm = vi.Epochs(schedule=schedule, warmup=0.5)
    assert [warm.factor(share) for share in (0.0, 0.25, 1.0)] == pytest.approx(
        [0.0, 0.5 * expected[1], expected[2]]
    )


@pytest.mark.parametrize("wrong", [lambda share: -1.0, lambda share: None, lambda share: math.inf])
def test_a_schedule_that_gives_no_factor_is_refused(wrong):
    with pytest.raises(OptionError, match="must give a factor of at least 0"):
        vi.Epochs(schedule=wrong).factor(0.5)


# -- the loop, on an engine without a model ---------------------------------------------------


class Walk:
    """An engine whose parameter counts the steps; the bound is minus its distance from a goal."""

    name = "toy"
    particles = 2

    def __init__(self, goal=0.0):
        self.x = torch.zeros(1)
        self.skipped = 0
        self.rates = []
        self.lengths = []
        self._goal = goal

    def run(self, steps, rate):
        self.rates.append(rate)
        self.lengths.append(steps)
        walked = self.x + torch.arange(1.0, steps + 1)
        self.x = walked[-1:].clone()
        return Window(-(walked - self._goal).abs().double(), {"x": walked.mean().reshape(1)})

    def scale_rates(self, factor):
        return None

    def parameters(self):
        return {"x": self.x}

    def evaluate(self, replicates):
        return -(self.x - self._goal).abs().expand(replicates)


def train(engine, plan, *, steps=100, validate=None, budget=None, **options):
    course = Course(plan, rate=0.1, steps=steps, validate=validate, **options)
    progress = Progress("", enabled=False)
    return by_epochs.fit(engine, course, budget=budget or Budget(), progress=progress)


def test_short_runs_follow_the_schedule():
    engine = Walk()
    outcome, bound = train(engine, vi.Epochs(3, schedule="linear"), rows=10)
    assert engine.lengths == [1, 2, 4, 8, 16, 32, 37, 64, 36, 64, 36]
    middles = np.cumsum(engine.lengths) - 0.5 * np.array(engine.lengths)
    assert engine.rates == pytest.approx(0.1 * (1.0 - middles / 300))
    assert outcome.status.reason == "converged"
    assert "Trained for 3 epochs" in outcome.status.advice
    assert len(outcome.losses) == 300
    assert outcome.evaluations == 600
    # The last epoch's iterates are 201 ... 300.
    assert float(engine.x) == pytest.approx(250.5)
    assert bound == pytest.approx(-250.5)
    assert outcome.history["epoch"] == [1, 2, 3]
    assert outcome.history["bound"] == pytest.approx([-5.05, -15.05, -25.05])
    assert outcome.history["rate"] == pytest.approx([engine.rates[i] for i in (6, 8, 10)])
    assert all(math.isnan(value) for value in outcome.history["validation"])


def test_an_early_stop_keeps_the_best_epoch():
    engine = Walk()
    plan = vi.Epochs(50, validation=(), patience=3)
    # Best at 250 steps: the second and the third epoch are equally near, and the first of them stays.
    outcome, _ = train(engine, plan, validate=lambda: HeldOut(-abs(float(engine.x) - 250.0), 0.5))
    assert float(engine.x) == 200.0
    assert outcome.history["validation"] == [-150, -50, -50, -150, -250]
    assert outcome.status.converged
    assert outcome.status.advice == (
        "Stopped early in epoch 5. The parameters of epoch 2 are kept: validation bound -50 nats (s.e. "
        "0.5 over rows)."
    )


def test_epochs_that_are_still_rising_say_so():
    engine = Walk()
    outcome, _ = train(
        engine, vi.Epochs(4, validation=()), validate=lambda: HeldOut(float(engine.x), 0.1)
    )
    assert float(engine.x) == 400.0
    assert "It was still rising: more epochs may help" in outcome.status.advice


def test_steps_and_time_run_out():
    engine = Walk()
    outcome, _ = train(engine, vi.Epochs(4), max_steps=150)
    assert outcome.status.reason == "budget"
    assert "The number of steps ran out after 1 of 4 epochs" in outcome.status.advice
    assert len(outcome.losses) == 150
    # The first epoch was the last whole one.
    assert float(engine.x) == pytest.approx(50.5)
    engine = Walk()
    outcome, _ = train(engine, vi.Epochs(4), budget=Budget.of_seconds(-1))
    assert "The budget ran out after 0 of 4 epochs. No epoch was finished" in outcome.status.advice
    assert len(outcome.losses) == 1
    assert float(engine.x) == 1.0


def test_an_interrupt_keeps_the_last_whole_epoch():
    engine = Walk()
    run = engine.run

    def interrupted(steps, rate):
        if len(engine.rates) == 10:
            raise KeyboardInterrupt
        return run(steps, rate)

    engine.run = interrupted
    outcome, _ = train(engine, vi.Epochs(4))
    assert outcome.status.reason == "interrupted"
    assert outcome.status.advice.startswith("Interrupted in epoch 3. The iterates of epoch 2")
    assert float(engine.x) == pytest.approx(150.5)


def test_an_epoch_of_skipped_steps_diverges_and_keeps_the_one_before():
    engine = Walk()
    run = engine.run

    def failing(steps, rate):
        if float(engine.x) >= 100:
            engine.skipped += steps
        return run(steps, rate)

    engine.run = failing
    outcome, _ = train(engine, vi.Epochs(4))
    assert outcome.status.reason == "diverged"
    assert "in epoch 2 (100 steps skipped)" in outcome.status.advice
    assert "clip=1.0" in outcome.status.advice
    assert float(engine.x) == pytest.approx(50.5)


def test_a_validation_bound_that_is_nan_diverges():
    outcome, _ = train(Walk(), vi.Epochs(4, validation=()), validate=lambda: HeldOut(math.nan, 0.0))
    assert outcome.status.reason == "diverged"


# -- the bound on data held out ---------------------------------------------------------------


class ExactEncoder(nn.Module):
    """The posterior of `local_normals`: N(y / 2, 1 / 2)."""

    def forward(self, y):
        return y / 2, torch.full_like(y, math.sqrt(0.5))


@pytest.mark.parametrize("objective", [Elbo(1), Iwae(3)])
def test_with_the_exact_posterior_it_is_the_evidence_of_each_row(objective, monkeypatch):
    monkeypatch.setattr("pyro_vi_kit.optimize.stochastic.validation._ROWS", 4)
    held = local_model(n=9, seed=5).args[0]
    guide = guides.make("amortized", Density(local_model(n=6)), encoder=ExactEncoder())
    found = Validation(guide, objective, (held,))({})
    rows = (-0.25 * held**2 - 0.5 * math.log(4 * math.pi))[:, 0]
    assert found.bound == pytest.approx(float(rows.mean()), abs=1e-12)
    assert found.se == pytest.approx(float(rows.std()) / 3.0)


def test_what_rows_share_does_not_count():
    """The KL of the global m is a nat and more; the bound of a row given m is what is told."""
    model = local_and_global_model(n=4)
    guide = guides.make("amortized", Density(model))
    validation = Validation(guide, Elbo(1), model.args)
    with torch.no_grad():
        guide.families["global"].log_scale.fill_(-12.0)
        guide.families["local"].source.layers[-1].weight.zero_()
    # q(z) = N(b, e^2s) at every row, m = 0: E log N(z; 0, 1) N(y; z, 1) / q(z), with b = s = 0.
    y = model.args[0]
    expected = (-0.5 * math.log(2 * math.pi) - 0.5 * (y**2 + 1)).mean()
    # A draw's log weight is -z^2 / 2 + y z + ...: its sd is below 3, over 4 rows and 8 draws.
    assert validation({}).bound == pytest.approx(float(expected), abs=4 * 3 / math.sqrt(32))
    assert validation({}) == validation({})


def one_mean(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def test_of_a_global_guide_it_is_the_mean_log_likelihood_of_a_row():
    held = torch.tensor([0.5, 2.0, -1.0, 0.3, 1.1], dtype=torch.float64)
    guide = guides.make("mean_field", Density(vi.Model(one_mean, torch.ones(3))), init_scale=0.2)
    with torch.no_grad():
        guide.families[guide.blocks[0].name].loc.fill_(0.4)
    found = Validation(guide, Elbo(1), (held,))({})
    exact = -0.5 * math.log(2 * math.pi) - 0.5 * ((held - 0.4) ** 2 + 0.04)
    # Over 64 draws: the mean's slope is mean(held) - 0.4 = 0.18, times 0.2 / 8, and 0.02 * sqrt(2) / 8.
    assert found.bound == pytest.approx(float(exact.mean()), abs=4 * math.hypot(0.0045, 0.0036))


@pytest.mark.parametrize(
    ("model", "guide", "validation", "words"),
    [
        (two_scales_model(), "full_rank", (), "cannot be run on validation="),
        (two_scales_model(), "full_rank", (torch.ones(4, 3), "x"), "cannot be run on validation="),
        (local_model(n=6), "full_rank", (torch.ones(4, 1),), "guide='amortized' only"),
    ],
)
def test_data_that_cannot_be_validated_on_are_refused_at_once(
    model, guide, validation, words, monkeypatch
):
    monkeypatch.setattr(by_epochs, "fit", None)
    with pytest.raises(OptionError, match=words):
        vi.fit(model, guide, epochs=vi.Epochs(5, validation=validation), seed=0)


# -- through fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs= must be an integer"),
        ({"epochs": 2.5}, "epochs= must be an integer"),
        ({"epochs": 5, "method": "lbfgs"}, "leave out method='lbfgs'"),
        ({"epochs": 5, "engine": "pyro"}, "leave out engine='pyro'"),
        (
            {"epochs": vi.Epochs(5, rate=0.1), "optimizer": torch.optim.SGD},
            "leave rate= out",
        ),
        ({"epochs": vi.Epochs(5, precision="bfloat16")}, "give dtype=torch.float32"),
    ],
)
def test_what_does_not_go_with_epochs_is_refused(options, words):
    with pytest.raises(OptionError, match=words):
        vi.fit(two_scales_model(), "full_rank", **options)


def test_an_unknown_schedule_is_one_of_the_known_errors():
    with pytest.raises(UnknownNameError):
        vi.Epochs(schedule="step")


def test_it_finds_the_posterior_of_each_row():
    """An encoder for 200 rows of a model whose posterior it can say exactly."""
    model, held = local_model(n=200), local_model(n=100, seed=1).args[0]
    plan = vi.Epochs(40, validation=(held,), clip=100.0)
    posterior = vi.fit(model, "amortized", Elbo(4), epochs=plan, batch_size=20, seed=0)
    history = posterior.history
    assert list(history.columns) == ["epoch", "seconds", "rate", "bound", "validation"]
    assert history.epoch.tolist() == list(range(1, len(history) + 1))
    assert history.seconds.is_monotonic_increasing
    assert len(posterior.losses) == 10 * len(history)
    evidence = float((-0.25 * held**2 - 0.5 * math.log(4 * math.pi)).mean())
    # At the optimum weights are even: what is left is the KL of a row, and no noise to speak of.
    assert evidence - 0.05 < history.validation.max() < evidence + 0.02
    assert history.bound.iloc[-1] > history.bound.iloc[0]


def test_the_history_is_exported_saved_and_added_up(tmp_path):
    model = two_scales_model()
    first = vi.fit(model, "mean_field", epochs=2, seed=0)
    assert first.method == "stochastic"
    trace = first.to_arviz(10, seed=0).loss_trace
    assert trace["bound"].dims == ("epoch",)
    assert trace["loss"].dims == ("step",)
    assert np.array_equal(trace["rate"], first.history["rate"])
    path = first.save(tmp_path / "first.nc", draws=10)
    assert vi.load(path, model).history.equals(first.history)
    second = vi.fit(model, resume=path, epochs=1)
    assert second.history.epoch.tolist() == [1, 2, 3]
    assert second.history.seconds.is_monotonic_increasing
    third = vi.fit(model, resume=second, method="stochastic", steps=10)
    assert third.history.equals(second.history)
    assert vi.fit(model, "mean_field", seed=0).history.empty


def test_the_users_optimiser_follows_the_schedule():
    optimizer = functools.partial(torch.optim.SGD, lr=1e-3)
    posterior = vi.fit(
        two_scales_model(),
        "mean_field",
        epochs=vi.Epochs(2, schedule="linear"),
        optimizer=optimizer,
        seed=0,
    )
    # The last runs of the epochs of 100 steps end there, and are 37 and 36 long.
    expected = [1e-3 * (1 - (100 - 18.5) / 200), 1e-3 * (1 - (200 - 18) / 200)]
    assert posterior.history.rate.tolist() == pytest.approx(expected)


def test_finished_epochs_are_lines_where_nobody_watches(capfd):
    vi.fit(two_scales_model(), "mean_field", epochs=2, seed=0, progress=True)
    lines = capfd.readouterr().err
    assert "epoch 1/2: bound" in lines
    assert "epoch 2/2: bound" in lines
    vi.fit(two_scales_model(), "mean_field", epochs=1, seed=0, progress=False)
    assert capfd.readouterr().err == ""


# -- a variational autoencoder ----------------------------------------------------------------


@pytest.mark.slow
def test_a_vae_overfits_without_validation_and_stops_early_with_it():
    """150 digits to train on and 360 held out: the s.e. of the latter's bound is below 0.3."""
    pytest.importorskip("sklearn")
    zoo = load("vae")
    model = zoo.MODEL.with_args(zoo.DIGITS[:150])
    options = {"schedule": "constant", "rate": 0.005, "validation": (zoo.TEST,)}
    fit = functools.partial(vi.fit, model, "amortized", Elbo(1), batch_size=50, seed=0)
    through = fit(epochs=vi.Epochs(300, patience=300, **options)).history
    assert through.bound.iloc[-1] > through.bound.iloc[100] + 1.0
    assert through.validation.iloc[-1] < through.validation.max() - 1.0
    stopped = fit(epochs=vi.Epochs(300, patience=10, **options))
    assert stopped.status.advice.startswith("Stopped early")
    assert len(stopped.history) < 200
    best = int(stopped.history.validation.idxmax())
    assert len(stopped.history) - best == 11
    validation = Validation(stopped.approximation.guide, Elbo(1), (zoo.TEST,))
    held = validation(stopped.approximation.params)
    assert held.bound == pytest.approx(stopped.history.validation.max())


@pytest.mark.slow
def test_mixed_precision_trains_the_vae_as_well():
    pytest.importorskip("sklearn")
    zoo = load("vae")
    bounds = []
    for precision in (None, "bfloat16"):
        plan = vi.Epochs(8, precision=precision, validation=(zoo.TEST,))
        fit = vi.fit(zoo.MODEL, "amortized", Elbo(1), batch_size=100, epochs=plan, seed=0)
        assert fit.engine == "captured"
        assert fit.parameters["decoder$$$0.weight"].dtype == np.float32
        bounds.append(fit.history.validation.iloc[-1])
    assert bounds[0] != bounds[1]
    # Both start at -44; casts have 8 bits, an error of 0.4 % of each pixel's logit.
    assert bounds[0] == pytest.approx(bounds[1], abs=0.3)
    assert min(bounds) > -30
