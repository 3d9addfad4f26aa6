"""The results as a table: a row for each model, and every refusal with a word on whether it is right."""

from __future__ import annotations

import datetime
import json
import platform
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WAYS = ("check", "density", "mean_field", "full_rank", "own guide", "batches", "nuts")
_BAD = ("wrong", "crash", "not ended")
_ABSOLUTE = re.compile(r"/\S*/(?=(?:site-packages|pyro_vi_kit)/)")
_MARKS = {"works": "✓", "refused": "refused", "not asked": "–"}

# Why a refusal is right, by words of its message. What none of these matches is called needless.
_RIGHT = {
    r"structure changes": "stochastic control flow",
    r"HashingMarginal": "a distribution that is a memoised search, without density or support",
    r"every latent site of the model is discrete": "nothing continuous to fit; the example's own guide "
    "or `infer_discrete` is the way",
    r"has no latent sites": "nothing to infer",
    r"draws random numbers outside": "a random density (dropout, batch norm, `torch.randn`)",
    r"finite with its gradient at 0 of": "no density near the origin; `init=` with the example's own "
    "starting point is the way",
    r"not finite at any of": "no density near the origin; `init=` with the example's own starting "
    "point is the way",
    r"holds a dense covariance": "a dense covariance of so many dimensions; `mean_field` and `low_rank` "
    "are the way",
    r"each have a parameter": "Pyro's store holds one of two parameters of a name, and the other is "
    "never trained",
    r"numpy\(\) on Tensor|grad_dtype": "the density leaves torch (NumPy, an inference inside of it)",
    r"make it with validate_args=False": "data outside the support; `validate_args=False` is the way",
    r"whose values cannot be enumerated": "discrete latents of infinitely many or joint values, "
    "which NUTS and SVI with a Gaussian guide cannot take in Pyro either",
    r"hold all their values at once": "uses a discrete value in a way that Pyro's own enumeration "
    "does not take either",
}


def rows(results: Path) -> list[dict[str, Any]]:
    """The lines of one source; none where it was not run."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def is_complete(results: Path) -> bool:
    """Whether a source was run to its end."""
    return any(row["way"] == "source" for row in rows(results))


def write(results: Path, **row: Any) -> None:
    """Results of a source that is not run: a line that says why."""
    results.write_text(json.dumps({"way": "source", **row}) + "\n", encoding="utf-8")


def in_short(results: Path) -> str:
    """How many of its ways ended how."""
    found = rows(results)
    counts = Counter(row["outcome"] for row in found if row["way"] != "source")
    ends = [f"({r['outcome']}: {r['detail'][:150]})" for r in found if r["way"] == "source"]
    return ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) + "  " + "".join(ends)


def markdown(out: Path, command: str, note: str = "") -> str:
    """The whole document.

    Args:
        out: The folder with the results.
        command: What made them.
        note: What is to be said of this run.
    """
    import pyro
    import torch

    import pyro_vi_kit

    every = [row for path in sorted(out.rglob("*.jsonl")) for row in rows(path)]
    tried = [row for row in every if row["way"] != "source"]
    counts = Counter(row["outcome"] for row in tried if row["outcome"] != "not asked")
    models = {(row["source"], row["model"]) for row in tried}
    told = ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())
    asked = Counter(row["way"] for row in tried)
    ways = ", ".join(f"{way} of {asked[way]}" for way in WAYS if asked[way])
    right = sum(row["outcome"] == "refused" and bool(_reason(row["detail"])) for row in tried)
    head = f"""# Pyro's examples and tutorials

Written by `{command}` on {datetime.date.today():%-d %B %Y}: pyro_vi_kit {pyro_vi_kit.__version__}, Pyro
{pyro.__version__}, torch {torch.__version__}, Python {platform.python_version()}.

Every script of Pyro's examples/ and every notebook of its tutorial is run as it stands, with
random data of the same shapes in the place of what it downloads. Each model that it hands to SVI,
MCMC or another of Pyro's algorithms goes through `vi.check`; its density is compared with the
plain Pyro trace at three points (`TraceEnum_ELBO` where discrete sites are summed out); it is
fitted with `mean_field`, `full_rank` and the example's own guide, on minibatches where it declares
them, and sampled with `vi.nuts`. A tick says that the numbers agree, or that a fit of two seconds
ends at a finite ELBO, with draws (of `mean_field` and the example's own guide with verdict, table
and export too), so that it says nothing about convergence.

**{len(models)} models in {len({s for s, _ in models})} sources, {sum(counts.values())} runs: {told}.**
{right} of the refusals are right, in the sense of the last column. Asked: {ways}; a dash is what was not
asked, or does not apply. {note}
"""
    return "\n".join([head, _table(tried), "", _not_run(every)])


def _reason(detail: str) -> str | None:
    """Why a refusal is right; None where it is needless."""
    return next((why for words, why in _RIGHT.items() if re.search(words, detail)), None)


def _table(tried: list[dict[str, Any]]) -> str:
    lines = [
        f"| source | model | {' | '.join(WAYS)} | what is refused, and whether rightly |",
        "|---|---|" + "---|" * (len(WAYS) + 1),
    ]
    for source, model in dict.fromkeys((row["source"], row["model"]) for row in tried):
        own = [row for row in tried if (row["source"], row["model"]) == (source, model)]
        cells = [_cell([row for row in own if row["way"] == way]) for way in WAYS]
        lines.append(f"| {source} | `{model}` | {' | '.join(cells)} | {_words(own)} |")
    return "\n".join(lines)


def _cell(found: Iterable[dict[str, Any]]) -> str:
    outcomes = [row["outcome"] for row in found]
    worst = [o for o in (*_BAD, "refused", "works", "not asked") if o in outcomes]
    return _MARKS.get(worst[0], f"**{worst[0]}**") if worst else "–"


def _words(own: Iterable[dict[str, Any]]) -> str:
    """Each message once, cut short, with the verdict on it."""
    told = {}
    for row in own:
        if row["outcome"] in (*_BAD, "refused"):
            why = _reason(row["detail"])
            judged = f"right: {why}" if why else "needless" if row["outcome"] == "refused" else ""
            text = _ABSOLUTE.sub("", row["detail"].partition("\n")[0])
            text = text if len(text) <= 160 else text[:160] + " …"
            told[why or text] = f"{text} ({judged})" if judged else f"{row['way']}: {text}"
    return "; ".join(told.values()).replace("|", "\\|").replace("*", "\\*")


def _not_run(every: list[dict[str, Any]]) -> str:
    """Sources that were not run, or ended by an error of their own."""
    ended = [row for row in every if row["way"] == "source" and row["outcome"] != "ran"]
    lines = [f"- {row['source']}: {' '.join(row['detail'][:200].split())}" for row in ended]
    return "## Not run, or not to the end\n\n" + "\n".join(lines or ["None."]) + "\n"
