"""``vi-kit`` as a user and as a program sees it: exit codes, messages, streams, JSON."""

import json
import os
import signal
import subprocess
import sys

import arviz as az
import pandas as pd
import pytest
from click.testing import CliRunner
from toys import MODELS

import pyro_vi_kit as vi
from pyro_vi_kit.cli import main
from pyro_vi_kit.cli.options import options_of
from pyro_vi_kit.cli.output import in_options
from pyro_vi_kit.core.errors import FitError, UnknownNameError
from pyro_vi_kit.model.modelfile import load_model_file
from pyro_vi_kit.optimize.stochastic import stochastic

LINE = str(MODELS / "gaussian_regression_2d.py")
EIGHT = str(MODELS / "eight_schools.py")
SHORT = ("--chains", "2", "--draws", "100", "--tune", "100")
HEAD = """
import pyro
import pyro.distributions as dist
import torch
import pyro_vi_kit as vi

Y = torch.tensor([0.3, -0.1, 1.2])

"""
NAN = """
def f(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

MODEL = vi.Model(f, Y.log())
"""
DISCRETE = """
def f(y):
    k = pyro.sample("k", dist.Poisson(0.5))
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)

MODEL = vi.Model(f, Y)
"""
RAISES = """
def f(y):
    pyro.sample("m", dist.Normal(0.0, 1.0))
    raise RuntimeError("no luck")

MODEL = vi.Model(f, Y)
"""
# Twelve strongly correlated numbers, which independent normals cannot follow.
NARROW = """
def f(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(12), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(-1), 0.01), obs=y)

MODEL = vi.Model(f, torch.tensor(0.5))
"""


def vi_kit(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def model(tmp_path):
    def model(text):
        path = tmp_path / "model.py"
        path.write_text(HEAD + text, encoding="utf-8")
        return path

    return model


def assert_one_error(result, *words):
    """Exit code 2, nothing on stdout, one message on stderr without a traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_help_is_light():
    code = (
        "import json, sys\nfrom pyro_vi_kit.cli import main\n"
        "for command in ([], ['fit'], ['bench']):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit as error: assert error.code == 0\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(run.stderr)
    assert {"torch", "pyro", "pandas", "numpy", "arviz", "xarray"}.isdisjoint(loaded)
    assert "reject" in run.stdout
    assert "--guide-option" in run.stdout


@pytest.mark.parametrize("command", ["guides", "objectives", "estimators"])
def test_listings(command):
    printed = vi_kit(command).stdout.splitlines()
    rule = next(i for i, line in enumerate(printed) if set(line) == {"-", " "})
    lines = printed[rule + 1 :]
    described = json.loads(vi_kit(command, "--json").stdout)
    # Cells are wrapped: a row begins where there is something in the first column.
    assert [line.split()[0] for line in lines if line[0] != " "] == list(described)
    assert printed[0].split()[0] == command.removesuffix("s")
    assert max(map(len, lines)) <= 96
    words = " ".join(lines).split()
    for about in described.values():
        more = {"objectives": {"estimators"}, "estimators": {"objectives"}}.get(command, set())
        assert set(about) == {"description", "does", "cost", "use", "paper"} | more
        assert all(about.values())
        # A narrow column breaks long names.
        assert about["paper"].split()[-1] in words


def test_check():
    result = vi_kit("check", EIGHT)
    assert result.exit_code == 0
    assert "✓ model runs" in result.stdout
    document = json.loads(vi_kit("check", EIGHT, "--json").stdout)
    assert document["ok"] is True
    assert {check["outcome"] for check in document["checks"]} <= {"pass", "note"}


def test_check_that_fails(model):
    result = vi_kit("check", model(DISCRETE))
    assert result.exit_code == 2
    assert "✗ discrete sites" in result.stdout
    result = vi_kit("check", model(DISCRETE), "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["ok"] is False


def test_fit_prints_the_verdict_first_and_a_summary(tmp_path):
    out = tmp_path / "line.nc"
    result = vi_kit("fit", LINE, "--out", out)
    assert result.exit_code == 0
    first = result.stdout.splitlines()[0]
    assert first.startswith("full_rank posterior of gaussian_regression_2d: good")
    assert "slope" in result.stdout
    assert result.stderr.strip().endswith("line.nc")
    assert az.from_netcdf(out).posterior.sizes["draw"] == 1000


def test_fit_json(tmp_path):
    out = tmp_path / "line.nc"
    arguments = ("fit", LINE, "--json", "--out", out, "--draws", 50, "--seed", 3)
    document = json.loads(vi_kit(*arguments).stdout)
    assert document["verdict"]["level"] == "good"
    assert document["status"]["converged"] is True
    assert document["seed"] == 3
    assert document["file"] == str(out)
    assert [row["parameter"] for row in document["summary"]] == ["intercept", "slope"]
    assert az.from_netcdf(out).posterior.sizes["draw"] == 50


def test_fit_json_of_a_point_estimate():
    document = json.loads(vi_kit("fit", LINE, "--guide", "delta", "--json").stdout)
    assert document["verdict"] is None
    assert document["elbo"] is None


def test_fit_options_reach_the_guide_and_the_objective():
    result = vi_kit(
        *("fit", LINE, "--guide", "affine_coupling", "--budget", 1, "--json"),
        *("--guide-option", "layers=2", "--guide-option", "hidden=(4, 4)"),
        *("--guide-option", "permutations=reverse"),
        *("--objective", "renyi", "--alpha", 0.3, "--particles", 5, "--method", "stochastic"),
    )
    document = json.loads(result.stdout)
    assert document["objective"] == "renyi"
    assert document["evaluations"] % 5 == 0
    assert document["method"] == "stochastic"


def test_options_of_the_objective_by_their_name_and_by_their_former_flag():
    options = ("--objective", "renyi", "--method", "stochastic", "--steps", 20, "--json")
    given = ("--objective-option", "alpha=0.3", "--objective-option", "particles=5")
    named = json.loads(vi_kit("fit", LINE, *options, *given).stdout)
    former = json.loads(vi_kit("fit", LINE, *options, "--alpha", 0.3, "--particles", 5).stdout)
    assert named["evaluations"] % 5 == 0
    assert named["bound"] == former["bound"]
    assert "--alpha" not in vi_kit("fit", "--help").stdout


def test_options_of_several_guides():
    known = {"names": ["mean_field", "planar", "radial", "affine_coupling"]}
    given = ["layers=4", "radial.layers=2", "hidden=(3, 3)"]
    with main.make_context("vi-kit", ["check", LINE]):
        assert options_of("guide", pairs=given, **known) == {
            "mean_field": {},
            "planar": {"layers": 4},
            "radial": {"layers": 2},
            "affine_coupling": {"layers": 4, "hidden": (3, 3)},
        }
        with pytest.raises(UnknownNameError, match="guide 'flow'"):
            options_of("guide", pairs=["flow.layers=2"], **known)


def test_fit_by_epochs_with_a_checkpoint(tmp_path):
    path = str(tmp_path / "run.ckpt")
    options = ("--guide", "mean_field", "--epochs", "2", "--checkpoint", path, "--json")
    first, again = (json.loads(vi_kit("fit", LINE, *options).stdout) for _ in range(2))
    assert first["method"] == "stochastic"
    assert first["status"]["advice"].startswith("Trained for 2 epochs")
    assert again["elbo"] == first["elbo"]
    refused = vi_kit("fit", LINE, *options, "--seed", "1")
    assert refused.exit_code == 2
    assert "seed 0, now 1" in refused.stderr


def test_a_rejected_fit_exits_with_3(model):
    result = vi_kit("fit", model(NARROW), "--guide", "mean_field")
    assert result.exit_code == 3
    assert "reject" in result.stdout.splitlines()[0]


def test_long_summaries_are_cut_with_a_note(model):
    long = NARROW.replace("12", "50").replace("0.01", "1.0")
    result = vi_kit("fit", model(long))
    assert "... 10 of 50 rows not shown; --json prints all of them" in result.stdout


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("1 / 0", (), ["does not import", "line 9", "ZeroDivisionError"]),
        ("model = vi.Model(print)", (), ["has no MODEL", "'model'"]),
        (RAISES, (), ["no luck"]),
        (NAN, (), ["'y'", "NaN"]),
        (DISCRETE, (), ["discrete latent site(s) k"]),
        (NARROW, ("--guide", "fullrank"), ["Did you mean 'full_rank'"]),
        (NARROW, ("--objective", "elbow"), ["Did you mean 'elbo'"]),
        (NARROW, ("--guide-option", "layers=2"), ["no option 'layers'"]),
        (NARROW, ("--guide-option", "layers"), ["NAME=VALUE"]),
        (NARROW, ("--guide-option", "a=(1"), ["in quotes"]),
        (NARROW, ("--alpha", "0.5"), ["no option 'alpha'"]),
        (NARROW, ("--objective-option", "alpha=0.5"), ["no option 'alpha'"]),
        (NARROW, ("--guide-option", "planar.layers=2"), ["unknown guide 'planar'"]),
        (NARROW, ("--method", "adam"), ["unknown method 'adam'"]),
        (NARROW, ("--engine", "fast"), ["unknown engine 'fast'"]),
        (NARROW, ("--guide", "aut"), ["Did you mean 'auto'"]),
        (NARROW, ("--tol", "-1"), ["--tol must be a positive number"]),
        (
            NARROW,
            ("--engine", "pyro", "--epochs", "2"),
            ["--epochs are", "leave out --engine pyro"],
        ),
        (NARROW, ("--out", "fit.csv"), ["--out fit.csv", "end it in .nc"]),
        (NARROW, ("--out", "/no/such/folder/x.nc"), ["cannot write", "mkdir -p"]),
        (NARROW, ("--out", "/"), ["cannot write"]),
        (NARROW, ("--guide", "amortized"), ["--guide full_rank"]),
        (NARROW, ("--guide", "delta", "--objective", "iwae"), ["point"]),
    ],
)
def test_wrong_requests(model, text, options, words):
    assert_one_error(vi_kit("fit", model(text), *options), *words)


def test_a_missing_file_and_a_folder(tmp_path):
    assert_one_error(vi_kit("fit", tmp_path / "none.py"), "no model file")
    assert_one_error(vi_kit("fit", tmp_path), "is a folder")


def test_an_output_path_is_refused_before_the_model_is_loaded(model):
    result = vi_kit("fit", model("1 / 0"), "--out", "/no/such/folder/x.nc")
    assert_one_error(result, "cannot write")


def test_wrong_usage():
    for arguments in (["fit"], ["fit", EIGHT, "--gide", "x"], ["fot"], ["fit", EIGHT, "--seed=x"]):
        result = vi_kit(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "Traceback" not in result.stderr


def fail_with(monkeypatch, error):
    def fit(*args, **kwargs):
        raise error

    monkeypatch.setattr(vi, "fit", fit)


def test_the_unexpected(monkeypatch):
    fail_with(monkeypatch, RuntimeError("a bug\nin two lines"))
    result = vi_kit("fit", LINE)
    assert result.exit_code == 1
    assert result.stderr == "error: RuntimeError: a bug (unexpected; --debug shows where)\n"


@pytest.mark.parametrize("arguments", [("--debug", "fit", LINE), ("fit", LINE, "--debug")])
def test_debug_shows_the_traceback(monkeypatch, arguments):
    fail_with(monkeypatch, RuntimeError("a bug"))
    result = vi_kit(*arguments)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: RuntimeError: a bug")


def test_interrupted(monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    result = vi_kit("fit", LINE)
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


def test_an_interrupted_fit_keeps_what_it_has(monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stochastic, "_run", interrupted)
    out = tmp_path / "line.nc"
    result = vi_kit("fit", LINE, "--method", "stochastic", "--out", out)
    assert result.exit_code == 130
    assert "interrupted" in result.stdout
    assert out.is_file()


def test_what_a_failed_fit_could_not_write_is_told_of(monkeypatch, tmp_path):
    found = vi.fit(load_model_file(LINE), "mean_field", seed=0)

    def full(*args):
        raise OSError(28, "No space left on device")

    def raising(*args, **kwargs):
        raise FitError("the fit stopped: the model raised ValueError", found)

    monkeypatch.setattr(vi.Posterior, "save", full)
    monkeypatch.setattr(vi, "fit", raising)
    result = vi_kit("fit", LINE, "--out", tmp_path / "line.nc")
    assert result.exit_code != 0
    assert "was not written: OSError: [Errno 28] No space left on device" in result.stderr
    assert "the model raised ValueError" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_control_c_from_outside():
    arguments = ["fit", EIGHT, "--guide", "affine_coupling", "--tol", "1e-9", "--progress"]
    command = [sys.executable, "-c", "from pyro_vi_kit.cli import main; main()", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stderr.read(1)  # the progress bar: the fit runs, and would for a minute
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_quiet_and_json_keep_the_streams_apart(tmp_path):
    result = vi_kit("fit", LINE, "--quiet", "--out", tmp_path / "x.nc")
    assert result.stderr == ""
    result = vi_kit("fit", LINE, "--json", "--progress")
    json.loads(result.stdout)


def test_nuts(tmp_path):
    out = tmp_path / "nuts.nc"
    result = vi_kit("nuts", LINE, *SHORT, "--out", out)
    assert result.exit_code == (3 if "NOT converged" in result.stdout else 0)
    assert result.stdout.startswith("NUTS posterior of gaussian_regression_2d: ")
    assert "slope" in result.stdout
    assert az.from_netcdf(out).posterior.sizes["chain"] == 2
    document = json.loads(vi_kit("nuts", LINE, *SHORT, "--json").stdout)
    assert document["max_rhat"] > 0.9
    assert {row["parameter"] for row in document["summary"]} == {"intercept", "slope"}


def test_numbers_are_called_by_their_coords(model):
    text = """
def f(y):
    with pyro.plate("city", 3):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

MODEL = vi.Model(f, Y, coords={"city": ["Lincoln", "Bonn", "Lima"]})
"""
    named = ["theta[Lincoln]", "theta[Bonn]", "theta[Lima]"]
    short = ("--chains", 2, "--draws", 20, "--tune", 20, "--json")
    document = json.loads(vi_kit("nuts", model(text), *short).stdout)
    assert [row["parameter"] for row in document["summary"]] == named
    assert any(name in document["warnings"] for name in named)
    document = json.loads(vi_kit("fit", model(text), "--json", "--quiet").stdout)
    assert [row["parameter"] for row in document["summary"]] == named


@pytest.mark.parametrize(
    ("said", "spoken"),
    [
        ("steps= must be", "--steps must be"),
        ("leave batch_size= out", "leave --batch-size out"),
        ("use guide='mean_field'.", "use --guide mean_field."),
        ("raise tol=0.5.", "raise --tol 0.5."),
        ("as in vi.fit(model, steps=10): steps=10", "as in vi.fit(model, steps=10): --steps 10"),
        ("optimizer= is no option", "optimizer= is no option"),
        ("Epochs(rate=) and x.steps=3", "Epochs(rate=) and x.steps=3"),
    ],
)
def test_messages_speak_of_the_options_of_a_command(said, spoken):
    assert in_options(said, main.commands["fit"]) == spoken


def test_doubts_about_nuts_are_not_hidden():
    short = ("--chains", 2, "--draws", 10, "--tune", 10)
    result = vi_kit("nuts", LINE, *short, "--quiet")
    assert "NOT converged" in result.stdout.splitlines()[0]
    assert "warning: " in result.stderr
    document = json.loads(vi_kit("nuts", LINE, *short, "--json").stdout)
    assert document["converged"] is False
    assert document["warnings"]
    assert result.exit_code == 3
    assert "--draws" in result.stderr
    assert "draws=" not in result.stderr + result.stdout


def test_compare(tmp_path):
    out = tmp_path / "new" / "results"
    result = vi_kit("compare", LINE, "--guides", "mean_field, full_rank", *SHORT, "--out", out)
    assert result.exit_code == 0
    assert "mean_field" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "full_rank.nc",
        "losses.png",
        "marginals.png",
        "mean_field.nc",
        "reference.nc",
        "table.csv",
    ]
    assert set(pd.read_csv(out / "table.csv")["fit"]) == {"mean_field", "full_rank"}


def test_compare_json():
    document = json.loads(vi_kit("compare", LINE, "--guides", "delta", *SHORT, "--json").stdout)
    assert document["table"][-1]["parameter"] == "overall"
    assert document["table"][-1]["khat"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--guides", "mean_field,ful_rank"), ["Did you mean 'full_rank'"]),
        (("--guides", ","), ["no guide is given"]),
        (("--guide-option", "layers=2"), ["no option 'layers'"]),
        (("--objective-option", "alpha=2"), ["no option 'alpha'"]),
        (("--guides", "mean_field,amortized"), ["amortized"]),
        (("--guides", "delta", "--objective", "iwae"), ["point"]),
        (("--out", "/dev/null/x"), ["cannot make the folder"]),
        (("--sampler", "stan"), ["unknown sampler"]),
    ],
)
def test_compare_refuses_before_any_run(monkeypatch, options, words):
    if "--sampler" not in options:
        fail_with(monkeypatch, RuntimeError("ran"))
    assert_one_error(vi_kit("compare", LINE, "--quiet", *options), *words)


def test_bench(tmp_path):
    arguments = ("bench", LINE, "--guides", "mean_field,delta", "--objectives", "elbo,iwae")
    arguments += ("--no-nuts", "--out", tmp_path / "out")
    result = vi_kit(*arguments)
    assert result.exit_code == 0
    assert "not applicable: delta / iwae" in result.stdout
    assert "[1/4]" in result.stderr
    resumed = vi_kit(*arguments, "--resume")
    assert resumed.exit_code == 0
    assert resumed.stderr.count("done before") == 4
    assert resumed.stdout == result.stdout


def test_bench_takes_options_of_guides_and_objectives(tmp_path):
    options = ("--guides", "mean_field,radial", "--objectives", "iwae", "--no-nuts")
    options += ("--guide-option", "layers=2", "--out", tmp_path / "out", "--resume")
    first = vi_kit("bench", LINE, *options, "--objective-option", "particles=3")
    assert first.exit_code == 0, first.stderr
    assert vi_kit("bench", LINE, *options, "--particles", 3).stderr.count("done before") == 2
    # An option of the objective is part of what a result depends on.
    assert "done before" not in vi_kit("bench", LINE, *options, "--particles", 4).stderr
    refused = vi_kit("bench", LINE, *options, "--objective-option", "width=3")
    assert_one_error(refused, "no option 'width'")


def test_bench_with_a_failing_cell_exits_with_1(model, tmp_path):
    arguments = ("--guides", "mean_field", "--no-nuts", "--out", tmp_path / "out")
    result = vi_kit("bench", model(RAISES), LINE, *arguments)
    assert result.exit_code == 1
    assert "no luck" in result.stdout
    assert "mean_field / elbo" in result.stdout


def test_bench_refuses_names_before_any_run(tmp_path):
    result = vi_kit("bench", LINE, "--objectives", "elbo,iwa", "--out", tmp_path / "out")
    assert_one_error(result, "Did you mean 'iwae'")
    assert not (tmp_path / "out").exists()


def test_bench_interrupted(monkeypatch, tmp_path):
    def fit(*args, **kwargs):
        raise KeyboardInterrupt

    from pyro_vi_kit.validation.suite import runner

    monkeypatch.setattr(runner, "fit", fit)
    result = vi_kit("bench", LINE, "--no-nuts", "--out", tmp_path)
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    assert result.stdout == ""


def test_as_a_program():
    """Through the installed entry point, streams and exit code as a shell sees them."""
    code = "from pyro_vi_kit.cli import main; main()"
    command = [sys.executable, "-c", code, "fit", LINE, "--guide", "nonsense"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("error: unknown guide 'nonsense'")


# Raises at the origin.
FAR = """
def f(y):
    a = pyro.sample("a", dist.Normal(4.0, 0.3))
    pyro.sample("y", dist.Normal(0.0, torch.linalg.cholesky((a - 1.0).reshape(1, 1))[0, 0]), obs=y)

MODEL = vi.Model(f, torch.tensor(0.5))
"""


def test_a_start_is_named(model, tmp_path):
    path = model(FAR)
    assert_one_error(vi_kit("fit", path), "--init median")
    assert vi_kit("fit", path, "--init", "median", "--json").exit_code == 0
    options = ["--init", "median", "--chains", "2", "--draws", "1000", "--quiet"]
    result = vi_kit("compare", path, "--guides", "full_rank", *options, "--json")
    assert result.exit_code == 0
    for command in ("fit", "nuts"):
        assert_one_error(vi_kit(command, path, "--init", "mode"), "--init", "'median'")
