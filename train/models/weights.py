"""Reading a file of weights into a model: strictly, running no code from it, and with errors that help."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def load_weights(model: nn.Module, path: str | PathLike[str]) -> None:
    """Copy the weights of a file into `model`, every key and shape matching, or raise and leave it unchanged.

    The file holds a state dict, bare or under the key `model` (mdistiller's checkpoints) or `state_dict`; a
    `module.` before every key, as DataParallel leaves it, is dropped. Of a whole distiller (`student.*`, `teacher.*`;
    mdistiller's `latest` and `best`) it is the student, or the teacher where only that one is such a model. Only
    tensors and plain values are read.
    """
    path = Path(path)
    if not path.is_file():
        came = "a directory" if path.is_dir() else "no such file"
        raise FileNotFoundError(
            f"load_weights: expected a file of weights at {path}, got {came}; check the path, or download it"
        )
    state = _half_for(model, _find_state(_read(path), path))
    _check_entries(model, state, path)
    model.load_state_dict(state, strict=True)


def _read(path: Path) -> Any:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        # torch.load compares no checksums: it reads a file with a flipped byte without a word.
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
    except Exception as error:  # the bytes in the file decide what is raised: no shorter list is complete
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"load_weights: expected {path} to be a file of torch.save with tensors and plain values alone, "
            f"got {path.stat().st_size} bytes that torch.load(weights_only=True) refuses ({reason}); "
            "if it is damaged, download it again; if it holds other objects, save its state dict alone"
        ) from error
    if damaged is not None:
        raise ValueError(
            f"load_weights: expected {path} to be undamaged, got a wrong checksum in its record {damaged}; "
            "download it again, or save it again if it was written with "
            "torch.serialization.set_crc32_options(False)"
        )
    return content


def _find_state(content: Any, path: Path) -> dict[str, Tensor]:
    state = content
    if isinstance(content, Mapping):
        inner = [content[key] for key in ("model", "state_dict") if isinstance(content.get(key), Mapping)]
        state = inner[0] if inner else content
    if not _is_state(state):
        came = f"a dict with keys {list(state)[:8]}" if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"load_weights: expected {path} to hold a state dict, bare or under 'model' or 'state_dict', "
            f"got {came}; give the checkpoint of one model"
        )
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _half_for(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the state of a distiller, the student's or the teacher's part; any other state as it is."""
    halves = [
        {key.removeprefix(part): value for key, value in state.items() if key.startswith(part)}
        for part in ("student.", "teacher.")
    ]
    if not halves[0]:
        return state
    expected = {key: value.shape for key, value in model.state_dict().items()}
    fitting = [half for half in halves if {key: value.shape for key, value in half.items()} == expected]
    return [*fitting, halves[0]][0]


def _is_state(state: Any) -> bool:
    if not isinstance(state, Mapping) or not state:
        return False
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())


def _check_entries(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    reshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": reshaped}
    found = [f"{len(entries)} {kind} ({_first(entries)})" for kind, entries in kinds.items() if entries]
    if found:
        raise ValueError(
            f"load_weights: expected {path} to hold the {len(expected)} entries of {type(model).__name__}, "
            f"got {len(state)} entries, {'; '.join(found)}; give this model's own checkpoint, "
            "or name the model and the number of classes that the checkpoint was trained with"
        )
    broken = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(
            f"load_weights: expected finite weights in {path}, got NaN or infinity in {len(broken)} entries "
            f"({_first(broken)}); the run that wrote them diverged: give an earlier checkpoint"
        )


def _first(entries: Sequence[str], count: int = 3) -> str:
    """The first few of a list that runs into hundreds when the architecture is another one."""
    return ", ".join(entries[:count]) + (", ..." if len(entries) > count else "")
