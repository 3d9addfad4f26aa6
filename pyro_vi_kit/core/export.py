"""Plain groups of named arrays as ArviZ data, and that data as netCDF files.

What is built here is an ``arviz.InferenceData`` with ArviZ 0.x and an ``xarray.DataTree`` with
ArviZ 1.x; both are made of the same datasets and written to the same files.
"""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pyro_vi_kit.core import files
from pyro_vi_kit.core.errors import FileError, ModelError, first_line
from pyro_vi_kit.core.version import __version__

if TYPE_CHECKING:
    import xarray as xr  # a second of start-up, and a fit does without

Tree: TypeAlias = Any  # arviz.InferenceData (ArviZ 0.x) or xarray.DataTree (ArviZ 1.x)

_SAMPLE_DIMS = ("chain", "draw")
_ENGINE = "h5netcdf"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LABEL_TYPES = (str, int, float, np.integer, np.floating, np.bool_)
# Groups of the model's own sites, in which one name means one thing. Arguments and a fit's records are
# not among them: a plate "county" and an argument `county`, its indices, are usual.
_OF_SITES = frozenset(
    {
        "posterior",
        "unconstrained_posterior",
        "posterior_predictive",
        "log_likelihood",
        "prior",
        "prior_predictive",
        "observed_data",
    }
)
# Bytes of a variable from which on compressing it saves more than the chunks' index takes.
_COMPRESSED = 16_384


@dataclass(frozen=True, eq=False)
class Group:
    """One group of an ArviZ object, as plain arrays.

    Attributes:
        variables: Arrays by name: [chain, draw, *shape] where ``sampled``, else [*shape].
        dims: Names of the dimensions of ``*shape``; one that has no name is called
            ``"{variable}_dim_{position}"``.
        sampled: Whether the arrays' leading dimensions are (chain, draw).
        attrs: Facts about the group. Strings, numbers and lists of them are kept; anything else
            is stored as JSON text.
        numbered: Whether dimensions without coords get the numbers of their positions.
    """

    variables: Mapping[str, Any]
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sampled: bool = True
    attrs: Mapping[str, Any] = field(default_factory=dict)
    numbered: bool = True


def to_arviz(
    groups: Mapping[str, Group],
    coords: Mapping[str, Sequence[Any]] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Tree:
    """Make an ArviZ object: ``InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x.

    Names are changed only where ArviZ or netCDF cannot hold them. A dimension that a variable has
    twice becomes ``"school"`` and ``"school_1"``; one called like a site, ``"chain"`` or
    ``"draw"`` gets the suffix ``"_dim"``, and a variable called ``"chain"`` or ``"draw"`` the
    suffix ``"_site"``; a slash becomes a dot, and a control character ``"_"``. Where two names become
    one, the second gets a number. Complex arrays are split into ``"{name}_real"`` and
    ``"{name}_imag"``. Groups without variables are left out.

    Args:
        groups: Arrays by group, in the order in which they shall appear.
        coords: What a dimension's positions are called; other dimensions are numbered from 0.
            Dates and times become ``datetime64``, but with a time zone their text, as whatever else is
            no number or string.
        attrs: Facts about the whole. ``created_at`` (UTC), ``inference_library`` and
            ``inference_library_version`` are added here and to every group unless they are given.

    Returns:
        The ArviZ object, in memory.

    Raises:
        ModelError: If an array's dimensions do not fit their names, their coords or each other, or
            if it cannot be stored.
    """
    stamp = {
        "created_at": datetime.now(UTC).isoformat(),
        "inference_library": "pyro_vi_kit",
        "inference_library_version": __version__,
    }
    names = _variable_names(groups)
    built = {}
    for name, group in groups.items():
        if not group.variables:
            if group.attrs:
                raise ModelError(
                    f"group {name!r} has attrs but no variables and would be lost: "
                    "move its attrs to the whole"
                )
            continue
        others = [g for n, g in groups.items() if name not in _OF_SITES or n in _OF_SITES]
        taken = {names[site] for other in others for site in other.variables}
        built[name] = _dataset(name, group, coords or {}, names, taken)
        built[name].attrs.update(_plain_attrs({**stamp, **group.attrs}))
    return _assemble(built, _plain_attrs({**stamp, **(attrs or {})}))


def datasets(tree: Tree) -> dict[str, xr.Dataset]:
    """The groups of an ArviZ object, of either kind, by name."""
    import xarray as xr

    if isinstance(tree, xr.DataTree):
        return {name: node.to_dataset() for name, node in tree.children.items()}
    return {name: tree[name] for name in tree.groups()}


def write(tree: Tree, path: str | os.PathLike[str]) -> Path:
    """Write an ArviZ object to a netCDF-4 file, all of it or nothing, with a checksum at its end.

    A list of one element is read back as the element: netCDF does not tell them apart.

    Args:
        tree: What ``to_arviz`` or ArviZ made.
        path: The file; one that exists is replaced once the new one is complete.

    Returns:
        The path of the file.

    Raises:
        FileError: If the file cannot be written.
    """
    return files.write(path, files.sealed(_netcdf(tree)))


def _netcdf(tree: Tree) -> bytes:
    """The file in memory: HDF5 takes the whole process with it where a disk is full."""
    import h5netcdf
    import xarray as xr
    from xarray.backends import H5NetCDFStore

    whole = {"/": xr.Dataset(attrs=tree.attrs)}
    whole |= {f"/{name}": dataset.drop_encoding() for name, dataset in datasets(tree).items()}
    memory = io.BytesIO()
    with h5netcdf.File(memory, "w") as file:
        for name, dataset in whole.items():
            store = H5NetCDFStore(file, group=name)
            dataset.dump_to_store(store, encoding=_encoding(dataset))
    return memory.getvalue()


def _encoding(dataset: xr.Dataset) -> dict[str, Any]:
    """Compression for the variables that are worth it."""
    return {
        str(name): {"zlib": True, "complevel": 1, "shuffle": True}
        for name, variable in dataset.variables.items()
        if variable.dtype.kind in "biuf" and variable.nbytes >= _COMPRESSED
    }


def read(path: str | os.PathLike[str]) -> Tree:
    """Read a netCDF-4 file of groups into memory, as the installed ArviZ's kind of object.

    Args:
        path: A file that ``write`` or ArviZ wrote.

    Returns:
        The ArviZ object. The file is closed again.

    Raises:
        FileError: If the file is missing, is not netCDF-4, holds no groups, or is not what was written.
    """
    if not isinstance(path, str | os.PathLike):
        raise FileError(f"a file is named by its path, got {type(path).__name__}")
    source = Path(path).expanduser()
    try:
        content = source.read_bytes()
    except (OSError, ValueError) as error:
        if source.is_file():
            raise FileError(f"cannot read {source}: {error}") from error
        raise FileError(
            f"no file {source}: check the path, it must be a netCDF file (.nc)"
        ) from error
    content, _ = files.unsealed(content, source)
    try:
        groups, attrs = _groups(content)
    except Exception as error:  # whatever HDF5 and xarray say of bytes that are no netCDF
        raise FileError(
            f"cannot read {source} as netCDF-4: {type(error).__name__}: {first_line(error)}; was it "
            "written by pyro_vi_kit or ArviZ, and is it whole?"
        ) from error
    if not groups:
        raise FileError(f"{source} holds no groups: it is netCDF, but not of an ArviZ object")
    return _assemble(groups, attrs)


def _groups(content: bytes) -> tuple[dict[str, xr.Dataset], dict[str, Any]]:
    """The groups of a netCDF-4 file, in memory, and the attrs of the whole."""
    import xarray as xr

    with xr.open_datatree(io.BytesIO(content), engine=_ENGINE) as tree:
        groups = {name: dataset.load() for name, dataset in datasets(tree).items()}
        attrs = _native_attrs(tree.attrs)
    for dataset in groups.values():
        dataset.attrs = _native_attrs(dataset.attrs)
    return groups, attrs


def arviz_major() -> int:
    """Major version of the installed ArviZ, without importing it."""
    return int(importlib.metadata.version("arviz").split(".")[0])


def import_arviz() -> ModuleType:
    """The ``arviz`` module, without the announcement of 1.x that 0.23 makes once a day."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        import arviz
    return arviz


def _assemble(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, Any]) -> Tree:
    """The installed ArviZ's kind of object. Nothing else here depends on ArviZ's version."""
    import xarray as xr

    if arviz_major() < 1:
        make = import_arviz().InferenceData
        return make(attrs=dict(attrs), warn_on_custom_groups=False, **groups)
    root = {"/": xr.Dataset(attrs=dict(attrs))}
    return xr.DataTree.from_dict({**root, **{f"/{name}": groups[name] for name in groups}})


def _dataset(
    name: str,
    group: Group,
    coords: Mapping[str, Sequence[Any]],
    called: Mapping[str, str],
    taken: set[str],
) -> xr.Dataset:
    """One group's dataset: every variable with named dimensions, every dimension with a coord."""
    import xarray as xr

    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    labels: dict[str, np.ndarray] = {}
    owners: dict[str, str] = {}
    for site, values in group.variables.items():
        array = _storable(site, values)
        names = _dim_names(site, array.shape, group, taken)
        for (dim, source), length in zip(names, array.shape, strict=True):
            new = _labels(site, source, length, coords)
            owner = owners.setdefault(dim, site)
            if len(labels.setdefault(dim, new)) != length:
                raise ModelError(
                    f"dimension {source or dim!r} of group {name!r} has length {length} in site "
                    f"{site!r} but {len(labels[dim])} in site {owner!r}: name them apart with dims="
                )
        for key, part in _real_parts(called[site], array).items():
            if key in variables:
                raise ModelError(f"two sites of group {name!r} become {key!r}: rename one of them")
            variables[key] = (tuple(dim for dim, _ in names), part)
    return xr.Dataset(variables, coords=labels if group.numbered else None)


def _dim_names(
    site: str, shape: Sequence[int], group: Group, taken: set[str]
) -> list[tuple[str, str]]:
    """For each dimension of an array its unique name, and the name it has in ``coords``.

    The latter is empty for chains and draws, which have no coords; a plate may be called so.
    """
    lead = _SAMPLE_DIMS if group.sampled else ()
    if len(shape) < len(lead):
        raise ModelError(f"site {site!r} must be [chain, draw, ...], got shape {tuple(shape)}")
    inner = tuple(shape[len(lead) :])
    given = [str(dim) for dim in group.dims.get(site, ())]
    if len(given) > len(inner):
        raise ModelError(
            f"dims of site {site!r} name {len(given)} dimensions {given}, but its shape is {inner}"
        )
    given += [f"{site}_dim_{i}" for i in range(len(given), len(inner))]
    names = [(dim, "") for dim in lead]
    for source in given:
        names.append((_unique_dim(source, {dim for dim, _ in names}, taken), source))
    return names


def _unique_dim(source: str, used: set[str], taken: set[str]) -> str:
    """A dimension's name that neither a variable nor another dimension of its variable has."""
    dim = _safe(source)
    while dim in taken or dim in _SAMPLE_DIMS or not dim.strip("."):
        dim += "_dim"
    candidates = itertools.chain([dim], (f"{dim}_{i}" for i in itertools.count(1)))
    return next(name for name in candidates if name not in used and name not in taken)


def _labels(site: str, dim: str, length: int, coords: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """The coordinate values of a dimension: those given, else 0, 1, ..."""
    if dim not in coords or not dim:
        return np.arange(length)
    values = list(coords[dim])
    if len(values) != length:
        raise ModelError(
            f"dimension {dim!r} has length {length} in site {site!r}, but coords[{dim!r}] holds "
            f"{len(values)} names: give one name for each position"
        )
    times = _times(values)
    if times is not None:
        return times
    if not all(isinstance(value, _LABEL_TYPES) for value in values):
        values = [str(value) for value in values]
    values = [_text(value) if isinstance(value, str) else value for value in values]
    return np.asarray(values) if values else np.arange(0)


def _times(values: Sequence[Any]) -> np.ndarray | None:
    """Dates and times, of Python, NumPy or pandas, as ``datetime64``; None where a value is none.

    A time zone is kept in the text of a label, since ``datetime64`` has none, and so are times before
    1678 and after 2261.
    """
    if not values or not all(isinstance(value, np.datetime64 | date) for value in values):
        return None
    if any(getattr(value, "tzinfo", None) is not None for value in values):
        return None
    # Nanoseconds, in which times are read from a file, end in the years 1677 and 2262.
    since = np.asarray(values, dtype="datetime64[us]").astype(np.int64)
    if (np.abs(since) >= np.iinfo(np.int64).max // 1000).any():
        return None
    return np.asarray(values, dtype="datetime64[ns]")


def _storable(site: str, values: Any) -> np.ndarray:
    """An array of a type that netCDF has; float16 and long double become float64."""
    array = np.asarray(values)
    if array.dtype.kind in "OT" and all(isinstance(value, str) for value in array.flat):
        return array.astype(str)
    if array.dtype.kind not in "biufcUM":
        raise ModelError(
            f"site {site!r} holds {array.dtype} values, which a file cannot hold: "
            "return numbers, booleans or strings"
        )
    if array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8):
        return array.astype(np.float64)
    return array


def _real_parts(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """The array, or two for a complex one, which netCDF cannot hold."""
    if array.dtype.kind != "c":
        return {name: array}
    return {f"{name}_real": np.real(array), f"{name}_imag": np.imag(array)}


def _variable_names(groups: Mapping[str, Group]) -> dict[str, str]:
    """The variable of each site of all groups: names that netCDF can hold, each another."""
    sites = dict.fromkeys(site for group in groups.values() for site in group.variables)
    # Those that need no change keep their names whatever comes before them.
    names = {site: site for site in sites if _variable_name(site) == site}
    for site in sites:
        if site not in names:
            name = _variable_name(site)
            candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
            used = set(names.values())
            names[site] = next(candidate for candidate in candidates if candidate not in used)
    return names


def _variable_name(site: str) -> str:
    """The name of a site's variable; dots alone mean folders in HDF5."""
    name = _safe(site)
    return f"{name}_site" if name in _SAMPLE_DIMS or not name.strip(".") else name


def _safe(name: str) -> str:
    """A name without slashes, which separate groups in netCDF, and without control characters."""
    return _text(_CONTROL.sub("_", str(name).replace("/", ".")))


def _text(value: str) -> str:
    """Text without what a file cannot hold: NUL, and halves of characters."""
    return value.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def _plain_attrs(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that netCDF can hold."""
    return {str(key): _plain(value) for key, value in attrs.items()}


def _native_attrs(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Attributes as they were before netCDF made arrays of them."""
    return {str(key): _native(value) for key, value in attrs.items()}


def _plain(value: Any) -> Any:
    """Text, numbers and flat lists of one of these as they are; anything else as JSON."""
    value = _native(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, list | tuple) and value:
        items = [_native(item) for item in value]
        kinds = {type(item) for item in items}
        if kinds == {str}:
            return [_text(item) for item in items]
        if kinds <= {int, float}:
            return items
    return json.dumps(value, default=lambda item: item.tolist() if _is_numpy(item) else str(item))


def _native(value: Any) -> Any:
    """NumPy scalars and arrays as Python numbers and lists."""
    return value.tolist() if _is_numpy(value) else value


def _is_numpy(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic)
