"""Streamed data: the same terms, bounds and posteriors as in memory, batch by batch."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import ModelError, OptionError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.guides.local.streamed import weigh_all
from pyro_vi_kit.model.data import Stream
from pyro_vi_kit.model.data.order import Order
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo, Iwae
from pyro_vi_kit.optimize.engines import CapturedEngine, EagerEngine, StreamedBatches

N, COLUMNS = 600, 3


def data(rows=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, COLUMNS, generator=generator, dtype=torch.float64)
    noise = 0.5 * torch.randn(rows, generator=generator, dtype=torch.float64)
    return x, x.sum(-1) + 0.3 + noise


def linear(x, y, sd=0.5):
    """A conjugate regression on a batch, or on all rows."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[-1]), 2.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(x)) as i:
        pyro.sample("y", dist.Normal(x[i] @ w + b, sd), obs=y[i])


def posterior_of(x, y, sd=0.5):
    """Mean and covariance of (w, b)."""
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], -1)
    precision = design.T @ design / sd**2 + torch.eye(COLUMNS + 1, dtype=x.dtype) / 4.0
    covariance = torch.linalg.inv(precision)
    return covariance @ (design.T @ y) / sd**2, covariance


def gaussian_of(fit):
    with torch.no_grad():
        return fit.approximation.guide.families["latent"]()


def points(draws=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(draws, COLUMNS + 1, generator=generator, dtype=torch.float64)


class Indexed(Dataset):
    """Rows one by one; counts how often it was asked."""

    def __init__(self, x, y):
        self.x, self.y, self.calls = x, y, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if not isinstance(i, int):
            raise TypeError(type(i).__name__)
        self.calls += 1
        return self.x[i], self.y[i]


class Mapped(Dataset):
    """Arrays of a file, indexed by numbers or by arrays of numbers."""

    def __init__(self, path, x, y):
        self.table = np.memmap(path, dtype=np.float32, mode="w+", shape=(len(x), COLUMNS + 1))
        self.table[:] = torch.cat([x, y[:, None]], -1).float().numpy()
        self.single = 0

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i):
        self.single += isinstance(i, int)
        return self.table[i, :-1], self.table[i, -1]


class Whole(Dataset):
    """Whole batches as a dict."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitems__(self, rows):
        return {"y": self.y[rows], "x": self.x[rows]}


class Rows(IterableDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


def sources(tmp_path=None):
    x, y = data()
    table = TensorDataset(x, y)
    return {
        "tensors": (table, None),
        "rows": (Indexed(x, y), None),
        "whole": (Whole(x, y), None),
        "loader": (DataLoader(table, batch_size=100, shuffle=True), None),
        "sequential loader": (DataLoader(table, batch_size=70), None),
        "iterable loader": (DataLoader(Rows(x, y), batch_size=100), N),
    }


# -- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 7, 65_536, 65_537, 200_003])
def test_an_order_has_every_row_once(rows):
    order = Order(rows, seed=3, epoch=1)
    parts = [order.rows_at(i, min(i + 4096, rows)) for i in range(0, rows, 4096)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(rows))


def test_a_network_shuffles_as_well_as_a_drawn_permutation():
    rows, size = 200_000, 1000
    found = Order(rows, seed=0, epoch=0).rows_at(0, rows)
    means = found.reshape(-1, size).mean(-1)
    # The mean of 1,000 of N rows without replacement; 200 of them give its sd to 5 %.
    expected = rows / math.sqrt(12 * size) * math.sqrt(1 - size / rows)
    assert abs(means.std() / expected - 1) < 4 / math.sqrt(2 * len(means))
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5 / math.sqrt(rows)
    other = Order(rows, seed=0, epoch=1).rows_at(0, rows)
    assert abs(np.corrcoef(found, other)[0, 1]) < 5 / math.sqrt(rows)


@pytest.mark.parametrize("name", list(sources()))
def test_every_row_comes_once_in_a_pass(name):
    source, rows = sources()[name]
    stream = Stream(source, rows)
    _, y = data()
    batches = list(stream.all_batches(100, torch.float64))
    assert sum(len(batch[0]) for batch in batches) == N == stream.rows
    found = torch.cat([batch[1] for batch in batches])
    torch.testing.assert_close(found.sort().values, y.sort().values)


@pytest.mark.parametrize("name", ["tensors", "rows", "loader", "iterable loader"])
def test_a_feed_repeats_itself_and_goes_on_from_anywhere(name):
    source, rows = sources()[name]
    before = torch.get_rng_state()
    stream = Stream(source, rows)
    feed = stream.feed(100, 7, torch.float64)
    batches, positions = [], []
    for _ in range(15):
        positions.append(feed.position)
        batches.append(feed.next()[1])
    feed.close()
    for at in (0, 4, 9, 14):
        again = stream.feed(100, 7, torch.float64)
        again.go_to(*positions[at])
        for expected in batches[at:]:
            assert torch.equal(again.next()[1], expected)
        again.close()
    if name != "iterable loader":
        assert not torch.equal(batches[0], batches[6])
        epoch = torch.cat(batches[:6])
        assert torch.equal(epoch.sort().values, data()[1].sort().values)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_with_a_generator_of_its_own_leaves_it_alone():
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    loader = DataLoader(TensorDataset(*data()), batch_size=100, shuffle=True, generator=generator)
    stream = Stream(loader)
    one, other = (stream.feed(100, 1, torch.float64) for _ in range(2))
    for _ in range(8):
        assert torch.equal(one.next()[0], other.next()[0])
    assert torch.equal(generator.get_state(), before)


def test_partial_batches_are_dropped_in_steps():
    stream = Stream(DataLoader(TensorDataset(*data()), batch_size=250))
    feed = stream.feed(250, 0, torch.float64)
    assert [len(feed.next()[0]) for _ in range(5)] == [250] * 5
    assert feed.position == (2, 1)
    assert [len(b[0]) for b in stream.all_batches(250, torch.float64)] == [250, 250, 100]


def test_a_mapped_file_is_read_by_whole_batches(tmp_path):
    dataset = Mapped(tmp_path / "table.f32", *data())
    stream = Stream(dataset)
    feed = stream.feed(50, 0, torch.float64)
    first = feed.next()
    probed = dataset.single
    batches = [first, *(feed.next() for _ in range(11))]
    feed.close()
    assert dataset.single == probed <= 4
    assert first[0].dtype == torch.float64
    found = torch.cat([batch[1] for batch in batches])
    torch.testing.assert_close(found.sort().values, data()[1].float().double().sort().values)
    first[0].zero_()  # a copy, and not the file
    assert np.abs(dataset.table[:, :-1]).min() > 0


def test_what_a_dataset_draws_is_repeated_too():
    class Noisy(Indexed):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.randn(3, dtype=torch.float64), y

    stream = Stream(Noisy(*data()))
    one, other = (stream.feed(20, 3, torch.float64) for _ in range(2))
    first = [one.next()[0] for _ in range(3)]
    assert all(torch.equal(a, other.next()[0]) for a in first)
    assert not torch.equal(first[0], first[1])


def test_slow_reads_go_on_in_a_thread():
    class Slow(Whole):
        threads = frozenset()

        def __getitems__(self, rows):
            time.sleep(0.003)
            self.threads |= {threading.current_thread().name}
            return super().__getitems__(rows)

    slow, fast = Slow(*data()), Whole(*data())
    feeds = [Stream(source).feed(100, 0, torch.float64) for source in (slow, fast)]
    for _ in range(14):
        one, other = (feed.next() for feed in feeds)
        assert all(map(torch.equal, one, other))
    assert any(name.startswith("pyro_vi_kit_feed") for name in slow.threads)
    for feed in feeds:
        feed.go_to(1, 3)
    assert torch.equal(feeds[0].next()[0], feeds[1].next()[0])
    feeds[0].close()


def test_nothing_is_read_before_it_is_needed():
    dataset = Indexed(*data())
    model = vi.Model(linear, dataset, kwargs={"sd": 0.7})
    assert dataset.calls == 0
    assert model.args[0].shape == (256, COLUMNS)
    assert model.kwargs == {"sd": 0.7}
    assert dataset.calls == 256


# -- the density ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(sources()))
def test_terms_of_a_batch_are_those_of_its_rows_in_memory(name):
    source, rows = sources()[name]
    model = vi.Model(linear, source, rows=rows)
    density = Density(model)
    batch = next(density.batches(100))
    named = dict(zip(("x", "y"), batch, strict=True))
    memory = Density(vi.Model(linear, named["x"], named["y"]))
    z = memory.block.unpack(points())
    found, expected = density.terms(z, data=batch), memory.terms(z)
    torch.testing.assert_close(found.shared, expected.shared, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.local["row"], expected.local["row"], rtol=1e-12, atol=0)
    assert found.scale == {"row": N / len(batch[0])}


def test_batches_of_an_epoch_average_to_the_log_joint_of_all_data():
    density = Density(vi.Model(linear, TensorDataset(*data())))
    memory = Density(vi.Model(linear, *data()))
    z = memory.block.unpack(points())
    totals = [density.terms(z, data=batch).total() for batch in density.batches(60)]
    expected = memory.terms(z).total()
    torch.testing.assert_close(torch.stack(totals).mean(0), expected, rtol=1e-12, atol=0)
    # One pass for many draws, the last batch short.
    guide = guides.make("mean_field", density)
    with RandomStream(0):
        draw = guide.draw(5)
    log_p, log_q = weigh_all(guide, draw, None, density.batches(77))
    torch.testing.assert_close(log_p, memory.terms(draw.z).total(), rtol=1e-12, atol=0)
    torch.testing.assert_close(log_q, draw.shared)


def test_a_declared_subsample_is_the_batch_at_hand():
    def declared(x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with pyro.plate("row", N, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(x @ w + b, 0.5), obs=y)

    z = points()
    one, other = (Density(vi.Model(fn, TensorDataset(*data()))) for fn in (declared, linear))
    batch = next(one.batches(90))
    found = one.terms(one.block.unpack(z), data=batch)
    expected = other.terms(other.block.unpack(z), data=batch)
    assert found.scale == expected.scale == {"row": N / 90}
    torch.testing.assert_close(found.total(), expected.total(), rtol=1e-12, atol=0)


def test_a_part_of_the_data_held():
    density = Density(vi.Model(linear, TensorDataset(*data())))
    batch = next(density.batches(40))
    expected = density.terms(density.block.unpack(points()), data=batch).total()
    torch.testing.assert_close(density.held(batch).log_prob(points()), expected)
    memory = Density(vi.Model(linear, *data()))
    held = memory.subset({"row": torch.arange(40)})
    torch.testing.assert_close(held.log_prob(points()), expected, rtol=1e-12, atol=0)
    assert memory.log_prob(points()).ne(expected).all()


def test_discrete_latents_of_a_row_are_summed_out():
    def mixture(y):
        m = pyro.sample("m", dist.Normal(y.new_zeros(2), 3.0).to_event(1))
        with pyro.plate("row", len(y)):
            k = pyro.sample("k", dist.Categorical(y.new_tensor([0.3, 0.7])))
            pyro.sample("y", dist.Normal(m[k], 1.0), obs=y)

    _, y = data()
    density, memory = Density(vi.Model(mixture, TensorDataset(y))), Density(vi.Model(mixture, y))
    z = memory.block.unpack(points()[:, :2])
    totals = [density.terms(z, data=batch).total() for batch in density.batches(100)]
    torch.testing.assert_close(torch.stack(totals).mean(0), memory.terms(z).total())
    assert set(density.constrain(z)) == {"m"}


# -- steps ------------------------------------------------------------------------------------


def test_captured_steps_are_the_eager_ones():
    found = []
    for kind in (EagerEngine, CapturedEngine):
        density = Density(vi.Model(linear, TensorDataset(*data())))
        guide = guides.make("mean_field", density)
        batches = StreamedBatches(density, 50, seed=2)
        engine = kind(guide, Elbo(2), seed=0, batches=batches)
        found.append(engine.run(30, 0.01))
        assert engine.name == ("eager" if kind is EagerEngine else "captured")
        assert batches.feed.position == (2, 6)
        batches.close()
    torch.testing.assert_close(found[0].bounds, found[1].bounds, rtol=1e-9, atol=1e-9)
    for name, value in found[0].average.items():
        torch.testing.assert_close(found[1].average[name], value, rtol=1e-9, atol=1e-9)


def test_a_look_is_at_all_data():
    density = Density(vi.Model(linear, TensorDataset(*data())))
    memory = Density(vi.Model(linear, *data()))
    engines = [
        EagerEngine(guides.make("mean_field", d), Elbo(3), seed=0, batches=batches)
        for d, batches in ((density, StreamedBatches(density, 70, 0)), (memory, None))
    ]
    torch.testing.assert_close(engines[0].evaluate(5), engines[1].evaluate(5), rtol=1e-10, atol=0)


# -- fits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensors", "loader"])
def test_a_conjugate_posterior_is_found(name):
    source, rows = sources()[name]
    model = vi.Model(linear, source, rows=rows)
    batch_size = 100 if name == "tensors" else None
    fit = vi.fit(model, "full_rank", batch_size=batch_size, seed=0, progress=False)
    mean, covariance = posterior_of(*data())
    sd = covariance.diagonal().sqrt()
    q = gaussian_of(fit)
    assert fit.status.converged
    assert fit.method == "stochastic"
    # The tolerance, 0.01 nats, is a shift by 0.14 sd.
    assert float(((q.mean - mean) / sd).abs().max()) < 0.15
    assert float((q.stddev / sd - 1).abs().max()) < 0.1
    exact = vi.fit(vi.Model(linear, *data()), "full_rank", seed=0, progress=False)
    assert fit.log_evidence[0] == pytest.approx(exact.log_evidence[0], abs=0.05)
    assert fit.elbo == pytest.approx(exact.elbo, abs=0.05)


def test_the_start_moves_from_the_sample_to_all_data(monkeypatch):
    from pyro_vi_kit.fitting import minibatches

    monkeypatch.setattr(minibatches, "_START_ROWS", 200)
    model = vi.Model(linear, TensorDataset(*data()))
    fit = vi.fit(model, "full_rank", batch_size=50, steps=1, seed=0, progress=False)
    mean, covariance = posterior_of(*data())
    q = gaussian_of(fit)
    # A third of the rows: their posterior mean is 1.4 sds away.
    assert float(((q.mean - mean) / covariance.diagonal().sqrt()).abs().max()) < 0.15


def test_the_same_seed_gives_the_same_numbers():
    fits = [
        vi.fit(
            vi.Model(linear, TensorDataset(*data())),
            "mean_field",
            batch_size=64,
            steps=120,
            seed=4,
            progress=False,
        )
        for _ in range(2)
    ]
    assert np.array_equal(fits[0].losses, fits[1].losses)
    assert np.array_equal(fits[0].sample(3, seed=0)["w"], fits[1].sample(3, seed=0)["w"])


@pytest.fixture(scope="module")
def fitted():
    model = vi.Model(linear, TensorDataset(*data()), coords={"w_dim_0": ["a", "b", "c"]})
    return model, vi.fit(model, "mean_field", batch_size=100, seed=0, progress=False)


def test_what_a_posterior_gives(fitted):
    model, fit = fitted
    assert set(fit.sample(7, seed=0)) == {"w", "b"}
    assert list(fit.summary().index) == ["w[a]", "w[b]", "w[c]", "b"]
    x, y = data(5, seed=9)
    assert fit.predict(x, y, draws=11)["y"].shape == (11, 5)
    with pytest.raises(OptionError, match="needs the inputs to predict at"):
        fit.predict()
    tree = fit.to_arviz(draws=20)
    assert {"posterior", "unconstrained_posterior", "prior", "sample_stats"} <= set(tree.groups())
    assert not {"observed_data", "log_likelihood", "constant_data"} & set(tree.groups())
    assert tree.attrs["streamed_rows"] == N
    assert "log_likelihood" in tree.attrs["left_out"]
    assert vi.check(model, verbose=False).ok


def test_saved_loaded_and_resumed(fitted, tmp_path):
    model, fit = fitted
    path = fit.save(tmp_path / "streamed.nc", draws=20)
    loaded = vi.load(path, model)
    assert np.array_equal(loaded.sample(5, seed=1)["w"], fit.sample(5, seed=1)["w"])
    assert loaded.elbo == fit.elbo
    again = vi.fit(model, resume=loaded, steps=50, progress=False)
    assert len(again.losses) > len(fit.losses)


def local(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_an_encoder_reads_the_batch():
    generator = torch.Generator().manual_seed(0)
    y = 0.5 + math.sqrt(2.0) * torch.randn(400, generator=generator, dtype=torch.float64)
    fit = vi.fit(
        vi.Model(local, TensorDataset(y)),
        "amortized",
        batch_size=100,
        seed=0,
        steps=3000,
        dtype=torch.float64,
        progress=False,
    )
    found = fit.sample(4000, seed=0)
    assert set(found) == {"m"}
    # Exactly: m has precision 1 + 400 / 2. Globals and locals are independent in the guide, so that its
    # sd is that of the conditional, 1 / sqrt(401); its mean is right.
    mean, sd = float(y.sum() / 2 / 201), 1 / math.sqrt(201)
    assert abs(found["m"].mean() - mean) < 1.0 * sd
    evidence = dist.MultivariateNormal(
        torch.zeros(400, dtype=torch.float64),
        2 * torch.eye(400, dtype=torch.float64) + torch.ones(400, 400, dtype=torch.float64),
    ).log_prob(y)
    assert evidence - 5.0 < fit.elbo < evidence + 3 * fit.elbo_se


def test_a_multi_sample_bound_of_each_row():
    """IWAE per datum on batches: between the ELBO and the evidence, at the right scale."""
    generator = torch.Generator().manual_seed(0)
    y = math.sqrt(2.0) * torch.randn(200, generator=generator, dtype=torch.float64)

    def rows(y):
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    model = vi.Model(rows, DataLoader(TensorDataset(y), batch_size=50))
    density = Density(model)
    guide = guides.make("amortized", density)
    batches = StreamedBatches(density, 50, 0)
    engine = EagerEngine(guide, Iwae(64), seed=0, batches=batches)
    bounds = engine.run(200, 0.0).bounds
    evidence = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(y).sum())
    # An untrained guide, whose bound of 64 particles is below the evidence by some nats; a scale inside
    # the logsumexp would put it above.
    se = float(bounds.std()) / math.sqrt(len(bounds))
    assert evidence - 60 < float(bounds.mean()) < evidence + 3 * se
    assert float(engine.evaluate(16).mean()) < evidence + 3 * se


def test_a_look_at_very_many_batches_is_at_some(monkeypatch):
    monkeypatch.setattr("pyro_vi_kit.optimize.engines.batches._LOOK", 5)
    density = Density(vi.Model(linear, TensorDataset(*data())))
    batches = StreamedBatches(density, 20, 0)
    one, other = ([b[1] for b in batches.looked_at()] for _ in range(2))
    assert len(one) == 5
    assert all(map(torch.equal, one, other))
    assert batches.feed.position == (0, 0)
    engine = EagerEngine(guides.make("mean_field", density), Elbo(2), seed=0, batches=batches)
    memory = EagerEngine(
        guides.make("mean_field", Density(vi.Model(linear, *data()))), Elbo(2), seed=0
    )
    found, expected = float(engine.evaluate(8).mean()), float(memory.evaluate(8).mean())
    # A sixth of the rows: their sum, scaled up, is within a few sds of sqrt(600 * 5) row sds.
    assert found == pytest.approx(expected, rel=0.5)


# -- refusals ---------------------------------------------------------------------------------


def model_of(fn, **options):
    return vi.Model(fn, TensorDataset(*data()), **options)


def no_plate(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)


def two_plates(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("one", len(x)):
        pyro.sample("a", dist.Normal(x @ w, 1.0), obs=y)
    with pyro.plate("two", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def shared_depends(x, y):
    w = pyro.sample("w", dist.Normal(x.mean(0), 1.0).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def rows_depend(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal((x - x.mean(0)) @ w, 1.0), obs=y)


def as_long_as_the_batch(x, y):
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def inner(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("column", 3, dim=-2), pyro.plate("row", len(x), dim=-1):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x.T)


def global_discrete(x, y):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(k + w, 1.0), obs=y)


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (no_plate, r"no plate of the streamed model follows.*pyro.plate\('row', len\(x\)\)"),
        (two_plates, "several plates.*one, two"),
        (shared_depends, "site 'w' depends on the batch"),
        (rows_depend, "a row of site 'y' depends on which other rows"),
        (as_long_as_the_batch, "latent site 'z' is as long as the batch"),
        (inner, "site 'x' is in plate 'row'.*inside plate 'column'"),
        (global_discrete, "discrete latent site 'k'"),
    ],
)
def test_models_that_cannot_be_streamed(fn, said):
    with pytest.raises(ModelError, match=said):
        Density(model_of(fn))
    report = vi.check(model_of(fn), verbose=False)
    assert {check.name for check in report.checks if check.outcome == "fail"} == {"stream"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda x, y: vi.Model(linear, DataLoader(Rows(x, y), batch_size=10)), "rows=N"),
        (lambda x, y: vi.Model(linear, Rows(x, y)), "wrap it"),
        (lambda x, y: vi.Model(linear, TensorDataset(x), y), "only positional argument"),
        (lambda x, y: vi.Model(linear, x, y, rows=5), "rows= is for a DataLoader"),
        (lambda x, y: vi.Model(linear, TensorDataset(x, y), rows=5), "does not agree"),
        (lambda x, y: vi.Model(linear, DataLoader(TensorDataset(x, y)), rows=0), "at least 1"),
        (
            lambda x, y: vi.Model(linear, Whole(x, y), kwargs={"y": y}).args,
            "'y' is given by kwargs=",
        ),
        (lambda x, y: vi.Model(linear, TensorDataset(x[:0], y[:0])), "no rows"),
        (
            lambda x, y: vi.Model(linear, DataLoader([(i, "a") for i in range(9)])).args,
            "one row per datum|holds a str",
        ),
    ],
)
def test_sources_that_cannot_be_streamed(make, said):
    with pytest.raises(ModelError, match=said):
        make(*data())


def test_a_loader_that_has_fewer_rows_than_announced():
    stream = Stream(DataLoader(Rows(*data()), batch_size=100), rows=1000)
    with pytest.raises(ModelError, match="gave 600 rows where 1000 were announced"):
        list(stream.all_batches(100, torch.float64))
    endless = Stream(DataLoader(Rows(*data()), batch_size=100), rows=250)
    assert sum(len(batch[0]) for batch in endless.all_batches(100, torch.float64)) == 250


def guide_of_my_own(x, y):
    pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("b", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "lbfgs"}, "method='lbfgs' reads all data"),
        ({"engine": "pyro"}, "engine='pyro' runs the model on all data"),
        ({"guide": guide_of_my_own}, "a Pyro guide callable"),
        ({"objective": "iwae"}, "objective 'iwae'.*objective='elbo'"),
        ({"objective": "renyi"}, "objective 'renyi'"),
        ({"batch_size": N + 1}, "between 1 and the 600 rows"),
    ],
)
def test_fits_that_need_all_data(options, said):
    with pytest.raises(OptionError, match=said):
        vi.fit(model_of(linear), **options, progress=False)


def test_other_refusals():
    with pytest.raises(OptionError, match="nuts reads all data"):
        vi.nuts(model_of(linear))
    loader = DataLoader(TensorDataset(*data()), batch_size=100)
    with pytest.raises(OptionError, match="batch_size=50 does not agree with the loader's 100"):
        vi.fit(vi.Model(linear, loader), batch_size=50, progress=False)
    with pytest.raises(OptionError, match=r"latent site\(s\) z lie in plate 'row'"):
        vi.fit(vi.Model(local, TensorDataset(data()[1])), "mean_field", progress=False)
