"""A configuration put together: YAML files, the exceptions of a pair, `KEY VALUE` overrides, and errors that help."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from .naming import name_after_overrides
from .schema import Config, choices, known_keys
from .yaml_file import RepeatedKey, read_yaml


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key."""


def _pairs(value: Any) -> Any:
    """Pairs of a file, or patterns of pairs: one without the arrow would never match, and nothing would tell."""
    if not (isinstance(value, list) and value and all(isinstance(pair, str) and " -> " in pair for pair in value)):
        raise ValueError(f'expected a list of "teacher -> student", got {value!r}')
    return value


_Pairs = Annotated[list[str], BeforeValidator(_pairs)]


class _Case(BaseModel):
    """An entry of WHEN: the values of the pairs that its patterns match."""

    model_config = ConfigDict(extra="allow", validate_default=True)
    PAIRS: _Pairs = []


class _Layer(BaseModel):
    """A file: its values are what pydantic calls extra, beside the keys that tell how they are put together."""

    model_config = ConfigDict(extra="allow")
    BASE: str | None = None
    WHEN: list[_Case] = []
    PAIRS: _Pairs | None = None


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    pair: Sequence[str] | None = None,
    start: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration of a file, with `pair` (teacher, student) and `KEY VALUE` overrides on top.

    Without a file it is `start`, nested values, or else the defaults.

    A file may name a `BASE` file to start from, and hold `WHEN`, a list of `PAIRS` patterns ("teacher -> student")
    with the values that differ for them. The order, each over the one before: the base's values, the base's
    exceptions, the file's values, the file's exceptions, the overrides. EXPERIMENT.NAME, unless they give it, is
    that of the file and what they change (`name_after_overrides`): a name that is given says it all.
    """
    layers = [_layer(start or {})] if path is None else _layers(Path(path))
    last = _from_overrides(overrides)
    if pair is not None:
        last = merge({"DISTILLER": {"TEACHER": pair[0], "STUDENT": pair[1]}}, last)
    # Which exceptions hold depends on the pair, and the pair on all layers: so the values come first.
    plain: dict[str, Any] = {}
    for layer in layers:
        plain = merge(plain, layer.model_extra)
    names = validate(merge(plain, last)).DISTILLER
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer.model_extra)
        for case in layer.WHEN:
            # A misspelt key is found whatever the pair.
            if unknown := [key for key in flatten(case.model_extra) if key not in known_keys()]:
                raise ConfigError(f"WHEN: {_unknown(unknown[0])}")
            if any(fnmatchcase(f"{names.TEACHER} -> {names.STUDENT}", pattern) for pattern in case.PAIRS):
                merged = merge(merged, case.model_extra)
    config, given = validate(merge(merged, last)), flatten(last)
    if "EXPERIMENT.NAME" in given:
        return config
    try:
        before = flatten(validate(merged).model_dump())
    except ConfigError:  # right with the overrides alone
        before = {}
    values = flatten(config.model_dump())
    changed = {key: values[key] for key in values if key in given and values[key] != before.get(key)}
    return validate(merge(config.model_dump(), {"EXPERIMENT": {"NAME": name_after_overrides(config, changed)}}))


def published_pairs(path: str | Path) -> list[str]:
    """The pairs, "teacher -> student", that a file or its base lists under `PAIRS` as having a published recipe."""
    return [pair for layer in _layers(Path(path)) for pair in layer.PAIRS or []]


def validate(values: Mapping[str, Any]) -> Config:
    """The typed configuration of nested `values`; `ConfigError` names each wrong key and the nearest valid one."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain_all(error)) from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section; neither changes."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def nearest(word: str, words: Sequence[str]) -> str:
    """The end of an error that names the closest valid word; empty where none is close.

    Of dotted keys the last part counts first: for `LR` that is `SOLVER.LR`.
    """
    same = [known for known in words if known.split(".")[-1].upper() == word.split(".")[-1].upper()]
    words = same or words
    if len(same) == 1:
        return f"; nearest: {same[0]}"
    folded = {known.upper(): known for known in words}
    close = difflib.get_close_matches(word.upper(), folded, n=1, cutoff=0.4)
    return f"; nearest: {folded[close[0]]}" if close else ""


def _layers(path: Path, above: tuple[Path, ...] = ()) -> list[_Layer]:
    """A file and those that it starts from, the furthest first."""
    key = "BASE" if above else "--cfg"
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        files = sorted(file.name for file in folder.glob("*.yaml"))
        found = f"a folder, with {', '.join(files) or 'no YAML file'} in it" if path.is_dir() else "no such file"
        raise ConfigError(f"{key}: expected a YAML file, got {path}: {found}{nearest(path.name, files)}")
    if path.resolve() in above:
        raise ConfigError(f"BASE: expected files that start from one another in a line, got a circle at {path}")
    try:
        values = read_yaml(path)
    except RepeatedKey as error:
        raise ConfigError(f"{key}: expected each key once in {path}, got {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: expected YAML in UTF-8 in {path}, got {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{key}: expected sections with keys in {path}, got {type(values).__name__} {values!r}")
    layer = _layer(values or {}, f", in {path}")
    below = [] if layer.BASE is None else _layers(path.parent / layer.BASE, (*above, path.resolve()))
    return [*below, layer]


def _layer(values: Mapping[str, Any], where: str = "") -> _Layer:
    try:
        return _Layer.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain_all(error) + where) from None


def _from_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The values as the text that they are: the type of its key reads each."""
    if len(overrides) % 2:
        raise ConfigError(f"overrides: expected KEY VALUE pairs, got {overrides[-1]!r} without a value")
    values: dict[str, Any] = {}
    for key, text in zip(overrides[::2], overrides[1::2], strict=True):
        nested: Any = text
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = merge(values, nested)
    return values


def _unknown(key: str) -> str:
    return f"{key}: expected a known key, got {key!r}{nearest(key, known_keys())}"


def _explain_all(error: ValidationError) -> str:
    return "; ".join(_explain(dict(item)) for item in error.errors())


def _explain(error: dict[str, Any]) -> str:
    """One finding of pydantic's as: the key, what was expected, what came, and the nearest valid."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return _unknown(key)
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return message if message.startswith(key) else f"{key}: {message}"  # a section's checks name the key themselves
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    if error["type"] == "model_type":
        expected = "a section with keys"
    close = nearest(str(error["input"]), choices(key)) if error["type"] == "literal_error" else ""
    return f"{key}: expected {expected}, got {error['input']!r}{close}"
