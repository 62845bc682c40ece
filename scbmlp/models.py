"""Bilinear MLPs for single cells: configuration, training, prediction, and the weights to read."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import lightning
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from sklearn.metrics import accuracy_score, mean_absolute_error, r2_score, recall_score
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from scbmlp.datasets import ExpressionDataset, dense_tensor, match_genes


@dataclass
class Config:
    """Size, regularisation and training of a bilinear MLP.

    Parameters
    ----------
    d_input, d_hidden, d_output
        Number of genes, hidden units and outputs: the axes gene, hid and out of the weights.
    bias
        Add biases to both hidden branches and to the output.
    linear
        Centre the genes on the training mean and add a linear term with weights of its own and a constant, so that
        the bilinear part holds interactions alone.
    n_epochs, batch_size
        Passes over the training cells, and cells a step.
    lr
        Learning rate of Adam at the start; it falls to zero along a cosine.
    dropout_rate
        Chance that a hidden product is dropped in a training step.
    weight_decay
        L2 penalty of Adam. On the factors of a bilinear model it favours interaction matrices of low rank.
    seed
        Seed of the initial weights, the order of the cells and dropout.
    device
        ``"auto"``, or a name that torch understands: ``"cpu"``, ``"cuda:0"``, ``"mps"``.

    Raises
    ------
    ValueError
        A size or rate is out of its range.
    """

    d_input: int
    d_hidden: int
    d_output: int
    bias: bool = False
    linear: bool = False
    n_epochs: int = 100
    batch_size: int = 32
    lr: float = 1e-3
    dropout_rate: float = 0.0
    weight_decay: float = 1e-4
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("d_input", "d_hidden", "d_output", "n_epochs", "batch_size"):
            value = getattr(self, name)
            if not (value >= 1 and value == int(value)):
                raise ValueError(f"Config({name}={value}): a whole number of at least 1 is needed.")
        if not (self.lr > 0 and self.weight_decay >= 0 and 0 <= self.dropout_rate < 1):
            raise ValueError(
                f"Config(lr={self.lr}, weight_decay={self.weight_decay}, dropout_rate={self.dropout_rate}): "
                f"lr must be positive, weight_decay at least 0, dropout_rate at least 0 and below 1."
            )


class _BilinearMLP(nn.Module):
    """What classifier and regressor share; they add the loss, the score and what a prediction is."""

    metric: str

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.gene_names = pd.RangeIndex(cfg.d_input)
        self.output_names = pd.RangeIndex(cfg.d_output)
        with _seeded(cfg.seed):
            # Both branches in one layer, so that x is read once and its transposed weight is B = [L' R'].
            self.branches = nn.Linear(cfg.d_input, 2 * cfg.d_hidden, bias=cfg.bias)
            self.dropout = nn.Dropout(cfg.dropout_rate)
            self.project = nn.Linear(cfg.d_hidden, cfg.d_output, bias=cfg.bias or cfg.linear)
            self.direct = nn.Linear(cfg.d_input, cfg.d_output, bias=False) if cfg.linear else None
        self.register_buffer("center", torch.zeros(cfg.d_input))
        self._rows: list[dict[str, float]] = []

    def _reset(self) -> None:
        """Go back to the seed's initial weights."""
        with _seeded(self.cfg.seed):
            for layer in filter(None, (self.branches, self.project, self.direct)):
                layer.reset_parameters()
        self._rows = []

    # ------------------------------------------------------------------------------------------------ the model

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (cell x out) of cells (cell x gene): P((L x + b_l) * (R x + b_r)) + b_p."""
        if self.cfg.linear:
            x = x - self.center
        left, right = self.branches(x).chunk(2, dim=-1)
        y = self.project(self.dropout(left * right))
        return y if self.direct is None else y + self.direct(x)

    @property
    def w_l(self) -> Tensor:
        """Weights of the left branch (hid x gene), detached."""
        return self.branches.weight.detach()[: self.cfg.d_hidden]

    @property
    def w_r(self) -> Tensor:
        """Weights of the right branch (hid x gene), detached."""
        return self.branches.weight.detach()[self.cfg.d_hidden :]

    @property
    def w_p(self) -> Tensor:
        """Weights from the hidden products to the outputs (out x hid), detached."""
        return self.project.weight.detach()

    @property
    def origin(self) -> np.ndarray:
        """Where the model is a quadratic form around (gene): the training mean if ``cfg.linear``, else 0."""
        return (self.center * self.cfg.linear).cpu().numpy().astype(np.float64)

    # ------------------------------------------------------------------------------------------------- training

    def fit(
        self,
        train: ExpressionDataset,
        val: ExpressionDataset | None = None,
        *,
        ckpt_path: str | Path | None = None,
        **trainer_kwargs: Any,
    ) -> pd.DataFrame:
        """Train from the seed's initial weights.

        Parameters
        ----------
        train, val
            Cells to learn from, and cells to report on after each epoch.
        ckpt_path
            Checkpoint of an interrupted fit to go on from.
        trainer_kwargs
            Handed to ``lightning.Trainer``: ``enable_progress_bar=False`` for a quiet fit, ``default_root_dir=...``
            for a folder that gets a checkpoint after each epoch, ``callbacks=[...]`` for early stopping.

        Returns
        -------
        One row an epoch: ``train_loss``, ``train_<metric>`` (under dropout), ``val_loss``, ``val_<metric>``. An
        interrupted fit keeps its weights, and the rows so far in ``history``.

        Raises
        ------
        ValueError
            The data do not have ``cfg.d_input`` genes and ``cfg.d_output`` outputs, or `val` has others than `train`.
        """
        for dataset in (train,) if val is None else (train, val):
            self.check(dataset, names=False)
        if val is not None and not (
            val.gene_names.equals(train.gene_names) and val.output_names.equals(train.output_names)
        ):
            raise ValueError(
                "val does not have the genes and outputs of train, in its order; cut both from one AnnData."
            )
        self._reset()
        self.gene_names, self.output_names = train.gene_names, train.output_names
        if self.cfg.linear:
            self.center.copy_(torch.as_tensor(np.asarray(train.x.mean(axis=0)).ravel()))
        generator = torch.Generator().manual_seed(self.cfg.seed)
        loaders = [_loader(train, self.cfg.batch_size, generator)]
        loaders += [] if val is None else [_loader(val, max(self.cfg.batch_size, 1024))]
        defaults = {
            "max_epochs": self.cfg.n_epochs,
            "logger": False,
            "enable_checkpointing": "default_root_dir" in trainer_kwargs,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **_accelerator(self.cfg.device),
        }
        with _seeded(self.cfg.seed), _quiet_lightning():
            trainer = lightning.Trainer(**(defaults | trainer_kwargs))
            trainer.fit(_Training(self), *loaders, ckpt_path=ckpt_path)
        return self.history

    @property
    def history(self) -> pd.DataFrame:
        """Losses and metrics of the last fit, a row an epoch."""
        return pd.DataFrame(self._rows, index=pd.RangeIndex(1, len(self._rows) + 1, name="epoch"))

    def check(self, dataset: ExpressionDataset, *, names: bool = True) -> None:
        """Raise an error if a dataset does not fit the model.

        Parameters
        ----------
        dataset
            Cells with their targets.
        names
            Whether the outputs must also have the model's names, in its order.

        Raises
        ------
        ValueError
            The number of genes or outputs is not the model's, or the outputs are others.
        """
        for name, what in (("d_input", "genes"), ("d_output", "outputs")):
            size = len(dataset.gene_names if name == "d_input" else dataset.output_names)
            if getattr(self.cfg, name) != size:
                raise ValueError(
                    f"Config({name}={getattr(self.cfg, name)}) does not match the data, which have {size} {what}; "
                    f"build the model with Config({name}={size})."
                )
        named = names and not isinstance(self.output_names, pd.RangeIndex)
        if named and not self.output_names.equals(dataset.output_names):
            raise ValueError(
                f"the outputs of the data ({', '.join(map(str, dataset.output_names))}) are not those of the model in "
                f"their order ({', '.join(map(str, self.output_names))}); reorder the categories or columns."
            )

    def _options(self) -> dict[str, Any]:
        """Arguments of the constructor beside the configuration."""
        return {}

    # ----------------------------------------------------------------------------------------------- prediction

    def outputs(self, x: AnnData | ExpressionDataset | Any, *, batch_size: int = 1024) -> np.ndarray:
        """Return the raw outputs of cells: logits of a classifier, predictions of a regressor.

        Parameters
        ----------
        x
            Cells, cell x gene: AnnData or a dataset, whose genes are matched by name, or a dense or sparse matrix
            with the model's genes in order.
        batch_size
            Cells made dense at a time.

        Returns
        -------
        Outputs, cell x out.

        Raises
        ------
        ValueError
            The number of genes is not the model's.
        KeyError
            AnnData or a dataset lacks genes of the model.
        """
        x = match_genes(x, self.gene_names)
        was_training = self.training
        self.eval()
        device = self.branches.weight.device
        with torch.no_grad():
            parts = [
                self(dense_tensor(x[start : start + batch_size]).to(device)).cpu()
                for start in range(0, x.shape[0], batch_size)
            ]
        self.train(was_training)
        return torch.cat(parts).numpy() if parts else np.empty((0, self.cfg.d_output), np.float32)

    def score(self, dataset: ExpressionDataset) -> float:
        """Return the accuracy of a classifier, or R2 averaged over the outputs of a regressor.

        Parameters
        ----------
        dataset
            Cells with their targets.

        Raises
        ------
        ValueError
            The dataset does not fit the model, as in :meth:`check`.
        """
        self.check(dataset)
        return self._measure(self.outputs(dataset), dataset.y.numpy())

    # --------------------------------------------------------------------------------------------------- storage

    def save(self, path: str | Path) -> None:
        """Write configuration, weights, names and history to one file.

        Parameters
        ----------
        path
            File to write.
        """
        torch.save(
            {
                "class": type(self).__name__,
                "config": asdict(self.cfg),
                "options": self._options(),
                "weights": self.state_dict(),
                "gene_names": self.gene_names.tolist(),
                "output_names": self.output_names.tolist(),
                "history": self._rows,
            },
            path,
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a model that :meth:`save` wrote; it is on the CPU.

        Parameters
        ----------
        path
            File to read.

        Returns
        -------
        The model, with the names of its genes and outputs.

        Raises
        ------
        ValueError
            The file holds another class of model, or no model.
        """
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError):  # not written by torch, empty, or cut short
            stored = None
        kind = stored.get("class") if isinstance(stored, dict) else None
        if kind != cls.__name__:
            raise ValueError(f"{Path(path).name} holds {kind or 'no scbmlp model'}, not {cls.__name__}.")
        model = cls(Config(**stored["config"]), **stored["options"])
        model.load_state_dict(stored["weights"])
        for name in ("gene_names", "output_names"):
            if stored[name] != list(range(len(stored[name]))):
                setattr(model, name, pd.Index(stored[name]))
        model._rows = stored["history"]
        return model


class ScBMLPClassifier(_BilinearMLP):
    """Bilinear MLP that classifies cells, after :cite:t:`pearce2025bilinear`.

    The logits are quadratic forms of the expression, y = P((L x + b_l) * (R x + b_r)) + b_p, trained by
    cross-entropy.

    Parameters
    ----------
    cfg
        Size and training.

    Attributes
    ----------
    gene_names, output_names
        Names of the genes and of the classes, known once fitted.
    """

    metric = "accuracy"

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of logits (cell x out) and class codes (cell)."""
        return nn.functional.cross_entropy(outputs, target)

    def _measure(self, outputs: np.ndarray, target: np.ndarray) -> float:
        return accuracy_score(target, outputs.argmax(axis=1))

    def _measure_each(self, outputs: np.ndarray, target: np.ndarray) -> np.ndarray:
        codes = range(self.cfg.d_output)
        return recall_score(target, outputs.argmax(axis=1), labels=codes, average=None, zero_division=np.nan)

    def predict(self, x: AnnData | ExpressionDataset | Any) -> np.ndarray:
        """Return the name of the most probable class of every cell (cell); codes while the model has no names.

        Parameters
        ----------
        x
            Cells, as in :meth:`outputs`.
        """
        return self.output_names.to_numpy()[self.outputs(x).argmax(axis=1)]

    def predict_proba(self, x: AnnData | ExpressionDataset | Any) -> np.ndarray:
        """Return the probability of every class (cell x out).

        Parameters
        ----------
        x
            Cells, as in :meth:`outputs`.
        """
        return torch.as_tensor(self.outputs(x)).softmax(dim=1).numpy()


class ScBMLPRegressor(_BilinearMLP):
    """Bilinear MLP that predicts continuous targets, after :cite:t:`pearce2025bilinear`.

    Parameters
    ----------
    cfg
        Size and training.
    loss_fn
        Mean squared error, mean absolute error, or Huber's loss with its threshold at 1 target unit.

    Attributes
    ----------
    gene_names, output_names
        Names of the genes and of the targets, known once fitted.

    Raises
    ------
    ValueError
        `loss_fn` is not one of the three.
    """

    metric = "r2"
    _losses = {"mse": nn.functional.mse_loss, "l1": nn.functional.l1_loss, "huber": nn.functional.huber_loss}

    def __init__(self, cfg: Config, loss_fn: Literal["mse", "l1", "huber"] = "mse") -> None:
        if loss_fn not in self._losses:
            raise ValueError(f"loss_fn={loss_fn!r} is unknown; choose one of {', '.join(self._losses)}.")
        super().__init__(cfg)
        self.loss_fn = loss_fn

    def _options(self) -> dict[str, Any]:
        return {"loss_fn": self.loss_fn}

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the loss of outputs and targets, both cell x out."""
        return self._losses[self.loss_fn](outputs, target)

    def _measure(self, outputs: np.ndarray, target: np.ndarray) -> float:
        return float(self._measure_each(outputs, target).mean())

    def _measure_each(self, outputs: np.ndarray, target: np.ndarray) -> np.ndarray:
        if len(target) < 2:
            return np.full(self.cfg.d_output, np.nan)
        return r2_score(target, outputs, multioutput="raw_values")

    def predict(self, x: AnnData | ExpressionDataset | Any) -> np.ndarray:
        """Return the predicted targets (cell x out).

        Parameters
        ----------
        x
            Cells, as in :meth:`outputs`.
        """
        return self.outputs(x)

    def evaluate(self, dataset: ExpressionDataset) -> pd.DataFrame:
        """Return ``r2`` and ``mae``, the mean absolute error in target units, of every output (out).

        Parameters
        ----------
        dataset
            Cells with their targets.

        Raises
        ------
        ValueError
            The dataset does not fit the model, as in :meth:`check`.
        """
        self.check(dataset)
        outputs, target = self.outputs(dataset), dataset.y.numpy()
        mae = mean_absolute_error(target, outputs, multioutput="raw_values")
        return pd.DataFrame(
            {"r2": self._measure_each(outputs, target), "mae": mae}, pd.Index(self.output_names, name="output")
        )


class _Training(lightning.LightningModule):
    """Steps of a fit. Apart from the model, so that a fitted model holds on to neither trainer nor data."""

    def __init__(self, model: _BilinearMLP) -> None:
        super().__init__()
        self.model = model
        self.seen: dict[str, list[tuple[float, np.ndarray, np.ndarray]]] = {"train": [], "val": []}

    def configure_optimizers(self) -> dict[str, Any]:
        cfg = self.model.cfg
        optimizer = torch.optim.Adam(self.model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=cfg.n_epochs),
        }

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, y = batch
        outputs = self.model(x)
        loss = self.model.loss(outputs, y)
        self.seen[stage].append((loss.detach(), outputs.detach(), y))
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._step(batch, "val")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rows"] = self.model._rows

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.model._rows = checkpoint["rows"]

    def on_train_epoch_end(self) -> None:
        row = {}
        for stage, steps in self.seen.items():
            if steps:
                losses, outputs, targets = (list(part) for part in zip(*steps, strict=True))
                weights = torch.tensor([float(len(y)) for y in targets])
                row[f"{stage}_loss"] = float(torch.stack(losses).cpu() @ weights / weights.sum())
                row[f"{stage}_{self.model.metric}"] = float(
                    self.model._measure(torch.cat(outputs).cpu().numpy(), torch.cat(targets).cpu().numpy())
                )
                steps.clear()
        self.model._rows.append(row)
        self.log_dict(row, prog_bar=True)


def _loader(dataset: ExpressionDataset, batch_size: int, generator: torch.Generator | None = None) -> DataLoader:
    """Return a loader that cuts whole batches out of the matrix; shuffled if it has a generator."""
    order = SequentialSampler(dataset) if generator is None else RandomSampler(dataset, generator=generator)
    return DataLoader(
        dataset, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None, generator=generator
    )


def _accelerator(device: str) -> dict[str, Any]:
    """Translate a torch device name into the arguments of Lightning."""
    if device == "auto":
        return {"accelerator": "auto", "devices": 1}
    device = torch.device(device)
    return {"accelerator": device.type, "devices": 1 if device.index is None else [device.index]}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, and leave torch's own generators where they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's advice on hardware and workers off the page, for the length of a fit."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
