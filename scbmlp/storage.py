"""Files of models and modules: numbers and text with a checksum, whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import scbmlp

FORMAT = 2  # files of the first were torch's
STATISTICS = ("mean", "sd", "covariance", "target")  # in the order in which the first format had them


def write_file(path: Path, known: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write what is known of an object, and its tensors, to one file.

    The format is safetensors, which holds numbers and text alone. The file is written under another name and renamed:
    one that was there is whole until then.

    Parameters
    ----------
    path
        File to write.
    known
        Anything that JSON holds, the object's ``class`` among it; format and versions of packages are added.
    tensors
        Tensors by name.
    """
    versions = {module.__name__: module.__version__ for module in (scbmlp, torch, np, lightning)}
    known = {"format": FORMAT, **known, "versions": versions}
    stored = {"scbmlp": json.dumps(known, default=lambda value: value.item())}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stored["sha256"] = _digest(stored["scbmlp"], tensors)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, stored)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """Return a checksum of all that a file holds."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def read_file(path: Path, kind: str, what: str = "model") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file says of an object, and its tensors; whatever is wrong with the file is told here.

    Parameters
    ----------
    path
        File to read; those of earlier versions are read too, and no code is run from any.
    kind
        Name of the class that it is to hold.
    what
        What to call it in a message.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file holds nothing of scbmlp or another class, is damaged, or was written by a later version.
    """
    foreign = ValueError(f"{path.name} holds no scbmlp {what}; give a file that save has written.")
    damaged = ValueError(f"{path.name} is damaged: save the {what} again, or take another copy.")
    known, tensors = _read(path, foreign, damaged)
    if known["class"] != kind:
        raise ValueError(f"{path.name} holds {known['class']}, not {kind}; load it by {known['class']}.load.")
    return known, tensors


def _read(path: Path, foreign: Exception, damaged: Exception) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with path.open("rb") as file:
        start = file.read(9)
    if start[:2] == b"PK":
        return _read_earlier(path, foreign, damaged)
    if len(start) < 9 or start[8:] != b"{":
        raise damaged if 0 < len(start) < 9 and start[-4:] == bytes(4) else foreign
    try:
        with safe_open(path, "pt") as file:
            stored = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors has an error of its own, made in Rust
        raise damaged from error
    if "scbmlp" not in stored:
        raise foreign
    try:
        known = json.loads(stored["scbmlp"])
        newer = known["format"] > FORMAT
        known["class"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged from error
    if newer:
        raise ValueError(
            f"{path.name} was written by scbmlp {known.get('versions', {}).get('scbmlp')}, in format "
            f"{known['format']}; this version reads up to {FORMAT}: update scbmlp."
        )
    if stored.get("sha256") != _digest(stored["scbmlp"], tensors):
        raise damaged
    return known, tensors


def _read_earlier(path: Path, foreign: Exception, damaged: Exception) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file of the time when models were written by torch."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, ValueError) as error:
        # torch refuses objects that could run code, and cannot open a file cut short: a model is neither.
        raise (foreign if isinstance(error, pickle.UnpicklingError) else damaged) from error
    if not (isinstance(stored, dict) and {"class", "config", "weights", "gene_names", "output_names"} <= stored.keys()):
        raise foreign
    tensors = dict(stored["weights"])
    if stored.get("statistics"):
        tensors |= {f"statistics.{name}": part for name, part in zip(STATISTICS, stored["statistics"], strict=False)}
    known = {"options": {}, "history": [], "baseline": None, "best_epoch": None, "trials": None, "layer": None}
    known |= {name: value for name, value in stored.items() if name not in ("weights", "statistics")}
    known["named"] = [known[name] != list(range(len(known[name]))) for name in ("gene_names", "output_names")]
    return known, tensors
