"""Files are whole or refused: written in one step, sealed, and of the model that they are read for."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import threading

import h5py
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_checkpoint import rewrite
from toys import two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit.core import export, files
from pyro_vi_kit.core.errors import FileError, ModelError, OptionError, OtherDataWarning, ViError
from pyro_vi_kit.posterior import storage
from pyro_vi_kit.validation.suite import cells

STEPS = {"method": "stochastic", "engine": "eager", "steps": 5, "seed": 0, "init": "origin"}

# -- writing ----------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.bin"
    assert files.write(path, files.sealed(b"content")) == path
    assert files.unsealed(path.read_bytes(), path) == (b"content", True)
    assert files.unsealed(b"content", path) == (b"content", False)
    assert names(tmp_path) == ["a.bin"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    link, real = tmp_path / "link", tmp_path / "far" / "real"
    link.symlink_to(real)
    for content in (b"first", b"second"):
        files.write(link, content)
        assert link.is_symlink()
        assert real.read_bytes() == content
    assert names(tmp_path / "far") == ["real"]


def test_a_planted_name_is_not_followed(tmp_path):
    """Neither the names of earlier versions nor links that look like parts lead anywhere."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in (".run.ckpt.partial", f".run.ckpt.{'0' * 16}.partial"):
        (tmp_path / name).symlink_to(victim)
    files.write(tmp_path / "run.ckpt", b"content")
    assert victim.read_bytes() == b"precious"
    assert (tmp_path / "run.ckpt").read_bytes() == b"content"


def test_what_a_killed_process_left_is_taken_away(tmp_path):
    path = tmp_path / "run.ckpt"
    code = (
        "import os; from pyro_vi_kit.core import files; "
        "os.replace = lambda *_: os.kill(os.getpid(), 9); "
        f"files.write({str(path)!r}, b'new')"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -9
    assert len(names(tmp_path)) == 1
    own = tmp_path / ".run.ckpt.mine.partial"
    own.touch()
    files.write(path, b"newer")
    assert names(tmp_path) == [own.name, "run.ckpt"]


def test_many_may_write_one_file(tmp_path):
    """Whoever is last, the file is one of theirs and whole, and nobody takes another's part away."""
    path, problems = tmp_path / "one", []

    def write(letter):
        try:
            for _ in range(20):
                files.write(path, files.sealed(letter * 50_000))
                content, whole = files.unsealed(path.read_bytes(), path)
                assert whole
                assert content == content[:1] * 50_000
        except BaseException as error:  # noqa: BLE001  told below
            problems.append(error)

    threads = [threading.Thread(target=write, args=(bytes([65 + i]),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert names(tmp_path) == ["one"]


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127])
def test_a_long_name_is_no_obstacle(name, tmp_path):
    assert files.write(tmp_path / name, b"content").read_bytes() == b"content"
    with pytest.raises(FileError, match="cannot write"):
        files.write(tmp_path / (name + "more"), b"content")


@pytest.mark.parametrize("path", [3, None, b"bytes", "a\0b"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(FileError):
        files.check_writable(path)
    with pytest.raises(FileError):
        export.read(path)


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_full_disk_leaves_the_old_file(old, tmp_path, monkeypatch, schools):
    path = tmp_path / "fit.nc"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(FileError, match=r"cannot write .*fit\.nc: .*No space left"):
        schools.save(path, draws=2)
    assert names(tmp_path) == ([] if old is None else ["fit.nc"])
    assert old is None or path.read_bytes() == old


def no_space(descriptor):
    raise OSError(28, "No space left on device")


# -- damage -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schools():
    return vi.fit(two_scales_model(), "full_rank", seed=0)


@pytest.fixture(scope="module")
def written(schools, tmp_path_factory):
    """A saved posterior and a checkpoint."""
    folder = tmp_path_factory.mktemp("written")
    vi.fit(two_scales_model(), "mean_field", checkpoint=folder / "run.ckpt", **STEPS)
    return schools.save(folder / "fit.nc", draws=2), folder / "run.ckpt"


def flipped(content, generator):
    """The content with one bit the other way round."""
    damaged = bytearray(content)
    damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


def test_no_flipped_bit_goes_unseen(written, schools, tmp_path):
    """The seal stands at the end: a flip there leaves everything else whole."""
    generator, path = random.Random(0), tmp_path / "damaged.nc"
    content = written[0].read_bytes()
    places = [*range(len(content) - 30, len(content) - 60, -15)]
    flips = [flipped(content, generator) for _ in range(300)]
    flips += [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in places]
    refused = 0
    for damaged in flips:
        path.write_bytes(damaged)
        try:
            found = vi.load(path, schools.model)
        except FileError as error:
            refused += str(path) in str(error)
        else:
            assert np.array_equal(
                found.sample(3, seed=1)["beta"], schools.sample(3, seed=1)["beta"]
            )
    assert refused >= 290


def test_no_flipped_bit_of_a_checkpoint_goes_unseen(written, tmp_path):
    generator, path = random.Random(1), tmp_path / "damaged.ckpt"
    content = written[1].read_bytes()
    for _ in range(300):
        path.write_bytes(flipped(content, generator))
        with pytest.raises(FileError, match="damaged"):
            vi.fit(two_scales_model(), "mean_field", checkpoint=path, **STEPS)


def test_a_file_that_arviz_wrote_anew_is_checked_too(written, schools, tmp_path):
    """It has no seal any more, but the guide's own checksum."""
    az, path = export.import_arviz(), tmp_path / "anew.nc"
    tree = az.from_netcdf(str(written[0]))
    tree.to_netcdf(str(path), engine="h5netcdf")
    found = vi.load(path, schools.model)
    assert np.array_equal(found.sample(3, seed=1)["beta"], schools.sample(3, seed=1)["beta"])
    with h5py.File(path, "r+") as file:
        file[storage.GROUP]["tensor_0"][0] += 1e-9
    with pytest.raises(FileError, match=r"anew\.nc is damaged"):
        vi.load(path, schools.model)


WRONG = (None, "text", 3, -1.5, float("nan"), [], {}, [None, {}], True)


def places(value, at=()):
    """Where each part of nested dicts and lists is."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        yield (*at, key)
        if isinstance(part, dict | list) and part and at[:1] != ("latents",):
            yield from places(part, (*at, key))


def changed(value, place, wrong):
    """A copy with something else at one place, or without it where ``wrong`` is `places` itself."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    if wrong is places:
        del inner[place[-1]]
    else:
        inner[place[-1]] = wrong
    return copy


@pytest.fixture
def forged(written, tmp_path):
    """``forged(change, honest)``: the posterior's file with another header, its checksum as it was."""
    tree = export.read(written[0])

    def make(change, honest):
        group = export.datasets(tree)[storage.GROUP].copy()
        header = json.dumps(change(json.loads(group.attrs["header"])))
        arrays = {str(name): group[name].values for name in group.data_vars}
        group.attrs = {"header": header, "checksum": group.attrs["checksum"]}
        if not honest:
            group.attrs["checksum"] = storage._checksum(header, arrays)
        path = tmp_path / "forged.nc"
        groups = {storage.GROUP: group}
        return export.write(export._assemble(groups, dict(tree.attrs)), path)

    return make


def test_a_wrong_value_in_any_field_is_an_error_of_ours(forged, schools):
    """Damage never has the right checksum; who makes one anew is told of what cannot be, if anything."""
    header = json.loads(
        storage.guide_group(schools.approximation, schools.record, schools.spec).attrs["header"]
    )
    generator = random.Random(2)
    every = list(places(header))
    assert len(every) > 60
    for place in every:
        wrong = generator.choice([*WRONG, places])
        if wrong is not places and changed(header, place, wrong) == header:
            continue
        with pytest.raises(ViError, match=r"forged\.nc"):
            vi.load(forged(lambda h, p=place, w=wrong: changed(h, p, w), True), schools.model)
    for place in generator.sample(every, 25):
        wrong = generator.choice([*WRONG, places])
        with contextlib.suppress(ViError, OtherDataWarning):
            vi.load(forged(lambda h, p=place, w=wrong: changed(h, p, w), False), schools.model)


def checkpoint_with(source, target, place, wrong):
    def change(content):
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        if wrong is places:
            del inner[place[-1]]
        else:
            inner[place[-1]] = wrong
        return content

    rewrite(source, target, change)


def test_a_wrong_part_of_a_checkpoint_is_an_error_of_ours(written, tmp_path):
    content = torch.load(
        io.BytesIO(files.unsealed(written[1].read_bytes(), written[1])[0]),
        weights_only=True,
    )
    generator, path = random.Random(3), tmp_path / "forged.ckpt"
    every = [(key,) for key in content]
    every += [(a, b) for a in ("identity", "state") for b in content[a]]
    for place in every:
        for wrong in [places, generator.choice(WRONG[3:])]:
            checkpoint_with(written[1], path, place, wrong)
            with contextlib.suppress(ViError):
                vi.fit(two_scales_model(), "mean_field", checkpoint=path, **STEPS)


def test_a_record_of_a_bench_that_was_changed_is_made_anew(tmp_path):
    cell = cells.Cell(tmp_path / "m.py", "full_rank", "elbo", 0)
    (tmp_path / "m").mkdir()
    cells.write_record(tmp_path, cell, "s", {"status": "done", "elbo": -1.25, "error": ""})
    path = cell.record(tmp_path)
    assert cells.read_record(path)["row"]["elbo"] == -1.25
    text = path.read_text()
    for damaged in (text.replace("-1.25", "-1.26"), text[:-9], "[]", "3", '{"row": 1}', "\xff"):
        path.write_text(damaged)
        assert cells.read_record(path) is None


# -- another model, other data ----------------------------------------------------------------

DATA = torch.tensor([1.0, 2.0, 3.0, 2.5, 1.5])


def model_of(prior=10.0, sd=1.0, shift=0.0, given=0.0, rate=1.0):
    """One mean; the data are closed over, as in most notebooks, and so are all constants."""
    data = DATA + shift

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, prior))
        tau = pyro.sample("tau", dist.Exponential(rate))
        with pyro.plate("n", 5):
            pyro.sample("y", dist.Normal(mu + 0.0 * x.sum() + 0.0 * tau, sd), obs=data)

    return vi.Model(model, torch.full((1,), given))


CHANGES = {
    "prior": ({"prior": 0.1}, "the log density of 'mu' is not what it was"),
    "another prior": ({"rate": 1.001}, "the log density of 'tau' is not what it was"),
    "likelihood": ({"sd": 1.001}, "the log density of 'y' is not what it was"),
    "data": ({"shift": 1e-3}, "the data observed at 'y' is not what it was"),
    "arguments": ({"given": 1.0}, "data '[0-9a-f]{8}', now '[0-9a-f]{8}'"),
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    posterior = vi.fit(model_of(), "mean_field", checkpoint=folder / "run.ckpt", **STEPS)
    return posterior, posterior.save(folder / "fit.nc", draws=2), folder / "run.ckpt"


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_goes_on_from_nothing(change, fitted, tmp_path):
    posterior, path, kept = fitted
    options, words = CHANGES[change]
    other = model_of(**options)
    with pytest.raises(OptionError, match=rf"of another fit \({words}.*delete it to begin anew"):
        vi.fit(other, "mean_field", checkpoint=kept, **STEPS)
    resumed = {key: STEPS[key] for key in ("engine", "steps")}
    with pytest.raises(ModelError, match=rf"resume= is a fit of .*{words}.*without resume="):
        vi.fit(other, resume=posterior, **resumed)
    with pytest.raises(ModelError, match=words):
        vi.fit(other, resume=path, **resumed)
    # The remedy: another file. (The argument of this model changes nothing but itself.)
    fresh = vi.fit(other, "mean_field", checkpoint=tmp_path / "new.ckpt", **STEPS)
    assert np.array_equal(fresh.losses, posterior.losses) == (change == "arguments")


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_of_another_model_is_refused_and_other_data_are_told_of(change, fitted):
    posterior, path, _ = fitted
    options, words = CHANGES[change]
    if change in ("data", "arguments"):
        with pytest.warns(OtherDataWarning, match=rf"of other data than .*{words}"):
            found = vi.load(path, model_of(**options))
        assert np.array_equal(found.sample(3, seed=1)["mu"], posterior.sample(3, seed=1)["mu"])
    else:
        with pytest.raises(ModelError, match=rf"of another model: {words}"):
            vi.load(path, model_of(**options))


def test_the_same_model_goes_on(fitted):
    posterior, path, kept = fitted
    again = vi.fit(model_of(), "mean_field", checkpoint=kept, **STEPS)
    assert np.array_equal(again.losses, posterior.losses)
    loaded = vi.load(path, model_of())
    assert loaded.record.fingerprint == posterior.record.fingerprint
    later = vi.fit(model_of(), resume=loaded, engine="eager", steps=3)
    assert len(later.losses) == 8
    # In another precision it is the same model still.
    vi.fit(model_of(), resume=path, engine="eager", steps=3, dtype=torch.float32)


def test_weights_that_are_drawn_anew_are_not_another_model(tmp_path):
    """Parameters are what a fit changes: where they start says nothing of the model."""

    def made():
        net = torch.nn.Linear(1, 1)

        def model(y):
            pyro.module("net", net)
            with pyro.plate("datum", len(y)) as index:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=y[index])

        return vi.Model(model, torch.tensor([0.3, -1.0, 2.0]))

    first = vi.fit(made(), "amortized", steps=5, engine="eager", seed=0)
    path = first.save(tmp_path / "fit.nc", draws=2)
    loaded = vi.load(path, made())
    assert np.array_equal(loaded.sample(3, seed=0)["z"], first.sample(3, seed=0)["z"])


def test_a_guide_of_the_users_is_held_against_the_model_too(tmp_path):
    def guide(x):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        pyro.sample("tau", dist.Exponential(1.0))

    path = vi.fit(model_of(), guide, steps=5, seed=0).save(tmp_path / "fit.nc", draws=2)
    assert vi.load(path, model_of(), guide=guide).parameters.keys() >= set()
    with pytest.raises(ModelError, match="'mu' is not what it was"):
        vi.load(path, model_of(prior=0.1), guide=guide)
    with pytest.raises(ModelError, match="'mu' is not what it was"):
        vi.fit(model_of(prior=0.1), guide, resume=path, steps=5)


def test_new_data_of_an_encoder_are_the_new_posteriors_own(tmp_path):
    def model(y):
        with pyro.plate("datum", len(y)) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    first = vi.fit(vi.Model(model, torch.tensor([0.3, -1.0])), "amortized", steps=5, seed=0)
    new = torch.tensor([1.5, 0.2])
    path = first.infer(new).save(tmp_path / "new.nc", draws=2)
    vi.load(path, vi.Model(model, new))
    with pytest.warns(OtherDataWarning):
        vi.load(path, vi.Model(model, torch.tensor([0.3, -1.0])))


# -- sizes ------------------------------------------------------------------------------------


def test_a_file_is_as_small_as_was_asked_for(tmp_path):
    """A draw of n latents is 2 n numbers, unconstrained ones among them, and n of the prior's."""
    count = 500

    def wide(y):
        with pyro.plate("n", count):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    posterior = vi.fit(vi.Model(wide, torch.zeros(count)), "mean_field", **STEPS)
    few, more = (posterior.save(tmp_path / f"{d}.nc", draws=d).stat().st_size for d in (1, 11))
    # The groups with a number for each latent: posterior, unconstrained, predictive, likelihood,
    # prior and its predictive.
    assert (more - few) / 10 <= 6 * 8 * count
    # Without draws: data, twice, and the guide's mean, sd and frame, 8 bytes each, and 100 kB for names.
    assert few <= 6 * 8 * count + 8 * 8 * count + 100_000
