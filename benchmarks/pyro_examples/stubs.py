"""Random data and empty packages in the place of what an example downloads or may not find installed."""

from __future__ import annotations

import bz2
import contextlib
import datetime
import io
import os
import pickle
import sys
import types
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

# They draw or print, and no model depends on them.
_SHOWN = "seaborn", "visdom", "graphviz", "IPython", "ipywidgets", "corner", "tensorboard", "scanpy"


def install() -> None:
    """Put everything in place; call it in a process of its own, before the example is imported."""
    for name in _SHOWN:
        with contextlib.suppress(ImportError):
            __import__(name)
            continue
        for part in (name, *(f"{name}.{sub}" for sub in ("display", "core", "crs", "feature"))):
            sys.modules[part] = MagicMock(
                name=part, __path__=[], __spec__=None, get_ipython=lambda: None, version_info=(9, 0)
            )
    _module("wget", download=_retrieve)
    _torchvision()
    _lightning()
    urllib.request.urlopen = _urlopen
    urllib.request.urlretrieve = _retrieve
    _datasets()


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(attributes, __path__=[])
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


# -- what is downloaded ---------------------------------------------------------------------------


class _Response(io.BytesIO):
    headers: dict[str, str] = {}  # noqa: RUF012  what pandas asks a response for


def _urlopen(url: Any, *_: Any, **__: Any) -> _Response:
    return _Response(_download(url.full_url if isinstance(url, urllib.request.Request) else url))


def _retrieve(url: str, out: str) -> None:
    Path(out).write_bytes(_download(url))


def _download(url: str) -> bytes:
    name = url.partition("?")[0].rpartition("/")[2]
    if name not in _FILES:
        raise OSError(f"no stand-in for {url}")
    return _FILES[name](np.random.default_rng(0))


def _csv(frame: pd.DataFrame, **options: Any) -> bytes:
    return frame.to_csv(index=False, **options).encode()


def _rugged(rng: np.random.Generator) -> bytes:
    africa, rugged = rng.integers(0, 2, 234), rng.gamma(1.0, 1.3, 234)
    gdp = np.exp(9.2 - 1.9 * africa + rugged * (0.4 * africa - 0.2) + rng.normal(0, 0.9, 234))
    gdp[rng.random(234) < 0.25] = np.nan
    columns = {"isocode": "AAA", "cont_africa": africa, "rugged": rugged, "rgdppc_2000": gdp}
    return _csv(pd.DataFrame(columns))


def _baseball(rng: np.random.Generator) -> bytes:
    hits, season = rng.binomial(45, 0.27, 18), rng.binomial(400, 0.27, 18)
    columns = {
        "FirstName": [f"A{i}" for i in range(18)],
        "LastName": [f"B{i}" for i in range(18)],
        "At-Bats": 45,
        "Hits": hits,
        "BattingAverage": hits / 45,
        "RemainingAt-Bats": 400,
        "RemainingAverage": season / 400,
        "SeasonAt-Bats": 445,
        "SeasonHits": hits + season,
        "SeasonAverage": (hits + season) / 445,
    }
    return _csv(pd.DataFrame(columns), sep="\t")


def _sunspots(rng: np.random.Generator) -> bytes:
    rows = zip(np.arange(1700.5, 2000.5), rng.gamma(1.5, 50, 300).round(1), strict=True)
    return "\n".join(f"{year};{spots};-1;-1;1" for year, spots in rows).encode()


def _states() -> list[str]:
    named = "ME VT NH MA RI CT LA MS AL GA SC".split()  # noqa: SIM905  those that are asked for
    return named + [f"S{i}" for i in range(51 - len(named))]


def _votes(rng: np.random.Generator) -> bytes:
    return pickle.dumps(pd.DataFrame({"votes": rng.integers(3, 40, 51)}, index=_states()))


def _election(years: range) -> Callable[[np.random.Generator], bytes]:
    def make(rng: np.random.Generator) -> bytes:
        share = 0.5 + 0.1 * rng.normal(size=(51, 1)) + 0.03 * rng.normal(size=(51, len(years)))
        parts = np.stack([share, 1 - share], -1).reshape(51, -1) * 1e6
        columns = pd.MultiIndex.from_product([list(years), ["Democrat", "Republican"]])
        frame = pd.DataFrame(parts.round(), index=_states(), columns=columns)
        return pickle.dumps(frame)

    return make


def _qpcr(rng: np.random.Generator) -> bytes:
    label = [f"{2 ** (i % 7)} cell" for i in range(437)]
    frame = pd.DataFrame(rng.normal(size=(437, 48)), index=label)
    return frame.to_csv().encode()


def _chorales(rng: np.random.Generator) -> bytes:
    def song() -> list[tuple[int, ...]]:
        notes = (
            rng.choice(np.arange(43, 97), 4, replace=False) for _ in range(rng.integers(9, 25))
        )
        return [tuple(map(int, chord)) for chord in notes]

    sizes = {"train": 40, "valid": 10, "test": 10}
    return pickle.dumps({split: [song() for _ in range(n)] for split, n in sizes.items()})


def _faces(rng: np.random.Generator) -> bytes:
    pixels = rng.poisson(20, (320, 64 * 64))
    return "\n".join(",".join(map(str, row)) for row in pixels).encode()


def _seals(rng: np.random.Generator) -> bytes:
    rows = [
        (sex, f"{sex}{i}", rng.gamma(2.0, 1.0), rng.vonmises(0, 1), rng.beta(2, 2))
        for sex in ("F", "M")
        for i in range(10)
        for _ in range(60)
    ]
    return _csv(pd.DataFrame(rows, columns=["sex", "ID", "step", "angle", "omega"]))


def _stocks(rng: np.random.Generator) -> bytes:
    dates = pd.date_range("1990-01-01", periods=2000).strftime("%Y-%m-%d")
    close = 100 * np.exp(np.cumsum(0.01 * rng.standard_t(3, 2000)))
    return bz2.compress(_csv(pd.DataFrame({"Date": dates, "Close": close})))


_FILES: dict[str, Callable[[np.random.Generator], bytes]] = {
    "rugged_data.csv": _rugged,
    "EfronMorrisBB.txt": _baseball,
    "SN_y_tot_V2.0.csv": _sunspots,
    "electoral_college_votes.pickle": _votes,
    "us_presidential_election_data_historical.pickle": _election(range(1976, 2016, 4)),
    "us_presidential_election_data_test.pickle": _election(range(2016, 2017, 4)),
    "guo_qpcr.csv": _qpcr,
    "jsb_chorales.pickle": _chorales,
    "faces_training.csv": _faces,
    "prep_seal_data.csv": _seals,
    "snp500.csv.bz2": _stocks,
}


# -- what Pyro's and other loaders give ------------------------------------------------------------


def _datasets() -> None:
    import pyro.contrib.examples.bart as bart
    import pyro.contrib.examples.multi_mnist as multi_mnist
    import pyro.contrib.examples.nextstrain as nextstrain
    import pyro.contrib.examples.scanvi_data as scanvi_data
    import sklearn.datasets as sklearn

    os.makedirs(os.path.expanduser("~/.data"), exist_ok=True)
    mock = scanvi_data.get_data
    bart.load_bart_od = _ridership
    nextstrain.load_nextstrain_counts = _strains
    multi_mnist.load = lambda _: (
        np.random.default_rng(0).integers(0, 256, (1000, 50, 50), dtype=np.uint8),
        np.array([[0] * (i % 3) for i in range(1000)], dtype=object),
    )
    scanvi_data.get_data = lambda dataset="mock", **options: mock(dataset="mock", **options)
    sklearn.fetch_20newsgroups = _news


def _ridership() -> dict[str, Any]:
    counts = torch.distributions.Poisson(100.0).sample(torch.Size([24 * 7 * 60, 4, 4]))
    stations = ["12TH", "ANTC", "EMBR", "SFIA"]
    return {
        "stations": stations,
        "start_date": datetime.datetime(2011, 1, 1),
        "counts": counts,
    }


def _strains() -> dict[str, Any]:
    near = ("Massachusetts", "New York", "Connecticut", "New Hampshire", "Vermont", "New Jersey")
    locations = [f"USA / {state}" for state in (*near, "Maine", "Rhode Island", "Pennsylvania")]
    lineages = ["A", "B.1.1.7", "B.1.617.2", "Q.1", "AY.4", "AY.25"]
    periods, places, strains = 27, len(locations), len(lineages)
    counts = torch.distributions.Poisson(3.0).sample(torch.Size([periods, places, strains]))
    index = counts.nonzero(as_tuple=False).T
    sparse = {"index": index, "value": counts[tuple(index)], "total": counts.sum(-1)}
    return {
        "counts": counts,
        "features": torch.rand(strains, 20).round(),
        "sparse_counts": sparse,
        "locations": locations,
        "lineages": lineages,
        "mutations": [f"S:D{i}G" for i in range(20)],
        "start_date": datetime.datetime(2019, 12, 1),
        "time_step_days": 28,
    }


def _news(**_: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(200)])
    return {"data": [" ".join(rng.choice(words, 40)) for _ in range(500)]}


class _Digits(Dataset):
    """Random grey pictures with labels, as `torchvision.datasets.MNIST` gives them."""

    mirrors: list[str] = []  # noqa: RUF012

    def __init__(self, root: str = "", train: bool = True, transform: Any = None, **_: Any) -> None:
        n = 60_000 if train else 10_000
        generator = torch.Generator().manual_seed(int(train))
        self.data = torch.randint(0, 256, (n, 28, 28), generator=generator).to(torch.uint8)
        self.targets = torch.arange(n) % 10
        self.train_data = self.test_data = self.data
        self.train_labels = self.test_labels = self.targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        if self.transform is None:
            return Image.fromarray(self.data[i].numpy()), int(self.targets[i])
        return self.transform(self.data[i].numpy()), int(self.targets[i])


def _to_tensor(picture: Any) -> torch.Tensor:
    return torch.as_tensor(np.array(picture)).float().div(255).unsqueeze(0)


def _torchvision() -> None:
    def compose(transforms: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
        def apply(x: Any) -> Any:
            for transform in transforms:
                x = transform(x)
            return x

        return apply

    _module("torchvision")
    _module("torchvision.datasets", MNIST=_Digits)
    _module(
        "torchvision.transforms",
        Compose=compose,
        ToTensor=lambda: _to_tensor,
        Normalize=lambda mean, std: lambda x: (x - mean[0]) / std[0],
    )
    _module("torchvision.transforms.functional", to_tensor=_to_tensor, to_pil_image=lambda x: x)
    _module("torchvision.utils", save_image=MagicMock(), make_grid=lambda x, **_: x[0])


def _lightning() -> None:
    class LightningModule(torch.nn.Module):
        def log(self, *_: Any) -> None:
            pass

    class Trainer:
        def __init__(self, **_: Any) -> None:
            pass

        def fit(self, plan: Any, train_dataloaders: Any) -> None:
            for batch in train_dataloaders:
                plan.training_step(batch, 0)

    _module("lightning")
    _module("lightning.pytorch", LightningModule=LightningModule, Trainer=Trainer)
    _module("pytorch_lightning", LightningModule=LightningModule, Trainer=Trainer)
