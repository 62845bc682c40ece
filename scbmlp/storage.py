"""Files of models and modules: numbers and text with a checksum, whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import scbmlp

FORMAT = 2


def write_file(path: Path, known: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write what is known of an object as JSON, its ``class`` in it, and tensors by name, to one safetensors file.

    The file is written under another name and renamed: one that was there is whole until then.
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
    """Return what a file says of an object of class `kind`, and its tensors; no code is run from the file.

    What is wrong with the file is told here, and the object is called `what`.
    """
    foreign = ValueError(f"{path.name} holds no scbmlp {what}; give a file that save has written.")
    damaged = ValueError(f"{path.name} is damaged: save the {what} again, or take another copy.")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] != b"{":  # after the length of its header
        raise foreign
    known = None
    try:
        with safe_open(path, "pt") as file:
            stored = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if "scbmlp" in stored:
            known = json.loads(stored["scbmlp"])
            of_class, newer = known["class"], known["format"] > FORMAT
            whole = newer or stored["sha256"] == _digest(stored["scbmlp"], tensors)
    except Exception as error:  # safetensors has an error of its own, made in Rust
        raise damaged from error
    if known is None:
        raise foreign
    if newer:
        raise ValueError(
            f"{path.name} was written by scbmlp {known.get('versions', {}).get('scbmlp')}, in format "
            f"{known['format']}; this version reads up to {FORMAT}: update scbmlp."
        )
    if not whole:
        raise damaged
    if of_class != kind:
        raise ValueError(f"{path.name} holds {of_class}, not {kind}; load it by {of_class}.load.")
    return known, tensors
