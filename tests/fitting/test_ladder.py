"""`guide="auto"`: when it goes on, what it takes, what it says, and that its time is kept."""

import copy
import json
import math
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from toys import MODELS, gaussian, load, local_model, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.cli import main
from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.fitting import auto
from pyro_vi_kit.fitting.request import checked
from pyro_vi_kit.guides import AffineCoupling
from pyro_vi_kit.guides.flows.coupling import CouplingFlow
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.posterior.diagnostics.verdict import Verdict
from pyro_vi_kit.posterior.record import Record
from pyro_vi_kit.validation.suite import obstacle

COLUMNS = ["rung", "guide", "elbo", "khat", "verdict", "seconds", "chosen", "ended"]


class Scripted:
    """Posteriors that say what they are told to, guide by guide."""

    def __init__(self, script, dim=3):
        self.script, self.asked = list(script), []
        self.density = Density(gaussian(dim)[0])

    def __call__(self, candidate):
        spec, density = candidate.spec, self.density
        self.asked.append(candidate)
        level, elbo, khat, *rest = self.script.pop(0)
        if level == "raise":
            raise KeyboardInterrupt
        reason, modes = (*rest, "converged", 1)[:2] if rest else ("converged", 1)
        status = Status(reason == "converged", reason, "", modes=modes)
        record = Record(vi.objectives.Elbo(), "lbfgs", "eager", status, np.zeros(4), 10, 0.1, 0)
        guide = guides.make(spec, density)

        class Told:
            verdict = Verdict(level, (), "")

        told = Told()
        told.__dict__ |= {"spec": spec, "status": status, "record": record, "elbo": elbo}
        told.__dict__ |= {"khat": khat, "evaluations": 10, "losses": record.losses}
        told.approximation = type("Approximation", (), {"guide": guide})
        return told

    def climb(self, budget=None):
        request = checked(self.density.model, budget=budget, seed=0, progress=False)
        return auto.search(request, self.density, "auto", self)

    @property
    def names(self):
        return [candidate.spec.name for candidate in self.asked]


def chosen(posterior):
    return next(rung for rung in posterior.record.ladder if rung.chosen)


# -- when to go on ----------------------------------------------------------------------------


def test_a_good_gaussian_ends_it():
    script = Scripted([("good", -1.0, 0.3)])
    assert chosen(script.climb()).guide == "full_rank"
    assert script.names == ["full_rank"]


def test_mixtures_are_next_where_there_are_two_modes():
    """A guide that leaves one out is rejected: the verdict knows of them."""
    script = Scripted([("reject", -1.7, 0.3, "converged", 2), ("good", -1.0, 0.3)])
    assert chosen(script.climb()).guide == "mixture"
    assert script.names == ["full_rank", "mixture"]


def test_modes_are_looked_for_once_for_all_rungs():
    script = Scripted([("reject", -1.7, 0.9, "converged", 2), *3 * [("reject", -1.0, 0.9)]])
    script.climb()
    found = [candidate.found for candidate in script.asked]
    assert found[0] is None
    assert len({id(each) for each in found[1:]}) == 1
    assert found[1].modes


def test_it_climbs_to_the_top_while_guides_are_rejected_and_takes_the_highest_bound():
    levels = [("reject", -3.0, 1.0), ("reject", -1.5, 1.0), ("reject", -2.0, 1.0)]
    script = Scripted([*levels, ("reject", -1.8, 1.0)])
    posterior = script.climb()
    assert script.names == ["full_rank", "affine_coupling", "mixture", "affine_coupling"]
    assert chosen(posterior).elbo == -1.5
    assert [rung.chosen for rung in posterior.record.ladder] == [False, True, False, False]
    assert posterior.record.evaluations == 40


def test_the_verdict_comes_before_the_bound():
    script = Scripted([("resample", -3.0, 0.6), ("reject", -1.0, 1.0), ("good", -2.0, 0.3)])
    assert chosen(script.climb()).verdict == "good"
    assert len(script.asked) == 3


def test_where_resampling_is_safe_one_richer_guide_is_tried_and_no_more():
    script = Scripted([("resample", -1.0, 0.4), ("resample", -0.9, 0.4)])
    assert chosen(script.climb()).guide == "affine_coupling"
    assert len(script.asked) == 2


def test_where_it_is_not_all_are():
    levels = [("resample", -1.0 - i, 0.65) for i in range(4)]
    assert chosen(Scripted(levels).climb()).guide == "full_rank"


def test_many_dimensions_begin_with_mean_field(monkeypatch):
    monkeypatch.setattr(auto, "_work_per_step", lambda trials, spec: 1e-3)
    script = Scripted([("reject", -2.0, 1.0), ("reject", -1.0, 1.0)], dim=1)
    script.density = replace_dim(script.density, 1500)
    script.climb()
    assert script.names == ["mean_field", "low_rank"]


def replace_dim(density, dim):
    """The same model, said to be of so many dimensions: only the choice of guides looks at them."""

    other = copy.copy(density)
    other.dim = dim
    return other


def test_one_dimension_has_no_flow():
    script = Scripted([("reject", -2.0, 1.0), ("reject", -1.0, 1.0)], dim=1)
    script.climb()
    assert script.names == ["full_rank", "mixture"]


# -- time and interruption --------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 60.0])
def test_a_rung_that_is_not_affordable_is_left_out_and_said(monkeypatch, budget):
    monkeypatch.setattr(auto, "_work_per_step", lambda trials, spec: 1.0)
    monkeypatch.setattr(auto, "WORK", 60.0)
    posterior = Scripted([("reject", -1.0, 1.0)]).climb(budget)
    first, *others = posterior.record.ladder
    assert first.chosen
    assert len(others) == 3
    needed = [rung.ended.partition(" s, ")[0] for rung in others]
    assert needed == [f"not tried: needs about {n}" for n in (300, 100, 300)]
    assert "not tried" in str(others[0])


def test_deadlines_leave_time_for_what_comes_after():
    script = Scripted([("reject", -1.0, 1.0)] * 4)
    started = time.monotonic()
    script.climb(budget=100.0)
    ends = [candidate.budget.deadline - started for candidate in script.asked]
    assert ends[0] == pytest.approx(50.0, abs=3.0)
    # The last has all that is left but for the reserve; what the scripted rungs took is next to nothing.
    assert 75.0 < ends[1] < 90.0 < ends[-1] < 100.0


def test_an_interruption_returns_the_best_so_far():
    posterior = Scripted([("reject", -1.0, 1.0), ("raise", 0.0, 0.0)]).climb()
    assert chosen(posterior).guide == "full_rank"
    assert posterior.record.status.reason == "interrupted"


def test_an_interrupted_rung_counts_where_it_is_the_best():
    script = Scripted([("reject", -2.0, 1.0), ("resample", -1.0, 0.6, "interrupted", 1)])
    posterior = script.climb()
    assert chosen(posterior).guide == "affine_coupling"
    assert posterior.record.status.reason == "interrupted"
    assert len(script.asked) == 2


def test_an_interruption_of_the_first_rung_goes_through():
    with pytest.raises(KeyboardInterrupt):
        Scripted([("raise", 0.0, 0.0)]).climb()


# -- where rungs start ------------------------------------------------------------------------


def test_rungs_start_from_what_is_below():
    script = Scripted([("reject", -1.0, 1.0)] * 4)
    script.climb()
    below = [candidate.warm_start for candidate in script.asked]
    assert below[0] is None
    names = ["full_rank", "full_rank", "affine_coupling"]
    assert [guide.name for guide in below[1:]] == names


@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("hidden", [(4,), (4, 3)])
def test_a_larger_flow_begins_as_the_smaller_one(dim, hidden):
    """The same density at any point, though its new layers permute what comes first."""
    torch.manual_seed(0)
    wider = tuple(width + 3 for width in hidden)
    small = AffineCoupling(layers=4, hidden=hidden).family(dim).double()
    large = AffineCoupling(layers=8, hidden=wider).family(dim).double()
    assert isinstance(small, CouplingFlow)
    with torch.no_grad():
        for parameter in (*small.parameters(), *large.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    large.extend(small)
    points = torch.randn(20, dim, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(large().log_prob(points), small().log_prob(points))


# -- a whole climb ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def switched():
    return vi.fit(load("label_switching").MODEL, "auto", seed=0)


def test_a_fit_has_the_ladder_in_everything_that_tells_of_it(switched, tmp_path):
    frame = switched.ladder
    assert list(frame.columns) == COLUMNS
    assert frame["guide"].tolist() == ["full_rank", "mixture(components=2)"]
    assert frame["chosen"].tolist() == [False, True]
    assert frame["rung"].tolist() == [1, 2]
    assert switched.seconds >= frame["seconds"].sum()
    assert "climbed  full_rank (" in repr(switched)
    assert switched.attrs(0)["ladder"].startswith("full_rank (")
    path = switched.save(tmp_path / "fit.nc", draws=20)
    loaded = vi.load(path, switched.model)
    assert loaded.record.ladder == switched.record.ladder
    assert loaded.elbo == switched.elbo
    assert loaded.to_arviz(5).attrs["ladder"] == switched.attrs(0)["ladder"]


def test_a_named_guide_has_no_ladder():
    posterior = vi.fit(two_scales_model(), "full_rank", seed=0)
    assert posterior.ladder.empty
    assert list(posterior.ladder.columns) == COLUMNS
    assert "climbed" not in repr(posterior)


def test_a_budget_is_kept_and_a_flow_starts_from_the_gaussian():
    """Eight schools, centred: rejected for any Gaussian, and no flow is trained in a second."""
    posterior = vi.fit(load("eight_schools_centered").MODEL, "auto", seed=0, budget=3.0)
    rungs = posterior.record.ladder
    assert rungs[0].guide == "full_rank"
    assert rungs[0].verdict == "reject"
    assert len(rungs) > 1
    assert posterior.elbo >= rungs[0].elbo - 0.1
    assert math.isfinite(posterior.elbo)
    assert "budget=3 s was held against the clock" in posterior.status.notes[-1]


def test_the_same_seed_gives_the_same_numbers_on_a_slow_and_on_a_fast_machine(monkeypatch):
    """What is left for a flow is less than it would take, and that is counted and not timed."""
    monkeypatch.setenv("PYRO_VI_KIT_COMPILE", "off")
    monkeypatch.setattr(auto, "WORK", 0.6)
    clocks = {name: getattr(time, name) for name in ("monotonic", "perf_counter")}

    def fitted(pace):
        for name, real in clocks.items():
            monkeypatch.setattr(time, name, lambda real=real: pace * real())
        return vi.fit(load("eight_schools_centered").MODEL, "auto", seed=0)

    slow, fast = fitted(1e3), fitted(1e-3)
    rungs = slow.record.ladder
    assert [rung.ended for rung in fast.record.ladder] == [rung.ended for rung in rungs]
    assert rungs[1].guide == "affine_coupling"
    assert rungs[1].ended == "budget"
    assert slow.elbo == fast.elbo
    assert np.array_equal(slow.losses, fast.losses)
    assert slow.evaluations == fast.evaluations


def test_parameters_of_the_model_are_learned_anew_on_each_rung():
    """The first rung's, which are those of another optimum, stay as they were."""
    import pyro
    import pyro.distributions as dist

    def learned(y):
        sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(y)):
            pyro.sample("y", dist.Normal(m, sd), obs=y)

    model = vi.Model(learned, torch.tensor([0.3, 1.0, -0.5, 0.2]))
    posterior = vi.fit(model, "auto", seed=0, budget=20)
    assert posterior.parameters["sd"] > 0
    assert posterior.ladder["chosen"].sum() == 1


# -- refusals and names -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"steps": 10}, "steps"),
        ({"batch_size": 2}, "batch_size"),
        ({"method": "stochastic"}, "method"),
        ({"engine": "pyro"}, "engine"),
        ({"objective": "iwae"}, "objective"),
        ({"optimizer": torch.optim.Adam}, "optimizer"),
        ({"epochs": 3}, "epochs"),
        ({"checkpoint": "fit.ckpt"}, "checkpoint"),
        ({"resume": "fit.nc"}, "resume"),
    ],
)
def test_options_of_one_guide_are_refused(options, name):
    with pytest.raises(OptionError, match=rf"guide='auto' tries several.*{name}=: leave it out"):
        vi.fit(local_model(), "auto", seed=0, **options)


def test_streamed_data_are_refused():
    def model(y):
        raise AssertionError("is not run")

    rows = torch.utils.data.TensorDataset(torch.zeros(10))
    with pytest.raises(OptionError, match="these are streamed: name the guide"):
        vi.fit(vi.Model(model, rows), "auto", seed=0)


def test_it_is_listed_and_is_no_guide_to_build():
    assert "auto" in guides.choices()
    assert "auto" not in guides.names()
    density = Density(two_scales_model())
    assert obstacle(density, "auto", "elbo") is None
    assert "does not go with objective=" in obstacle(density, "auto", "iwae")


def test_the_command_line_takes_it(tmp_path):
    line = str(MODELS / "gaussian_regression.py")
    run = CliRunner().invoke(main, ["fit", line, "--guide", "auto", "--json", "--quiet"])
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    assert document["ladder"][0]["guide"] == "full_rank"
    assert document["ladder"][0]["chosen"] is True
    wrong = ["fit", line, "--guide", "auto", "--guide-option", "layers=4"]
    assert CliRunner().invoke(main, wrong).exit_code == 2
    out = str(tmp_path / "out")
    bench = ["bench", line, "--guides", "auto", "--no-nuts", "--out", out, "--quiet"]
    run = CliRunner().invoke(main, bench)
    assert run.exit_code == 0, run.output
    assert "auto" in (tmp_path / "out" / "results.csv").read_text()
