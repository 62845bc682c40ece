"""Bilinear MLPs for single cells: configuration, training, prediction, and the weights to read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
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
from scbmlp.display import as_html, listed
from scbmlp.storage import read_file, write_file
from scbmlp.stores import Scaling
from scbmlp.training import Training, check_sets, check_trainer, compare, seeded

__all__ = [
    "Config", "ScBMLPClassifier", "ScBMLPRegressor", "Statistics", "solve", "solve_pairs", "solve_replicas",
    "statistics", "tune",
]  # fmt: skip

# What a field is where it is not given: in the plain form, and with a linear part.
_DEFAULTS = {"n_epochs": (100, 40), "batch_size": (32, 64), "dropout_rate": (0.0, 0.2), "weight_decay": (1e-4, 3e-3)}
_RATES = {"lr": "positive", "dropout_rate": "at least 0 and below 1"}
_RATES |= dict.fromkeys(("weight_decay", "weight_decay_linear"), "at least 0")
_KEPT = ("layer", "best_epoch", "calibration", "_rows", "_baseline")  # in files, as they are


@dataclass
class Config:
    """Size, regularisation and training of a bilinear MLP.

    Parameters
    ----------
    d_input, d_hidden, d_output
        Number of genes, hidden units and outputs: the axes gene, hid and out of the weights.
    bias, linear
        Add biases; add a linear term on centred genes, which starts at the linear baseline. Its best epoch is kept.
    n_epochs, batch_size
        Passes over the training cells, and cells a step; if None 100 and 32, with `linear` 40 and 64.
    lr, seed
        Learning rate of Adam, which falls to zero along a cosine; seed of weights, order of the cells and dropout.
    dropout_rate, weight_decay
        Chance that a hidden product is dropped, and L2 penalty; if None 0 and 1e-4, with `linear` 0.2 and 3e-3.
    device
        ``"auto"``, or a name that torch understands: ``"cpu"``, ``"cuda:0"``, ``"mps"``.
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
    weight_decay_linear: float = 0.1
    class_weight: Literal["balanced"] | None = None

    def __post_init__(self) -> None:
        # Values of a numpy grid become Python's own, which every file can hold.
        for name in ("bias", "linear"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"Config({name}={getattr(self, name)!r}): True or False is needed.")
            setattr(self, name, bool(getattr(self, name)))
        for name, defaults in _DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, defaults[self.linear])
        for name in ("d_input", "d_hidden", "d_output", "n_epochs", "batch_size"):
            setattr(self, name, whole_number(getattr(self, name), name, config=True))
        self.seed = whole_number(self.seed, "seed", 0, 2**63 - 1, config=True)
        for name, allowed in _RATES.items():
            value, most = getattr(self, name), 1 if name == "dropout_rate" else np.inf
            number = isinstance(value, Real) and not isinstance(value, bool | np.bool_)
            if not (number and 0 <= value < most) or (name == "lr" and value == 0):
                raise ValueError(f"Config({name}={value!r}): a number is needed, {allowed}.")
            setattr(self, name, float(value))
        check_class_weight(self.class_weight, config=True)
        self.device = str(self.device)
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError:
            known = "'auto', 'cpu', 'cuda', 'cuda:0' or 'mps' are known, and what else torch understands"
            raise ValueError(f"Config(device={self.device!r}): {known}.") from None


class Statistics(NamedTuple):
    """What modules need of the training cells; no cell can be told from it.

    Parameters
    ----------
    mean, sd
        Mean and standard deviation of every gene (gene), log-expression.
    covariance, target
        Covariances of the genes with [L x, R x] (gene x 2 hid), and with targets, 0 or 1 for classes (gene x out).
    """

    mean: np.ndarray
    sd: np.ndarray
    covariance: np.ndarray
    target: np.ndarray


class _BilinearMLP(nn.Module):
    """What classifier and regressor share; they add the loss and the score."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self._options: dict[str, Any] = {}  # what the constructor takes beside it
        self.gene_names, self.output_names = pd.RangeIndex(cfg.d_input), pd.RangeIndex(cfg.d_output)
        self.layer, self.scaling = None, None  # of the training cells
        with seeded(cfg.seed):
            # Both branches in one layer, so that x is read once and its transposed weight is B = [L' R'].
            self.branches = nn.Linear(cfg.d_input, 2 * cfg.d_hidden, bias=cfg.bias)
            self.dropout = nn.Dropout(cfg.dropout_rate)
            self.project = nn.Linear(cfg.d_hidden, cfg.d_output, bias=cfg.bias or cfg.linear)
            self.direct = nn.Linear(cfg.d_input, cfg.d_output, bias=False) if cfg.linear else None
        self.register_buffer("center", torch.zeros(cfg.d_input))
        self.register_buffer("class_weight", None if cfg.class_weight is None else torch.ones(cfg.d_output))
        self._forget()

    def _forget(self) -> None:
        """Take back what earlier fits have found."""
        self.statistics: Statistics | None = None
        self.best_epoch: int | None = None
        self.trials: pd.DataFrame | None = None
        self.recipe: list[tuple[exact.Mixture, float]] | None = None
        self.calibration: dict[str, Any] | None = None
        self._rows: list[dict[str, float]] = []
        self._baseline: dict[str, float] | None = None

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
        ckpt_path, trainer_kwargs
            As ``lightning.Trainer`` has them: ``default_root_dir`` keeps checkpoints, of which ``ckpt_path="last"`` is
            the newest, and ``strategy="ddp"`` shares every batch.

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
        check_sets(self, train, val, baseline)
        if val is not None and val.stored and len(val) <= val.x.holds():
            val = val.load()  # from all over a file, they would cost reading it anew after every epoch
        if baseline is True and val is not None:
            baseline = linear_baseline(train, val, exact=False, class_weight=self.cfg.class_weight)
        baseline = baseline if isinstance(baseline, LinearModel) else None
        training = Training(self, train, val, baseline)
        try:
            training.run(ckpt_path, trainer_kwargs)
        finally:
            self.statistics = statistics(self, train)
        if baseline is not None and val is not None:
            compare(self, val)
        return self.history

    def _adopt(self, train: ExpressionDataset) -> None:
        """Take over the names of the training cells, and how often their classes count."""
        self.gene_names, self.output_names, self.layer = train.gene_names, train.output_names, train.layer
        self.scaling = train.scaling
        if self.class_weight is not None:
            counts = class_counts(self.cfg.class_weight, train.y.numpy(), self.cfg.d_output)
            self.class_weight.copy_(torch.as_tensor(counts))

    def _counts(self, target: np.ndarray) -> np.ndarray | None:
        """Return how often cells of these classes count in the loss (cell); None if all count alike."""
        return None if self.class_weight is None else self.class_weight.cpu().numpy()[target]

    @property
    def history(self) -> pd.DataFrame:
        """Losses and metrics of the last fit, a row an epoch; epoch 0 is the linear baseline, where there is one."""
        first = int(self._baseline is None)
        rows = [self._baseline, *self._rows][first:]
        return pd.DataFrame(rows, index=pd.RangeIndex(first, first + len(rows), name="epoch"))

    def check(self, dataset: ExpressionDataset, *, names: bool = True) -> None:
        """Raise an error if a dataset does not fit the model, whose outputs it must have by name too if `names`."""
        check_dataset(dataset)
        if (dataset.y.ndim == 1) != self._classes:
            kinds = ["class codes", "continuous targets"]
            taken, given = kinds if self._classes else reversed(kinds)
            task = "classification" if self._classes else "regression"
            raise ValueError(
                f"the data have {given}, {type(self).__name__} takes {taken}; cut them by "
                f"scbmlp.datasets.get_{task}_datasets, or choose the other model."
            )
        known = [one.scaling and one.scaling[:2] for one in (dataset, self)]
        if all(known) and known[0] != known[1]:
            warn(
                f"the data were scaled in another way ({dataset.scaling}) than the model's training cells "
                f"({self.scaling}); cut them with the same normalize_total and log1p."
            )
        for name, given in {"d_input": dataset.gene_names, "d_output": dataset.output_names}.items():
            if (own := getattr(self.cfg, name)) != (size := len(given)):
                raise ValueError(
                    f"Config({name}={own}) does not match the data, which have {size} "
                    f"{'genes' if name == 'd_input' else 'outputs'}; build the model with Config({name}={size})."
                )
        named = names and not isinstance(self.output_names, pd.RangeIndex)
        if named and not self.output_names.equals(dataset.output_names):
            given, own = (", ".join(map(str, one.output_names)) for one in (dataset, self))
            raise ValueError(
                f"the outputs of the data ({given}) are not those of the model in their order ({own}); reorder the "
                f"categories or columns."
            )

    def _known(self) -> dict[str, str]:
        """Return what a reader wants to know of the model, by name."""
        cfg, score = self.cfg, f"val_{self.metric}"
        form = f"{'with a linear part' if cfg.linear else 'plain'}{', biases' if cfg.bias else ''}"
        rows = {"Form": form, "Size": f"{cfg.d_input:,} genes, {cfg.d_hidden:,} hidden units, {cfg.d_output:,} outputs"}
        named = not isinstance(self.output_names, pd.RangeIndex)
        rows["Outputs"] = listed(self.output_names) if named else "without names"
        if self.recipe is not None:
            mixture = self.recipe[0][0]
            of = f"{mixture.rank} components" if mixture.space == "components" else "genes"
            rows["Form"] = f"solved, {f'products of {of}' if mixture.weight('products') else 'no products'}"
            chosen = None if self.trials is None else self.trials[self.trials["chosen"] > 0]
            if chosen is not None and (chosen["behind"] > chosen["standard_error"]).all():
                rows["Better"] = f"the rival {self.trials['form'].iloc[-1]}, without products"
        elif self.best_epoch is None:
            rows["Training"] = "not fitted"
        else:
            rows["Best epoch"] = f"{self.best_epoch} of {cfg.n_epochs}"
            if score in self.history and self.best_epoch in self.history.index:
                beside = "" if self._baseline is None else f", linear baseline {self._baseline[score]:.3f}"
                value = f"{self.history.loc[self.best_epoch, score]:.3f}{beside}"
                rows[f"Validation {self.metric.replace('_', ' ')}"] = value
        return rows

    def __repr__(self) -> str:
        known = (f"{name[0].lower()}{name[1:]} {value}" for name, value in self._known().items())
        return f"{type(self).__name__}: {'; '.join(known)}"

    def _repr_html_(self) -> str:
        return as_html(self._known(), type(self).__name__)

    def outputs(self, x: AnnData | ExpressionDataset | Any, *, layer: str | None = None) -> np.ndarray:
        """Return the raw outputs of cells (cell x out): logits of a classifier, predictions of a regressor.

        Parameters
        ----------
        x, layer
            Cells, as AnnData, DataFrame, dataset, file or matrix (cell x gene), and the layer to read; genes are
            matched by name where they have names, and the layer is that of the training cells if None.

        Examples
        --------
        >>> model.outputs(adata).shape
        (1000, 2)
        """
        x = match_genes(x, self.gene_names, layer or self.layer, self.scaling)
        was_training, device = self.training, self.branches.weight.device
        self.eval()
        # In double precision, so that a cell's outputs do not depend on which cells are in its batch.
        precise = torch.float32 if device.type == "mps" else torch.float64
        weights = {name: part.to(precise) for name, part in self.state_dict().items()}
        parts = [torch.empty(0, self.cfg.d_output)]
        with torch.no_grad():
            for _, block in blocks(x):
                found = torch.func.functional_call(self, weights, dense_tensor(block).to(device, precise))
                parts.append(found.float().cpu())
        self.train(was_training)
        return torch.cat(parts).numpy()

    def predict(self, x: AnnData | ExpressionDataset | Any, *, layer: str | None = None) -> np.ndarray:
        """Return the names of the most probable classes (cell), or predicted targets (cell x out), of :meth:`outputs`.

        Examples
        --------
        >>> list(model.predict(adata[:4])), list(labels[:4])
        (['on', 'off', 'on', 'off'], ['on', 'off', 'on', 'off'])
        """
        outputs = self.outputs(x, layer=layer)
        return self.output_names.to_numpy()[outputs.argmax(axis=1)] if self._classes else outputs

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
        """Write the model to one safetensors file of numbers and text; one that was there is whole until then.

        Examples
        --------
        >>> model.save("model.safetensors")
        """
        parts = {} if self.statistics is None else self.statistics._asdict()
        tensors = {f"statistics.{name}": torch.as_tensor(part) for name, part in parts.items()}
        known = {
            "class": type(self).__name__,
            "config": asdict(self.cfg),
            "options": self._options,
            "trials": None if self.trials is None else self.trials.to_dict("list"),
            "scaling": self.scaling,
            "recipe": self.recipe,
        }
        for name in ("gene_names", "output_names"):
            names = plain_names(getattr(self, name), name)
            known[name] = None if isinstance(names, pd.RangeIndex) else names.tolist()
        write_file(Path(path), known | {name: getattr(self, name) for name in _KEPT}, self.state_dict() | tensors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a model that :meth:`save` wrote, in evaluation mode on the CPU; no code is run from the file.

        Examples
        --------
        >>> model.save("model.safetensors")
        >>> list(ScBMLPClassifier.load("model.safetensors").output_names)
        ['off', 'on']
        """
        known, tensors = read_file(Path(path), cls.__name__)
        try:
            model = cls(Config(**known["config"]), **known["options"])
            for name in _KEPT:
                setattr(model, name, known[name])
            for name in ("gene_names", "output_names"):
                if known[name] is not None:
                    setattr(model, name, plain_names(known[name], name))
            if known["trials"] is not None:
                model.trials = pd.DataFrame(known["trials"])
            if known["scaling"] is not None:
                model.scaling = Scaling(*known["scaling"])
            if known["recipe"] is not None:
                recipe = [(tuple(map(tuple, weights)), *rest, ratio) for (weights, *rest), ratio in known["recipe"]]
                model.recipe = [(exact.Mixture(*mixture), ratio) for *mixture, ratio in recipe]
            if "statistics.mean" in tensors:
                parts = [tensors.pop(f"statistics.{name}").numpy() for name in Statistics._fields]
                model.statistics = Statistics(*parts)
            model.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"is damaged ({error}); save the model again, or take another copy"
            raise ValueError(f"{Path(path).name} {reason}.") from error
        return model.eval()


class ScBMLPClassifier(_BilinearMLP):
    """Bilinear MLP that classifies cells by logits y = P((L x + b_l) * (R x + b_r)) + b_p :cite:p:`pearce2025bilinear`.

    Attributes
    ----------
    gene_names, output_names, statistics, trials
        Names of genes and outputs, what modules need of the training cells, and what :func:`solve` tried, a row a form.
    best_epoch, calibration
        The epoch whose weights the model has, 0 for the start; what :func:`scbmlp.annotate.calibrate` returned, if put
        here to be saved with the model.

    Examples
    --------
    >>> model = ScBMLPClassifier(Config(d_input=40, d_hidden=8, d_output=2))
    >>> [tuple(weights.shape) for weights in (model.w_l, model.w_r, model.w_p)]
    [(8, 40), (8, 40), (2, 8)]
    """

    _classes = True

    @property
    def metric(self) -> str:
        """What the score is: ``accuracy``, or ``balanced_accuracy``."""
        return "accuracy" if self.cfg.class_weight is None else "balanced_accuracy"

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return what a fit makes small: the cross-entropy of class codes (cell)."""
        weight = None if self.class_weight is None else self.class_weight.to(outputs)
        # A mean over cells and not over weights, so that losses of batches add up.
        return nn.functional.cross_entropy(outputs, target, weight, reduction="sum") / len(target)

    def _measure(self, outputs: np.ndarray, target: np.ndarray) -> float:
        return accuracy(outputs, target, self.cfg.class_weight)

    def _measure_each(self, outputs: np.ndarray, target: np.ndarray) -> np.ndarray:
        codes = range(self.cfg.d_output)
        return recall_score(target, outputs.argmax(axis=1), labels=codes, average=None, zero_division=np.nan)

    def predict_proba(self, x: AnnData | ExpressionDataset | Any, *, layer: str | None = None) -> np.ndarray:
        """Return the probability of every class (cell x out) of cells as in :meth:`outputs`.

        Examples
        --------
        >>> model.predict_proba(adata[:2]).argmax(axis=1).tolist()
        [1, 0]
        """
        return torch.as_tensor(self.outputs(x, layer=layer)).softmax(dim=1).numpy()


class ScBMLPRegressor(_BilinearMLP):
    """Bilinear MLP that predicts continuous targets :cite:p:`pearce2025bilinear`, as :class:`ScBMLPClassifier`.

    Parameters
    ----------
    cfg, loss_fn
        Size and training; mean squared or absolute error, or Huber's loss with its threshold at 1 target unit.

    Examples
    --------
    >>> regressor = ScBMLPRegressor(regressor.cfg, loss_fn="huber")
    >>> list(regressor.fit(*graded[:2], enable_progress_bar=False))
    ['train_loss', 'train_r2', 'val_loss', 'val_r2']
    """

    metric = "r2"
    _classes = False
    _losses = {"mse": nn.functional.mse_loss, "l1": nn.functional.l1_loss, "huber": nn.functional.huber_loss}

    def __init__(self, cfg: Config, loss_fn: Literal["mse", "l1", "huber"] = "mse") -> None:
        if loss_fn not in self._losses:
            raise ValueError(f"loss_fn={loss_fn!r} is unknown; choose one of {', '.join(self._losses)}.")
        check_class_weight(cfg.class_weight, classes=False, config=True)
        super().__init__(cfg)
        self.loss_fn = loss_fn
        self._options = {"loss_fn": loss_fn}

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return what a fit makes small: `loss_fn` of targets (cell x out)."""
        return self._losses[self.loss_fn](outputs, target)

    def _measure(self, outputs: np.ndarray, target: np.ndarray) -> float:
        return float(self._measure_each(outputs, target).mean())

    def _measure_each(self, outputs: np.ndarray, target: np.ndarray) -> np.ndarray:
        if len(target) < 2:
            return np.full(self.cfg.d_output, np.nan)
        return r2_score(target, outputs, multioutput="raw_values")

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


def __getattr__(name: str) -> Any:
    """Offer the public functions of :mod:`scbmlp.solving` here too; nothing here needs them."""
    if name in __all__:
        return getattr(import_module("scbmlp.solving"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
