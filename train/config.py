"""Reading a configuration: YAML files, the exceptions of a pair, `KEY VALUE` overrides, and errors that help."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .schema import Config, choices, known_keys


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key."""


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
    exceptions, the file's values, the file's exceptions, the overrides.
    """
    layers = [dict(start or {})] if path is None else _layers(Path(path))
    for layer in layers:
        layer.pop("PAIRS", None)
    last = _from_overrides(overrides)
    if pair is not None:
        last = merge({"DISTILLER": {"TEACHER": pair[0], "STUDENT": pair[1]}}, last)
    # Which exceptions hold depends on the pair, and the pair on all layers: so the values come first.
    plain: dict[str, Any] = {}
    for layer in [*layers, last]:
        plain = merge(plain, {key: value for key, value in layer.items() if key != "WHEN"})
    names = validate(plain).DISTILLER
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, {key: value for key, value in layer.items() if key != "WHEN"})
        for case in layer.get("WHEN", []):
            if any(fnmatchcase(f"{names.TEACHER} -> {names.STUDENT}", pattern) for pattern in case["PAIRS"]):
                merged = merge(merged, {key: value for key, value in case.items() if key != "PAIRS"})
    return validate(merge(merged, last))


def published_pairs(path: str | Path) -> list[str]:
    """The pairs, "teacher -> student", that a file or its base lists under `PAIRS` as having a published recipe."""
    return [pair for layer in _layers(Path(path)) for pair in layer.get("PAIRS", [])]


def validate(values: Mapping[str, Any]) -> Config:
    """The typed configuration of nested `values`; `ConfigError` names each wrong key and the nearest valid one."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(dict(item)) for item in error.errors())) from None


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


def _layers(path: Path, above: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """A file's values and those of the files that it starts from, the furthest first."""
    if not path.is_file():
        close = nearest(path.name, [file.name for file in path.parent.glob("*.yaml")])
        raise ConfigError(f"--cfg: expected a YAML file, got {path}: no such file{close}")
    if path.resolve() in above:
        raise ConfigError(f"BASE: expected files that start from one another in a line, got a circle at {path}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"--cfg: expected YAML in {path}, got {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--cfg: expected sections with keys in {path}, got {type(values).__name__}")
    for case in values.get("WHEN", []):
        if not isinstance(case, dict) or not isinstance(case.get("PAIRS"), list):
            raise ConfigError(f"WHEN: expected entries with a list PAIRS in {path}, got {case!r}")
    base = values.pop("BASE", None)
    below = [] if base is None else _layers(path.parent / base, (*above, path.resolve()))
    return [*below, values]


def _from_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    if len(overrides) % 2:
        raise ConfigError(f"overrides: expected KEY VALUE pairs, got {overrides[-1]!r} without a value")
    values: dict[str, Any] = {}
    for key, text in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            nested = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            nested = text
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = merge(values, nested)
    return values


def _explain(error: dict[str, Any]) -> str:
    """One finding of pydantic's as: the key, what was expected, what came, and the nearest valid."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: expected a known key, got {key!r}{nearest(key, known_keys())}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    close = nearest(str(error["input"]), choices(key)) if error["type"] == "literal_error" else ""
    return f"{key}: expected {expected}, got {error['input']!r}{close}"
