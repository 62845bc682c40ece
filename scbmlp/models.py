"""Bilinear MLPs for single cells: configuration, training, prediction, and the weights to read."""

from __future__ import annotations

import contextlib
import pickle
from dataclasses import asdict, dataclass
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import lightning
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.special import log_softmax
from sklearn.metrics import mean_absolute_error, r2_score, recall_score
from torch import Tensor, nn

from scbmlp import exact
from scbmlp.baselines import LinearModel, accuracy, class_counts, linear_baseline
from scbmlp.checks import check_class_weight, plain_names, warn, whole_number
from scbmlp.datasets import (
    ExpressionDataset,
    blocks,
    check_dataset,
    dense_tensor,
    match_genes,
    mean,
    standard_deviation,
)
from scbmlp.display import as_html, listed, watched
from scbmlp.storage import read_file, write_file
from scbmlp.training import Training, accelerator, check_trainer, interruptible, loader, quiet_lightning, seeded

__all__ = [
    "Config", "ScBMLPClassifier", "ScBMLPRegressor", "Statistics", "solve", "solve_replicas", "statistics", "tune",
]  # fmt: skip

MARGIN = 0.01  # below the linear baseline by less than this is noise

# What a field is where it is not given: in the plain form, and with a linear part.
_DEFAULTS = {"n_epochs": (100, 40), "batch_size": (32, 64), "dropout_rate": (0.0, 0.2), "weight_decay": (1e-4, 3e-3)}
_RATES = {"lr": "positive", "dropout_rate": "at least 0 and below 1"}
_RATES |= dict.fromkeys(("weight_decay", "weight_decay_linear"), "at least 0")
# What a fit asks of Lightning; its loaders share out by themselves.
_TRAINER = {"logger": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}


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
        Add a linear term on centred genes. It starts at the linear baseline, and the best epoch is kept.
    n_epochs, batch_size
        Passes over the training cells, and cells a step; if None 100 and 32, with `linear` 40 and 64.
    lr
        Learning rate of Adam at the start; it falls to zero along a cosine.
    dropout_rate
        Chance that a hidden product is dropped in a training step; if None 0, with `linear` 0.2.
    weight_decay
        L2 penalty of Adam, which favours interaction matrices of low rank; if None 1e-4, with `linear` 3e-3.
    seed
        Seed of the initial weights, the order of the cells and dropout.
    device
        ``"auto"``, or a name that torch understands: ``"cpu"``, ``"cuda:0"``, ``"mps"``.
    patience
        Epochs to go on without a better loss on validation cells; the best is kept. If None all epochs are run.
    weight_decay_linear
        L2 penalty of Adam on the weights of the linear term.
    class_weight
        ``"balanced"``: each class counts alike in loss, baseline and score, the mean recall. If None each cell does.

    Examples
    --------
    >>> cfg = Config(d_input=2000, d_hidden=128, d_output=8, linear=True)
    >>> cfg.n_epochs, cfg.batch_size, cfg.dropout_rate
    (40, 64, 0.2)
    """

    d_input: int
    d_hidden: int
    d_output: int
    bias: bool = False
    linear: bool = False
    n_epochs: int | None = None
    batch_size: int | None = None
    lr: float = 1e-3
    dropout_rate: float | None = None
    weight_decay: float | None = None
    seed: int = 0
    device: str = "auto"
    patience: int | None = None
    weight_decay_linear: float = 0.1
    class_weight: Literal["balanced"] | None = None

    def __post_init__(self) -> None:
        for name, defaults in _DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, defaults[self.linear is True or self.linear is np.True_])
        # Values of a numpy grid become Python's own, which every file can hold.
        for name in ("d_input", "d_hidden", "d_output", "n_epochs", "batch_size", "patience", "seed"):
            if name != "patience" or self.patience is not None:
                least, most = (0, 2**63 - 1) if name == "seed" else (1, np.inf)
                setattr(self, name, whole_number(getattr(self, name), name, least, most, config=True))
        for name, allowed in _RATES.items():
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool | np.bool_)
            most = 1 if name == "dropout_rate" else np.inf
            if not (number and 0 <= value < most) or (name == "lr" and value == 0):
                raise ValueError(f"Config({name}={value!r}): a number is needed, {allowed}.")
            setattr(self, name, float(value))
        for name in ("bias", "linear"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"Config({name}={getattr(self, name)!r}): True or False is needed.")
            setattr(self, name, bool(getattr(self, name)))
        check_class_weight(self.class_weight, config=True)
        self.device = str(self.device)
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError:
            raise ValueError(
                f"Config(device={self.device!r}): 'auto', 'cpu', 'cuda', 'cuda:0' or 'mps' are known, and what else "
                f"torch understands."
            ) from None


class Statistics(NamedTuple):
    """What modules need of the training cells; no cell can be told from it.

    Parameters
    ----------
    mean, sd
        Mean and standard deviation of every gene (gene), log-expression.
    covariance
        Covariance of the genes and the hidden pre-activations [L x, R x] (gene x 2 hid).
    target
        Covariance of the genes and the targets, 0 or 1 for classes (gene x out).
    """

    mean: np.ndarray
    sd: np.ndarray
    covariance: np.ndarray
    target: np.ndarray


class _BilinearMLP(nn.Module):
    """What classifier and regressor share; they add the loss, the score and what a prediction is."""

    metric: str
    _targets: str

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.gene_names = pd.RangeIndex(cfg.d_input)
        self.output_names = pd.RangeIndex(cfg.d_output)
        self.layer: str | None = None
        with seeded(cfg.seed):
            # Both branches in one layer, so that x is read once and its transposed weight is B = [L' R'].
            self.branches = nn.Linear(cfg.d_input, 2 * cfg.d_hidden, bias=cfg.bias)
            self.dropout = nn.Dropout(cfg.dropout_rate)
            self.project = nn.Linear(cfg.d_hidden, cfg.d_output, bias=cfg.bias or cfg.linear)
            self.direct = nn.Linear(cfg.d_input, cfg.d_output, bias=False) if cfg.linear else None
        self.register_buffer("center", torch.zeros(cfg.d_input))
        self.register_buffer("class_weight", None if cfg.class_weight is None else torch.ones(cfg.d_output))
        self.statistics: Statistics | None = None
        self.best_epoch: int | None = None
        self._rows: list[dict[str, float]] = []
        self._baseline: dict[str, float] | None = None
        self.trials: pd.DataFrame | None = None
        self.recipe: list[tuple[exact.Mixture, float]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (cell x out) of cells (cell x gene): P((L x + b_l) * (R x + b_r)) + b_p.

        Examples
        --------
        >>> x, _ = test[:5]
        >>> tuple(model(x).shape)
        (5, 2)
        """
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
        """What the model is a quadratic form around (gene): the training mean if ``cfg.linear``, else 0."""
        return (self.center * self.cfg.linear).cpu().numpy().astype(np.float64)

    def fit(
        self,
        train: ExpressionDataset,
        val: ExpressionDataset | None = None,
        *,
        baseline: bool | LinearModel = True,
        ckpt_path: str | Path | None = None,
        **trainer_kwargs: Any,
    ) -> pd.DataFrame:
        """Train from the seed's initial weights, and leave the model in evaluation mode.

        Ctrl-C is a KeyboardInterrupt, and leaves the best weights so far, or the last where none are kept.

        Parameters
        ----------
        train, val
            Cells to learn from, and cells to report on after each epoch.
        baseline
            Whether to fit a linear baseline first, or one of your own; without `val` there is none.
        ckpt_path
            Checkpoint of an interrupted fit to go on from; ``"last"`` for the newest in ``default_root_dir``, if any.
        trainer_kwargs
            Of ``lightning.Trainer``: ``default_root_dir`` keeps checkpoints, ``strategy="ddp"`` shares every batch.

        Returns
        -------
        Loss and metric of training cells (under dropout) and validation cells, a row an epoch; 0 is the baseline.

        Examples
        --------
        >>> model = ScBMLPClassifier(Config(40, 8, 2, linear=True, n_epochs=3))
        >>> history = model.fit(train, validation, enable_progress_bar=False)
        >>> history["val_accuracy"].round(2).tolist()
        [0.59, 0.65, 0.69, 0.7]
        """
        check_trainer(trainer_kwargs)
        self._check_sets(train, val, baseline)
        if val is not None and val.stored and len(val) <= val.x.holds():
            val = val.load()  # from all over a file, they would cost reading it anew after every epoch
        cfg, linear_model = self.cfg, baseline if isinstance(baseline, LinearModel) else None
        if baseline is True and val is not None:
            linear_model = linear_baseline(train, val, exact=False, class_weight=cfg.class_weight)
        order = torch.Generator().manual_seed(cfg.seed)
        training = Training(self, *self._begin(train, val, linear_model), order)
        loaders = [loader(train, cfg.batch_size, order)]
        if val is not None:
            loaders.append(loader(val, max(cfg.batch_size, 1024)))
        if ckpt_path == "last":
            ckpt_path = _newest_checkpoint(Path(trainer_kwargs.get("default_root_dir") or "."))
        options = _TRAINER | {"max_epochs": cfg.n_epochs, "enable_progress_bar": watched()} | accelerator(cfg.device)
        options |= {"enable_checkpointing": "default_root_dir" in trainer_kwargs} | trainer_kwargs
        try:
            with seeded(cfg.seed, cfg.device), quiet_lightning(), interruptible():
                lightning.Trainer(**options).fit(training, *loaders, ckpt_path=ckpt_path)
        finally:
            training.finish()
            self.statistics = statistics(self, train)
        if linear_model is not None and val is not None:
            self._compare(val)
        return self.history

    def _check_sets(
        self, train: ExpressionDataset, val: ExpressionDataset | None, baseline: bool | LinearModel
    ) -> None:
        """Raise an error for cells that do not fit, and warn of what a fit without validation cells lacks."""
        self.check(train, names=False)
        if val is not None:
            self.check(val, names=False)
            if not (val.gene_names.equals(train.gene_names) and val.output_names.equals(train.output_names)):
                raise ValueError(
                    "val does not have the genes and outputs of train, in its order; cut both from one AnnData."
                )
        elif self.cfg.patience is not None:
            raise ValueError(
                f"Config(patience={self.cfg.patience}) needs validation cells to tell the best epoch by; pass val= to "
                f"fit, or patience=None to keep the last."
            )
        elif self.cfg.linear and baseline is True:
            warn(
                "fit has no validation cells: the linear part starts at 0 and not at the linear baseline, whose "
                "penalty they choose, the last epoch is kept and not the best, and the fit is not compared with a "
                "linear model; pass val=."
            )

    def _begin(
        self, train: ExpressionDataset, val: ExpressionDataset | None, baseline: LinearModel | None
    ) -> tuple[tuple[np.ndarray, np.ndarray] | None, tuple[float, dict[str, Tensor]] | None]:
        """Go to where a fit starts; return units of the targets, and the loss and weights that an epoch has to beat."""
        cfg = self.cfg
        with seeded(cfg.seed):
            for layer in filter(None, (self.branches, self.project, self.direct)):
                layer.reset_parameters()
        self.train()
        self._rows, self._baseline, self.statistics, self.trials, self.recipe = [], None, None, None, None
        self.gene_names, self.output_names, self.layer = train.gene_names, train.output_names, train.layer
        if cfg.class_weight is not None:
            counts = class_counts(cfg.class_weight, train.y.numpy(), cfg.d_output)
            self.class_weight.copy_(torch.as_tensor(counts))
        units, shift, scale = None, 0.0, np.ones(1)
        if cfg.linear and train.y.ndim == 2:
            target = train.y.numpy().astype(np.float64)
            shift, scale = target.mean(axis=0), np.where(np.ptp(target, axis=0) > 0, target.std(axis=0), 1.0)
            units = shift, scale
        if cfg.linear:
            self.center.copy_(torch.as_tensor(mean(train.x)))
            nn.init.zeros_(self.direct.weight)
            nn.init.zeros_(self.project.bias)
        if baseline is not None:
            self._baseline = {}
            for stage, part in {"train": train, "val": val}.items():
                if part is not None:
                    outputs = baseline.outputs(part)
                    loss = self.loss(torch.as_tensor(outputs, dtype=torch.float32), part.y)
                    self._baseline[f"{stage}_loss"] = float(loss)
                    self._baseline[f"{stage}_{self.metric}"] = float(self._measure(outputs, part.y.numpy()))
            if cfg.linear:
                at_center = baseline.constant + baseline.weight @ self.origin
                with torch.no_grad():
                    self.direct.weight.copy_(torch.as_tensor(baseline.weight / scale[:, None]))
                    self.project.bias.copy_(torch.as_tensor((at_center - shift) / scale))
        if val is None or not (cfg.linear or cfg.patience is not None):
            return units, None
        weights = {name: value.detach().clone() for name, value in self.named_parameters()}
        if not cfg.linear:
            outputs = self.outputs(val)
        else:  # the linear part alone; `outputs` are those of the baseline for `val`
            weights["project.weight"].zero_()
            outputs = np.zeros((len(val), cfg.d_output)) if baseline is None else (outputs - shift) / scale
        target = val.y if units is None else torch.as_tensor((val.y.numpy() - shift) / scale)
        return units, (float(self.loss(torch.as_tensor(outputs), target)), weights)

    def _compare(self, val: ExpressionDataset) -> None:
        """Warn of a model that ends below the linear baseline."""
        name = f"val_{self.metric}"
        score, least, margin = self.score(val), self._baseline[name], MARGIN
        if self.cfg.class_weight is not None:  # nor is one cell of the rarest class more than noise
            sizes = np.unique(val.y, return_counts=True)[1]
            margin += 1 / (len(sizes) * sizes.min())
        if score < least - margin:
            remedy = "scbmlp.models.solve is never below it beyond noise"
            if not self.cfg.linear:
                remedy = f"Config(linear=True) starts there and keeps the best epoch, and {remedy}"
            warn(
                f"the model ends below a linear one on the validation cells: {name} {score:.3f}, linear baseline "
                f"{least:.3f}. What it has learnt beyond a linear model is noise; {remedy}."
            )

    def _counts(self, target: np.ndarray) -> np.ndarray | None:
        """Return how often cells of these classes count in the loss (cell); None if all count alike."""
        return None if self.class_weight is None else self.class_weight.cpu().numpy()[target]

    @property
    def history(self) -> pd.DataFrame:
        """Losses and metrics of the last fit, a row an epoch; epoch 0 is the linear baseline, where there is one."""
        rows = self._rows if self._baseline is None else [self._baseline, *self._rows]
        first = int(self._baseline is None)
        return pd.DataFrame(rows, index=pd.RangeIndex(first, first + len(rows), name="epoch"))

    def check(self, dataset: ExpressionDataset, *, names: bool = True) -> None:
        """Raise an error if a dataset does not fit the model, whose outputs it must have by name too if `names`.

        Examples
        --------
        >>> model.check(test)
        >>> model.check(graded[2])
        Traceback (most recent call last):
            ...
        ValueError: the data have continuous targets, ...
        """
        check_dataset(dataset)
        kind = "class codes" if dataset.y.ndim == 1 else "continuous targets"
        if kind != self._targets:
            task = "classification" if self._targets == "class codes" else "regression"
            raise ValueError(
                f"the data have {kind}, {type(self).__name__} takes {self._targets}; cut them by "
                f"scbmlp.datasets.get_{task}_datasets, or choose the other model."
            )
        sizes = {"d_input": len(dataset.gene_names), "d_output": len(dataset.output_names)}
        for name, size in sizes.items():
            if getattr(self.cfg, name) != size:
                raise ValueError(
                    f"Config({name}={getattr(self.cfg, name)}) does not match the data, which have {size} "
                    f"{'genes' if name == 'd_input' else 'outputs'}; build the model with Config({name}={size})."
                )
        named = names and not isinstance(self.output_names, pd.RangeIndex)
        if named and not self.output_names.equals(dataset.output_names):
            raise ValueError(
                f"the outputs of the data ({', '.join(map(str, dataset.output_names))}) are not those of the model in "
                f"their order ({', '.join(map(str, self.output_names))}); reorder the categories or columns."
            )

    def _options(self) -> dict[str, Any]:
        """Return arguments of the constructor beside the configuration."""
        return {}

    def _known(self) -> dict[str, str]:
        """Return what a reader wants to know of the model, by name."""
        cfg, history, score = self.cfg, self.history, f"val_{self.metric}"
        form = "with a linear part" if cfg.linear else "plain"
        rows = {"Form": f"{form}{', biases' if cfg.bias else ''}"}
        rows["Size"] = f"{cfg.d_input:,} genes, {cfg.d_hidden:,} hidden units, {cfg.d_output:,} outputs"
        named = not isinstance(self.output_names, pd.RangeIndex)
        rows["Outputs"] = listed(self.output_names) if named else "without names"
        if self.recipe is not None:
            mixture = self.recipe[0][0]
            of = f"{mixture.rank} components" if mixture.space == "components" else "genes"
            rows["Form"] = f"solved, {f'products of {of}' if mixture.weight('products') else 'no products'}"
            chosen = None if self.trials is None else self.trials[self.trials["chosen"] > 0]
            if chosen is not None and (chosen["behind"] > chosen["standard_error"]).all():
                rows["Better"] = f"the rival {self.trials['form'].iloc[-1]}, without products"
            return rows
        if self.statistics is None and history.empty:
            return rows | {"Training": "not fitted"}
        if self.best_epoch is not None:
            rows["Best epoch"] = f"{self.best_epoch} of {cfg.n_epochs}"
        if score in history and self.best_epoch in history.index:
            name = f"Validation {self.metric.replace('_', ' ')}"
            rows[name] = f"{history.loc[self.best_epoch, score]:.3f}"
            if self._baseline and score in self._baseline:
                rows[name] += f", linear baseline {self._baseline[score]:.3f}"
        return rows

    def __repr__(self) -> str:
        known = (f"{name[0].lower()}{name[1:]} {value}" for name, value in self._known().items())
        return f"{type(self).__name__}: {'; '.join(known)}"

    def _repr_html_(self) -> str:
        return as_html(self._known(), type(self).__name__)

    def outputs(
        self, x: AnnData | ExpressionDataset | Any, *, layer: str | None = None, batch_size: int = 1024
    ) -> np.ndarray:
        """Return the raw outputs of cells (cell x out): logits of a classifier, predictions of a regressor.

        Parameters
        ----------
        x
            Cells, cell x gene: AnnData, DataFrame, dataset, file or matrix. Named genes are matched by name.
        layer
            Layer of AnnData to read; that of the training cells if None.
        batch_size
            Cells made dense at a time; a file is read in blocks of so many.

        Examples
        --------
        >>> model.outputs(adata).shape
        (1000, 2)
        """
        x, batch_size = match_genes(x, self.gene_names, layer or self.layer), whole_number(batch_size, "batch_size")
        was_training = self.training
        self.eval()
        device = self.branches.weight.device
        # In double precision, so that a cell's outputs do not depend on which cells are in its batch.
        precise = torch.float32 if device.type == "mps" else torch.float64
        weights = {name: part.to(precise) for name, part in self.state_dict().items()}
        with torch.no_grad():
            parts = [
                torch.func.functional_call(self, weights, dense_tensor(block).to(device, precise)).float().cpu()
                for _, block in blocks(x, batch_size)
            ]
        self.train(was_training)
        return torch.cat(parts).numpy() if parts else np.empty((0, self.cfg.d_output), np.float32)

    def score(self, dataset: ExpressionDataset) -> float:
        """Return the accuracy of a classifier, balanced if the classes are, or R2 averaged over the outputs.

        Examples
        --------
        >>> round(model.score(test), 2), round(regressor.score(graded[2]), 2)
        (1.0, 0.9)
        """
        self.check(dataset)
        return self._measure(self.outputs(dataset), dataset.y.numpy())

    def save(self, path: str | Path) -> None:
        """Write configuration, weights, names, history and statistics to one safetensors file, numbers and text alone.

        A file that was there is whole until the new one is. No cell can be told from the statistics.

        Examples
        --------
        >>> model.save("model.safetensors")
        >>> again = ScBMLPClassifier.load("model.safetensors")
        >>> bool((again.predict(adata) == model.predict(adata)).all())
        True
        """
        tensors = dict(self.state_dict())
        if self.statistics is not None:
            tensors |= {f"statistics.{name}": torch.as_tensor(part) for name, part in self.statistics._asdict().items()}
        known = {
            "class": type(self).__name__,
            "config": asdict(self.cfg),
            "options": self._options(),
            "gene_names": plain_names(self.gene_names, "gene_names").tolist(),
            "output_names": plain_names(self.output_names, "output_names").tolist(),
            "named": [not isinstance(names, pd.RangeIndex) for names in (self.gene_names, self.output_names)],
            "layer": self.layer,
            "history": self._rows,
            "baseline": self._baseline,
            "best_epoch": self.best_epoch,
            "trials": None if self.trials is None else self.trials.to_dict("list"),
            "recipe": self.recipe and [[mixture._asdict(), ratio] for mixture, ratio in self.recipe],
        }
        write_file(Path(path), known, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a model that :meth:`save` wrote, in evaluation mode on the CPU; no code is run from the file.

        Examples
        --------
        >>> model.save("model.safetensors")
        >>> list(ScBMLPClassifier.load("model.safetensors").output_names)
        ['off', 'on']
        """
        name, (known, tensors) = Path(path).name, read_file(Path(path), cls.__name__)
        try:
            model = cls(Config(**known["config"]), **known["options"])
            parts = {key: tensors.pop(f"statistics.{key}", None) for key in Statistics._fields}
            model.load_state_dict(tensors)
            for key, named in zip(("gene_names", "output_names"), known["named"], strict=True):
                if named:
                    setattr(model, key, plain_names(known[key], key))
            model.layer, model._rows = known["layer"], known["history"]
            model._baseline, model.best_epoch = known["baseline"], known["best_epoch"]
            if parts["mean"] is not None:
                model.statistics = Statistics(**{key: part.numpy() for key, part in parts.items()})
            if known["trials"]:
                model.trials = pd.DataFrame(known["trials"])
            if known["recipe"]:
                model.recipe = [
                    (exact.Mixture(tuple(map(tuple, mixture["weights"])), mixture["rank"], mixture["space"]), ratio)
                    for mixture, ratio in known["recipe"]
                ]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{name} is damaged ({error}); save the model again, or take another copy.") from error
        return model.eval()


class ScBMLPClassifier(_BilinearMLP):
    """Bilinear MLP that classifies cells by logits y = P((L x + b_l) * (R x + b_r)) + b_p :cite:p:`pearce2025bilinear`.

    Attributes
    ----------
    gene_names, output_names
        Names of the genes and of the classes, known once fitted.
    best_epoch
        The epoch whose weights the model has; 0 is the start.
    statistics
        What modules need of the training cells.
    trials
        What :func:`solve` or :func:`tune` tried, a row a setting; else None.

    Examples
    --------
    >>> model = ScBMLPClassifier(Config(d_input=40, d_hidden=8, d_output=2))
    >>> [tuple(weights.shape) for weights in (model.w_l, model.w_r, model.w_p)]
    [(8, 40), (8, 40), (2, 8)]
    """

    _targets = "class codes"

    @property
    def metric(self) -> str:
        """What the score is: ``accuracy``, or ``balanced_accuracy``."""
        return "accuracy" if self.cfg.class_weight is None else "balanced_accuracy"

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of logits (cell x out) and class codes (cell), averaged over cells.

        Examples
        --------
        >>> x, y = test[:50]
        >>> round(model.loss(model(x), y).item(), 2)
        0.31
        """
        weight = None if self.class_weight is None else self.class_weight.to(outputs)
        # A mean over cells and not over weights, so that losses of batches add up.
        return nn.functional.cross_entropy(outputs, target, weight, reduction="sum") / len(target)

    def _measure(self, outputs: np.ndarray, target: np.ndarray) -> float:
        return accuracy(outputs, target, self.cfg.class_weight)

    def _cell_losses(self, outputs: np.ndarray, target: np.ndarray) -> np.ndarray:
        losses, counts = -log_softmax(outputs.astype(np.float64), axis=1), self._counts(target)
        return losses[np.arange(len(target)), target] * (1 if counts is None else counts)

    def _measure_each(self, outputs: np.ndarray, target: np.ndarray) -> np.ndarray:
        codes = range(self.cfg.d_output)
        return recall_score(target, outputs.argmax(axis=1), labels=codes, average=None, zero_division=np.nan)

    def predict(self, x: AnnData | ExpressionDataset | Any, *, layer: str | None = None) -> np.ndarray:
        """Return the name of the most probable class (cell) of cells as in :meth:`outputs`; codes if it has no name.

        Examples
        --------
        >>> list(model.predict(adata[:4])), list(labels[:4])
        (['on', 'off', 'on', 'off'], ['on', 'off', 'on', 'off'])
        """
        return self.output_names.to_numpy()[self.outputs(x, layer=layer).argmax(axis=1)]

    def predict_proba(self, x: AnnData | ExpressionDataset | Any, *, layer: str | None = None) -> np.ndarray:
        """Return the probability of every class (cell x out) of cells as in :meth:`outputs`.

        Examples
        --------
        >>> model.predict_proba(adata[:2]).round(2)
        array([[0.15, 0.85],
               [0.57, 0.43]], dtype=float32)
        """
        return torch.as_tensor(self.outputs(x, layer=layer)).softmax(dim=1).numpy()


class ScBMLPRegressor(_BilinearMLP):
    """Bilinear MLP that predicts continuous targets :cite:p:`pearce2025bilinear`, as :class:`ScBMLPClassifier`.

    Parameters
    ----------
    cfg
        Size and training.
    loss_fn
        Mean squared error, mean absolute error, or Huber's loss with its threshold at 1 target unit.

    Examples
    --------
    >>> regressor = ScBMLPRegressor(regressor.cfg, loss_fn="huber")
    >>> list(regressor.fit(*graded[:2], enable_progress_bar=False))
    ['train_loss', 'train_r2', 'val_loss', 'val_r2']
    """

    metric = "r2"
    _targets = "continuous targets"
    _losses = {"mse": nn.functional.mse_loss, "l1": nn.functional.l1_loss, "huber": nn.functional.huber_loss}

    def __init__(self, cfg: Config, loss_fn: Literal["mse", "l1", "huber"] = "mse") -> None:
        if loss_fn not in self._losses:
            raise ValueError(f"loss_fn={loss_fn!r} is unknown; choose one of {', '.join(self._losses)}.")
        check_class_weight(cfg.class_weight, classes=False, config=True)
        super().__init__(cfg)
        self.loss_fn = loss_fn

    def _options(self) -> dict[str, Any]:
        return {"loss_fn": self.loss_fn}

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the loss of outputs and targets, both cell x out.

        Examples
        --------
        >>> x, y = graded[2][:50]
        >>> round(regressor.loss(regressor(x), y).item(), 2)
        0.02
        """
        return self._losses[self.loss_fn](outputs, target)

    def _measure(self, outputs: np.ndarray, target: np.ndarray) -> float:
        return float(self._measure_each(outputs, target).mean())

    def _cell_losses(self, outputs: np.ndarray, target: np.ndarray) -> np.ndarray:
        return ((outputs - target) ** 2 / target.var(axis=0)).mean(axis=1)

    def _measure_each(self, outputs: np.ndarray, target: np.ndarray) -> np.ndarray:
        if len(target) < 2:
            return np.full(self.cfg.d_output, np.nan)
        return r2_score(target, outputs, multioutput="raw_values")

    def predict(self, x: AnnData | ExpressionDataset | Any, *, layer: str | None = None) -> np.ndarray:
        """Return the predicted targets (cell x out) of cells as in :meth:`outputs`.

        Examples
        --------
        >>> regressor.predict(adata[:2]).round().astype(int).tolist()
        [[1, 1, 0, 1], [0, 1, 1, 1]]
        """
        return self.outputs(x, layer=layer)

    def evaluate(self, dataset: ExpressionDataset) -> pd.DataFrame:
        """Return ``r2`` and ``mae``, the mean absolute error in target units, of every output (out).

        Examples
        --------
        >>> table = regressor.evaluate(graded[2])
        >>> list(table), round(float(table["r2"].mean()), 2)
        (['r2', 'mae'], 0.9)
        """
        self.check(dataset)
        outputs, target = self.outputs(dataset), dataset.y.numpy()
        mae = mean_absolute_error(target, outputs, multioutput="raw_values")
        names = pd.Index(self.output_names, name="output")
        return pd.DataFrame({"r2": self._measure_each(outputs, target), "mae": mae}, names)


def statistics(model: ScBMLPClassifier | ScBMLPRegressor, dataset: ExpressionDataset) -> Statistics:
    """Return what modules need of cells with their targets, taken a block at a time.

    Examples
    --------
    >>> known = models.statistics(model, test)
    >>> known.mean.shape, known.covariance.shape, known.target.shape
    ((40,), (40, 16), (40, 2))
    """
    model.check(dataset, names=False)
    x, y = match_genes(dataset, model.gene_names), dataset.y.numpy()
    y = np.eye(model.cfg.d_output)[y] if y.ndim == 1 else y.astype(np.float64)
    weight, center = model.branches.weight.detach().cpu().float().T, mean(x)
    # One of two factors of a covariance has to be centred.
    shift, y = torch.as_tensor(center) @ weight.double(), torch.as_tensor(y - y.mean(axis=0))
    found = [torch.zeros(len(center), factor.shape[-1], dtype=torch.float64) for factor in (shift, y)]
    for part, block in blocks(x):
        d = dense_tensor(block)
        for total, factor in zip(found, (d @ weight - shift.float(), y[part].float()), strict=True):
            total += d.T @ factor
    return Statistics(center, standard_deviation(x), *(total.numpy() / x.shape[0] for total in found))


def _newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole; a process may have been killed while it wrote one."""
    for path in sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(pickle.UnpicklingError, EOFError, RuntimeError, OSError):
            torch.load(path, map_location="cpu", weights_only=True)
            return path
    return None


def __getattr__(name: str) -> Any:
    """Offer the public functions of :mod:`scbmlp.solving` here too; nothing here needs them."""
    if name in __all__:
        return getattr(import_module("scbmlp.solving"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
