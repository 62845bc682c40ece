"""The models behind scikit-learn's interface, for its pipelines, cross-validation and grids."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from scbmlp.datasets import ExpressionDataset
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor


def _checked(estimator: BaseEstimator, x: Any, *args: Any, **options: Any) -> Any:
    if isinstance(x, AnnData):
        raise ValueError("X is AnnData; pass its expression, adata.X, or adata.to_df() with the names of the genes.")
    return validate_data(estimator, x, *args, accept_sparse="csr", dtype=np.float32, **options)


@dataclass(eq=False, repr=False)
class _Bilinear(BaseEstimator):
    d_hidden: int = 128
    _: KW_ONLY
    linear: bool = True
    n_epochs: int | None = None
    batch_size: int | None = None
    lr: float = 1e-3
    dropout_rate: float | None = None
    weight_decay: float | None = None
    validation_fraction: float = 0.15
    device: str = "auto"
    random_state: Any = 0

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.target_tags.multi_output = isinstance(self, RegressorMixin)
        return tags

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to cells (cell x gene), dense or sparse, and their classes (cell) or targets (cell, or cell x out)."""
        numeric = isinstance(self, RegressorMixin)
        x, y = _checked(self, X, y, multi_output=numeric, y_numeric=numeric)
        if numeric:
            self._flat, y = y.ndim == 1, y.reshape(len(y), -1).astype(np.float32)
        else:
            check_classification_targets(y)
            self.classes_, y = np.unique(y, return_inverse=True)
            if len(self.classes_) < 2:
                raise ValueError(f"y has one class, {self.classes_[0]}; add cells of another.")
        names = pd.RangeIndex(y.shape[1] if numeric else len(self.classes_))
        seed = int(check_random_state(self.random_state).randint(2**31))
        # Validation cells choose penalty and epoch; where cells are too few for that, the last epoch is kept.
        strata = y if y.ndim == 1 and np.bincount(y).min() > 1 else None
        n_val, parts = int(self.validation_fraction * len(y)), [np.arange(len(y))]
        if n_val >= (2 if strata is None else len(names)):
            parts = train_test_split(parts[0], test_size=n_val, stratify=strata, random_state=seed)
        genes = getattr(self, "feature_names_in_", pd.RangeIndex(x.shape[1]))
        sets = [ExpressionDataset(x[i], y[i], genes, names, i) for i in map(np.sort, parts)]
        fields = {name: value for name, value in self.get_params().items() if name in Config.__dataclass_fields__}
        kind = ScBMLPRegressor if numeric else ScBMLPClassifier
        self.model_ = kind(Config(x.shape[1], d_output=len(names), seed=seed, **fields))
        self.n_iter_ = len(self.model_.fit(*sets, baseline=len(sets) == 2, enable_progress_bar=False))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of cells (cell), or their predicted targets (cell, or cell x out)."""
        outputs = self._outputs(X)
        if isinstance(self, ClassifierMixin):
            return self.classes_[outputs.argmax(axis=1)]
        return outputs[:, 0] if self._flat else outputs

    def _outputs(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return self.model_.outputs(_checked(self, X, reset=False)).astype(np.float64)


@dataclass(eq=False, repr=False, kw_only=True)
class BilinearClassifier(ClassifierMixin, _Bilinear):
    """:class:`scbmlp.models.ScBMLPClassifier` as an estimator of scikit-learn; ``model_`` is the fitted model.

    Parameters
    ----------
    d_hidden, linear, n_epochs, batch_size, lr, dropout_rate, weight_decay, device, class_weight
        As in :class:`scbmlp.models.Config`, but `linear` is on by default.
    validation_fraction, random_state
        Share of the cells that choose the epoch and the penalty of the linear baseline, and the seed.

    Examples
    --------
    >>> from sklearn.model_selection import cross_val_score
    >>> estimator = BilinearClassifier(d_hidden=8, n_epochs=20)
    >>> cross_val_score(estimator, adata.X, labels, cv=2).round(2).tolist()
    [0.88, 0.89]
    """

    class_weight: str | None = None

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of every class (cell x out)."""
        return softmax(self._outputs(X), axis=1)


@dataclass(eq=False, repr=False)
class BilinearRegressor(RegressorMixin, _Bilinear):
    """:class:`scbmlp.models.ScBMLPRegressor` as an estimator of scikit-learn, as :class:`BilinearClassifier`.

    >>> fitted = BilinearRegressor(8, n_epochs=2).fit(adata.X, truth["state"])
    >>> round(fitted.score(adata.X, truth["state"]), 2)
    0.91
    """
