"""Groups of arrays as ArviZ data of either generation, and as files."""

from __future__ import annotations

import importlib.util
import json
import os
from datetime import UTC, date, datetime

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pyro_vi_kit.core import export, files
from pyro_vi_kit.core.errors import FileError, ModelError
from pyro_vi_kit.core.export import Group

SCHOOLS = ["Älpha", "Beta", "Gamma"]


@pytest.fixture(params=["installed", "DataTree"])
def kind(request, monkeypatch):
    """Both kinds of ArviZ object: the installed version's, and that of 1.x."""
    if request.param == "DataTree":
        monkeypatch.setattr(export, "arviz_major", lambda: 1)
    return request.param


def _groups(draws: int = 50) -> dict[str, Group]:
    rng = np.random.default_rng(0)
    posterior = {
        "mu": rng.normal(size=(1, draws)),
        "theta": rng.normal(size=(1, draws, 3)),
        "cov": rng.normal(size=(1, draws, 3, 3)),
        "count": rng.integers(0, 2**60, (1, draws, 3)),
        "flag": rng.random((1, draws)) < 0.5,
        "nothing": np.zeros((1, draws, 0)),
    }
    dims = {"theta": ["school"], "count": ["school"], "cov": ["school", "school"]}
    guide = {
        "loc": np.asfortranarray(rng.normal(size=(2, 3))),
        "scale": np.float32(2.5),
        "step": np.array(7),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 2)),
        "names": np.array(["ä", "bcd"], dtype=object),
    }
    facts = {"guide": "full_rank", "text": "", "long": "x" * 100_000, "layers": [1, 2]}
    return {
        "posterior": Group(posterior, dims),
        "unconstrained_posterior": Group({"z": rng.normal(size=(1, draws, 4))}),
        "vi_guide": Group(guide, {"loc": ["school"]}, sampled=False, attrs=facts),
        "loss_trace": Group({"loss": np.arange(9.0)}, {"loss": ["step"]}, sampled=False),
    }


def _tree(**attrs):
    groups = _groups()
    del groups["vi_guide"]
    return export.to_arviz(groups, {"school": SCHOOLS}, attrs)


def _one(variables, dims=None, *, coords=None, sampled=False) -> xr.Dataset:
    tree = export.to_arviz({"posterior": Group(variables, dims or {}, sampled)}, coords or {})
    return export.datasets(tree)["posterior"]


def test_dims_and_coords(kind):
    tree = _tree()
    assert isinstance(tree, xr.DataTree) == (kind == "DataTree" or export.arviz_major() >= 1)
    groups = export.datasets(tree)
    assert list(groups) == ["posterior", "unconstrained_posterior", "loss_trace"]
    posterior = groups["posterior"]
    assert posterior["theta"].dims == ("chain", "draw", "school")
    assert posterior["cov"].dims == ("chain", "draw", "school", "school_1")
    assert posterior["nothing"].dims == ("chain", "draw", "nothing_dim_0")
    assert list(posterior["school"].values) == list(posterior["school_1"].values) == SCHOOLS
    np.testing.assert_array_equal(posterior["draw"], np.arange(50))
    np.testing.assert_array_equal(posterior["cov"], _groups()["posterior"].variables["cov"])
    assert groups["unconstrained_posterior"]["z"].dims == ("chain", "draw", "z_dim_0")
    # "step" is a variable of another group: one name means one thing in the whole object.
    assert groups["loss_trace"]["loss"].dims == ("step",)
    full = export.datasets(export.to_arviz(_groups(), {"posterior": []}))
    assert full["loss_trace"]["loss"].dims == ("step_dim",)


def test_partly_named_dims_and_labels():
    data = _one(
        {"a": np.zeros((2, 3)), "b": np.zeros((2, 2)), "t": np.zeros(2)},
        {"a": ["row"], "b": ["row", "when"], "t": ["pair"]},
        coords={"when": np.array(["2020-01-01", "2020-01-02"], "M8[ns]"), "pair": [(1,), (1, 2)]},
    )
    assert data["a"].dims == ("row", "a_dim_1")
    assert data["when"].dtype == "M8[ns]"
    assert list(data["pair"].values) == ["(1,)", "(1, 2)"]


def test_clashing_names_are_changed():
    data = _one(
        {
            "theta": np.zeros((2, 3, 3)),
            "theta_dim": np.zeros(3),
            "draw": np.zeros(4),
            "scope/x": np.zeros(5),
        },
        {"theta": ["draw", "theta", "theta"], "draw": ["chain"], "scope/x": ["scope/plate"]},
        coords={"theta": SCHOOLS, "scope/plate": [5, 6, 7, 8, 9]},
    )
    assert data["theta"].dims == ("draw_dim", "theta_dim_dim", "theta_dim_dim_1")
    assert list(data["theta_dim_dim_1"].values) == SCHOOLS
    assert data["draw_site"].dims == ("chain_dim",)
    assert data["scope.x"].dims == ("scope.plate",)
    np.testing.assert_array_equal(data["scope.plate"], [5, 6, 7, 8, 9])


def test_complex_half_and_float32_arrays():
    value = np.array([1 + 2j, 3 - 1j])
    data = _one({"f": value, "h": np.float16([0.5]), "s": np.float32([0.5])})
    np.testing.assert_array_equal(data["f_real"] + 1j * data["f_imag"], value)
    assert (data["h"].dtype, data["s"].dtype) == (np.float64, np.float32)


def test_attrs(kind):
    attrs = {
        "text": "ä",
        "number": np.int64(3),
        "real": 0.5,
        "list": [1, 2.5],
        "names": ("a", "b"),
        "none": None,
        "flag": True,
        "nested": {"a": [np.float64(1), None], "b": np.arange(2)},
        "mixed": [1, "a"],
        "no_items": [],
    }
    stored = _tree(**attrs).attrs
    kept = {"text": "ä", "number": 3, "real": 0.5, "list": [1, 2.5], "names": ["a", "b"]}
    assert {key: stored[key] for key in kept} == kept
    decoded = {key: json.loads(stored[key]) for key in ("none", "flag", "mixed", "no_items")}
    assert decoded == {"none": None, "flag": True, "mixed": [1, "a"], "no_items": []}
    assert json.loads(stored["nested"]) == {"a": [1.0, None], "b": [0, 1]}
    assert stored["created_at"].endswith("+00:00")
    assert stored["inference_library"] == "pyro_vi_kit"
    for dataset in export.datasets(_tree()).values():
        assert {"created_at", "inference_library", "inference_library_version"} <= set(
            dataset.attrs
        )
    assert _tree(inference_library="nutpie").attrs["inference_library"] == "nutpie"


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (Group({"x": np.zeros((1, 9, 2))}, {"x": ["school"]}), "'school' has length 2 in site 'x'"),
        (Group({"x": np.zeros((1, 9))}, {"x": ["a"]}), "name 1 dimensions \\['a'\\].*\\(\\)"),
        (Group({"x": np.zeros(9)}), "\\[chain, draw, ...\\], got shape \\(9,\\)"),
        (Group({"x": np.zeros((1, 9)), "y": np.zeros((1, 8))}), "'draw'.* 8 in site 'y' but 9"),
        (Group({"x": np.array(object())}, sampled=False), "'x' holds object values"),
        (Group({}, attrs={"fact": 1}), "'posterior' has attrs but no variables"),
    ],
)
def test_what_does_not_fit_is_named(group, message):
    with pytest.raises(ModelError, match=message):
        export.to_arviz({"posterior": group}, {"school": SCHOOLS})


def test_names_that_a_file_cannot_hold(kind, tmp_path):
    sites = [
        "a/b",
        "a.b",
        ".",
        "/",
        "..",
        "",
        "new\nline",
        "nul\0",
        "draw",
        "draw_site",
        "$x$",
        "n" * 300,
    ]
    values = {site: np.full((1, 2), i) for i, site in enumerate(sites)}
    attrs = {"model": "half a \0 name", "names": ["a\0", "b"]}
    tree = export.to_arviz({"posterior": Group(values)}, attrs=attrs)
    stored = export.datasets(export.read(export.write(tree, tmp_path / "odd.nc")))["posterior"]
    named = {str(name): int(stored[name].to_numpy()[0, 0]) for name in stored.data_vars}
    assert named == {
        "a.b_1": 0,
        "a.b": 1,
        "._site": 2,
        "._site_1": 3,
        ".._site": 4,
        "_site": 5,
        "new_line": 6,
        "nul_": 7,
        "draw_site_1": 8,
        "draw_site": 9,
        "$x$": 10,
        "n" * 300: 11,
    }


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        ([date(2020, 1, 31), date(2020, 2, 1)], True),
        ([datetime(2020, 1, 31, 12), datetime(2020, 2, 1)], True),
        (pd.date_range("2020-01-31", periods=2), True),
        (np.array(["2020-01-31", "2020-02-01"], "M8[D]"), True),
        ([date(1000, 1, 31), date(1000, 2, 1)], False),
        ([datetime(2020, 1, 31, tzinfo=UTC), datetime(2020, 2, 1, tzinfo=UTC)], False),
        ([date(2020, 1, 31), "later"], False),
    ],
)
def test_dates_are_dates(labels, kept, kind, tmp_path):
    tree = export.to_arviz(
        {"posterior": Group({"x": np.zeros((1, 4, 2))}, {"x": ["t"]})}, {"t": labels}
    )
    stored = export.datasets(export.read(export.write(tree, tmp_path / "dates.nc")))["posterior"]
    if kept:
        assert stored["t"].dtype.kind == "M"
        np.testing.assert_array_equal(stored["t"].values, np.array([*labels], "M8[us]"))
    else:
        assert list(stored["t"].values) == [str(label) for label in labels]


def test_a_plate_and_an_argument_of_one_name(kind):
    groups = {
        "posterior": Group({"theta": np.zeros((1, 4, 3))}, {"theta": ["school"]}),
        "constant_data": Group(
            {"school": np.array([0, 1, 2, 0]), "u": np.zeros(3)},
            {"school": ["row"], "u": ["school"]},
            sampled=False,
        ),
    }
    built = export.datasets(export.to_arviz(groups, {"school": SCHOOLS}))
    assert built["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert list(built["posterior"]["school"].values) == SCHOOLS
    assert list(built["constant_data"]["school"].values) == [0, 1, 2, 0]
    assert built["constant_data"]["u"].dims == ("school_dim",)


def test_a_plate_called_draw_keeps_its_labels(kind):
    data = _one({"x": np.zeros((1, 4, 3))}, {"x": ["draw"]}, coords={"draw": SCHOOLS}, sampled=True)
    assert data["x"].dims == ("chain", "draw", "draw_dim")
    assert list(data["draw_dim"].values) == SCHOOLS


def test_wrong_coords_name_both_lengths():
    with pytest.raises(ModelError, match=r"length 2 in site 'x'.*coords\['s'\] holds 3 names"):
        _one({"x": np.zeros(2)}, {"x": ["s"]}, coords={"s": SCHOOLS})


def test_groups_without_variables_are_left_out(kind):
    tree = export.to_arviz({"posterior": Group({"x": np.zeros((1, 5))}), "prior": Group({})})
    assert list(export.datasets(tree)) == ["posterior"]


def test_round_trip(kind, tmp_path):
    groups = _groups()
    tree = export.to_arviz(groups, {"x": []}, {"seed": 3})
    path = export.write(tree, tmp_path / "fit.nc")
    again = export.read(path)
    assert type(again) is type(tree)
    assert again.attrs == tree.attrs
    before, after = export.datasets(tree), export.datasets(again)
    assert list(before) == list(after)
    for name, dataset in before.items():
        xr.testing.assert_identical(dataset, after[name])
        for variable in dataset.variables:
            assert dataset[variable].dtype == after[name][variable].dtype, variable
    export.write(again, path)  # what was read has no file open and can be written again
    xr.testing.assert_identical(export.datasets(export.read(path))["vi_guide"], before["vi_guide"])


def test_arviz_reads_what_is_written_and_the_other_way_round(tmp_path):
    az = export.import_arviz()
    tree = _tree()
    path = export.write(tree, tmp_path / "ours.nc")
    theirs = az.from_netcdf(str(path))
    for name, dataset in export.datasets(tree).items():
        xr.testing.assert_identical(dataset, export.datasets(theirs)[name].load())
        export.datasets(theirs)[name].close()
    other = tmp_path / "theirs.nc"
    tree.to_netcdf(str(other), engine="h5netcdf")
    for name, dataset in export.datasets(export.read(other)).items():
        xr.testing.assert_equal(dataset, export.datasets(tree)[name])


def test_arviz_functions_take_the_result():
    az = export.import_arviz()
    rng = np.random.default_rng(0)
    variables = {"mu": rng.normal(size=(2, 200)), "theta": rng.normal(size=(2, 200, 3))}
    tree = export.to_arviz(
        {"posterior": Group(variables, {"theta": ["school"]})}, {"school": SCHOOLS}
    )
    summary = az.summary(tree)
    assert list(summary.index) == ["mu", *(f"theta[{name}]" for name in SCHOOLS)]


@pytest.mark.skipif(export.arviz_major() >= 1, reason="plot_posterior is of ArviZ 0.x")
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # Matplotlib 3.11
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_arviz_plots_the_result():
    import matplotlib as mpl

    mpl.use("Agg")
    axes = export.import_arviz().plot_posterior(_tree(), var_names=["mu", "theta"])
    assert np.size(axes) == 4
    mpl.pyplot.close("all")


@pytest.mark.parametrize("old", [None, b"the old file"])
def test_a_failing_write_leaves_what_was_there(old, tmp_path, monkeypatch):
    path = tmp_path / "fit.nc"
    if old is not None:
        path.write_bytes(old)

    def broken(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(FileError, match=r"cannot write .*fit.nc: no space left"):
        export.write(_tree(), path)
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["fit.nc"])
    assert old is None or path.read_bytes() == old


def test_writing_keeps_a_link_and_the_usual_rights(tmp_path):
    real = tmp_path / "real.nc"
    plain = tmp_path / "plain"
    plain.touch()
    link = tmp_path / "link.nc"
    link.symlink_to(real)
    assert export.write(_tree(), link) == real
    assert link.is_symlink()
    assert real.stat().st_mode == plain.stat().st_mode


def test_unwritable_paths_are_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(FileError, match=r"no folder .*missing; create it with mkdir -p"):
        files.check_writable(tmp_path / "missing" / "fit.nc")
    with pytest.raises(FileError, match="not a plain file"):
        files.check_writable(tmp_path)
    with pytest.raises(FileError, match="not a plain file"):
        files.check_writable(os.devnull)
    target = tmp_path / "fit.nc"
    assert files.check_writable(target) == target
    assert not target.exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FileError, match=r"no right to write to .*choose another path"):
        files.check_writable(target)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileError, match=r"no file .*gone.nc"):
        export.read(tmp_path / "gone.nc")
    with pytest.raises(FileError, match="no file"):
        export.read(tmp_path)
    text = tmp_path / "text.nc"
    text.write_text("not netCDF")
    with pytest.raises(FileError, match=r"cannot read .*text.nc as netCDF-4"):
        export.read(text)
    whole = export.write(_tree(), tmp_path / "whole.nc")
    cut = tmp_path / "cut.nc"
    cut.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(FileError, match=r"cannot read .*cut.nc"):
        export.read(cut)
    flat = tmp_path / "flat.nc"
    xr.Dataset({"x": 1.0}).to_netcdf(flat, engine="h5netcdf")
    with pytest.raises(FileError, match="holds no groups"):
        export.read(flat)
