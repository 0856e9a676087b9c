"""Configurations of the field for what is not here: refused by the method's name, with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# DISTILLER.TYPE of mdistiller's methods that compare features, which are also the names of their sections.
_OF_FEATURES = ("AT", "CRD", "FITNET", "KDSVD", "NST", "OFD", "PKT", "REVIEWKD", "RKD", "SP", "VID")
_DOT = (
    "{key}: expected an optimizer step of the weighted loss (SOLVER.TRAINER base), got {came}, mdistiller's DOT "
    "trainer with its two momenta, which is not here; leave SOLVER.TRAINER and SOLVER.DOT out to distil the same pair "
    "without it, or run this file with mdistiller"
)


def refuse_other_methods(values: Mapping[str, Any]) -> None:
    """Raise `ValueError` where nested `values` ask for a method or a trainer of mdistiller that is not here."""
    distiller, solver = values.get("DISTILLER"), values.get("SOLVER")
    method = str(distiller.get("TYPE")) if isinstance(distiller, Mapping) else ""
    # CRD has a trainer of its own: the method is named first, since it is what was asked for.
    if method.upper() in _OF_FEATURES:
        raise ValueError(_feature_method("DISTILLER.TYPE", method))
    if isinstance(solver, Mapping):
        trainer = str(solver.get("TRAINER", "base"))
        if trainer.lower() in ("dot", "crd_dot"):
            raise ValueError(_DOT.format(key="SOLVER.TRAINER", came=repr(trainer)))
        if "DOT" in solver:
            raise ValueError(_DOT.format(key="SOLVER.DOT", came=repr(solver["DOT"])))
        if trainer.lower() == "crd":
            raise ValueError(_feature_method("SOLVER.TRAINER", trainer))
    for name in values:
        if str(name).upper() in _OF_FEATURES:
            raise ValueError(_feature_method(str(name), name) + "; for another method leave its section out")


def _feature_method(key: str, name: str) -> str:
    return (
        f"{key}: expected a method that distils logits (NONE, KD or DKD, with their switches), got {name!r}, which "
        "compares features and is not here; run this file with mdistiller, or distil the same pair by a method that is "
        "here, as `--cfg train/configs/cifar100/kd.yaml --pair TEACHER STUDENT`"
    )
