"""A first fit from end to end, in under three minutes on two cores: `python -m benchmarks.demo`.

Two models, three guides and three objectives against NUTS. Each model has a process of its own, which
samples its reference and fits its nine posteriors, one after another, with one thread. Files go to
results/demo/.
"""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "demo"

# The slower one first: it gives the time that the whole takes.
MODELS = ("logistic_regression", "eight_schools")
GUIDES = ("mean_field", "full_rank", "affine_coupling")
OBJECTIVES = ("elbo", "iwae", "renyi")

INTRODUCTION = f"""\
Variational fits of {len(MODELS)} Pyro models beside NUTS, {len(GUIDES) * len(OBJECTIVES)} each:
guides {", ".join(GUIDES)}; objectives {", ".join(OBJECTIVES)}.
This takes two to three minutes on two cores; a third of it is NUTS.
"""
LEGEND = """\
How to read the tables: verdict and k-hat come from the fit alone and say whether to believe it
(good; resample: usable after importance resampling; reject: do not use). The errors say how far it
is from NUTS, in posterior standard deviations, 1 being right for the sd ratio. Time is that of one
fit on one core.
"""


def one_model(name):
    """Reference, fits and pictures of one model; its table as text."""
    # Imported in the worker: the parent only waits.
    from pyro_vi_kit.validation.suite import Nuts, format_results, run

    frame = run(
        [ROOT / "models" / f"{name}.py"],
        GUIDES,
        OBJECTIVES,
        OUT,
        # Half of what vi.nuts draws by default, for the sake of time; its report stands in the table.
        nuts=Nuts(chains=4, draws=500, tune=300),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    rows = frame.loc[frame["model"] == name]
    draw(name, rows)
    return format_results(rows), rows["status"].tolist().count("failed")


def draw(name, rows):
    """Marginals over NUTS, one picture per objective, and one of all training bounds."""
    from pyro_vi_kit import plots
    from pyro_vi_kit.core import export
    from pyro_vi_kit.model.modelfile import load_model_file
    from pyro_vi_kit.posterior import load

    model = load_model_file(ROOT / "models" / f"{name}.py")
    reference = export.read(OUT / name / "reference.nc")
    done = rows[rows["status"] == "done"]
    fits = {
        (row["guide"], row["objective"]): load(OUT / row["file"], model)
        for row in done.to_dict(orient="records")
    }
    for objective in OBJECTIVES:
        shown = {guide: fits[guide, goal] for guide, goal in fits if goal == objective}
        if shown:
            plots.marginals(reference, shown, path=OUT / name / f"marginals_{objective}.png")
    if fits:
        named = {" / ".join(key): fit for key, fit in fits.items()}
        plots.losses(named, path=OUT / name / "losses.png")


def main():
    started = time.monotonic()
    # Small tensors: a second thread would only take the other model's core. Set before torch is
    # loaded, which is in the workers.
    os.environ["OMP_NUM_THREADS"] = "1"
    print(INTRODUCTION, flush=True)
    failed, tables = 0, {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=2, mp_context=spawn) as workers:
        running = {workers.submit(one_model, name): name for name in MODELS}
        for future in as_completed(running):
            tables[running[future]], count = future.result()
            failed += count
    from pyro_vi_kit.validation.suite import write_table

    table = write_table(OUT)
    print(*(f"\n{tables[name]}\n" for name in sorted(tables)), LEGEND, sep="\n")
    print(f"Written to {os.path.relpath(OUT)}/:")
    print(f"  {table.name}: every number above and more, one row per fit")
    for name in sorted(tables):
        print(f"  {name}/: marginals_*.png, losses.png; reference.nc and one .nc per fit")
    print(f"\n{time.monotonic() - started:.0f} s in all.")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
