"""The models behind scikit-learn's interface, for its pipelines, cross-validation and grids."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from scbmlp.datasets import ExpressionDataset
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor


class _Bilinear(BaseEstimator):
    def __init__(self, d_hidden=128, *, linear=True, n_epochs=None, batch_size=None, lr=1e-3, dropout_rate=None,
                 weight_decay=None, validation_fraction=0.15, device="auto", random_state=0) -> None:  # fmt: skip
        self.d_hidden, self.linear, self.n_epochs, self.batch_size = d_hidden, linear, n_epochs, batch_size
        self.lr, self.dropout_rate, self.weight_decay, self.device = lr, dropout_rate, weight_decay, device
        self.validation_fraction, self.random_state = validation_fraction, random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse, tags.target_tags.multi_output = True, isinstance(self, BilinearRegressor)
        return tags

    def _fit(self, kind: Any, x: Any, y: np.ndarray, names: pd.Index) -> Self:
        seed = int(check_random_state(self.random_state).randint(2**31))
        # A set of its own chooses penalty and epoch; where cells are too few for one, the last epoch is kept.
        strata = y if y.ndim == 1 and np.bincount(y).min() > 1 else None
        n_val, parts = int(self.validation_fraction * len(y)), [np.arange(len(y))]
        if n_val >= (2 if strata is None else len(names)):
            parts = train_test_split(parts[0], test_size=n_val, stratify=strata, random_state=seed)
        genes = getattr(self, "feature_names_in_", pd.RangeIndex(x.shape[1]))
        sets = [ExpressionDataset(x[i], y[i], genes, names, i) for i in map(np.sort, parts)]
        fields = {name: value for name, value in self.get_params().items() if name in Config.__dataclass_fields__}
        self.model_ = kind(Config(x.shape[1], d_output=len(names), seed=seed, **fields))
        self.n_iter_ = len(self.model_.fit(*sets, baseline=len(sets) == 2, enable_progress_bar=False))
        return self

    def _outputs(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return self.model_.outputs(validate_data(self, X, accept_sparse="csr", dtype=np.float32, reset=False))


class BilinearClassifier(ClassifierMixin, _Bilinear):
    """:class:`scbmlp.models.ScBMLPClassifier` as an estimator of scikit-learn; ``model_`` is the fitted model.

    Parameters
    ----------
    d_hidden, linear, n_epochs, batch_size, lr, dropout_rate, weight_decay, device
        As in :class:`scbmlp.models.Config`, but that `linear` is the default.
    validation_fraction
        Share of the cells that choose the penalty of the linear baseline and the epoch.
    random_state
        Seed of that choice, and of the fit.
    class_weight
        None or ``"balanced"``, as in :class:`scbmlp.models.Config`; ``score`` is scikit-learn's, plain accuracy.

    Examples
    --------
    >>> from sklearn.model_selection import cross_val_score
    >>> estimator = BilinearClassifier(d_hidden=8, n_epochs=20)
    >>> cross_val_score(estimator, adata.X, labels, cv=2).round(2).tolist()
    [0.88, 0.89]
    """

    def __init__(self, d_hidden=128, *, linear=True, n_epochs=None, batch_size=None, lr=1e-3, dropout_rate=None,
                 weight_decay=None, validation_fraction=0.15, device="auto", random_state=0,
                 class_weight=None) -> None:  # fmt: skip
        super().__init__(d_hidden, linear=linear, n_epochs=n_epochs, batch_size=batch_size, lr=lr,
                         dropout_rate=dropout_rate, weight_decay=weight_decay, device=device,
                         validation_fraction=validation_fraction, random_state=random_state)  # fmt: skip
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to cells (cell x gene), dense or sparse, and their classes (cell).

        Examples
        --------
        >>> fitted = BilinearClassifier(8, n_epochs=2).fit(adata.X, labels)
        >>> list(fitted.classes_), fitted.model_.cfg.n_epochs
        (['off', 'on'], 2)
        """
        x, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float32)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has one class, {self.classes_[0]}; add cells of another.")
        return self._fit(ScBMLPClassifier, x, codes, pd.RangeIndex(len(self.classes_)))

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of cells (cell).

        Examples
        --------
        >>> fitted = BilinearClassifier(8, n_epochs=2).fit(adata.X, labels)
        >>> set(fitted.predict(adata.X)) == {"off", "on"}
        True
        """
        outputs = self._outputs(X)
        return self.classes_[outputs.argmax(axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of every class (cell x out).

        Examples
        --------
        >>> fitted = BilinearClassifier(8, n_epochs=2).fit(adata.X, labels)
        >>> fitted.predict_proba(adata.X[:3]).sum(axis=1).round(2).tolist()
        [1.0, 1.0, 1.0]
        """
        return softmax(self._outputs(X).astype(np.float64), axis=1)


class BilinearRegressor(RegressorMixin, _Bilinear):
    """:class:`scbmlp.models.ScBMLPRegressor` as an estimator of scikit-learn, as :class:`BilinearClassifier`.

    Examples
    --------
    >>> fitted = BilinearRegressor(8, n_epochs=2).fit(adata.X, truth["state"])
    >>> round(fitted.score(adata.X, truth["state"]), 2)
    0.91
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to cells (cell x gene), dense or sparse, and their targets (cell, or cell x out).

        Examples
        --------
        >>> BilinearRegressor(8, n_epochs=2).fit(adata.X, truth["state"]).n_iter_
        3
        """
        x, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float32, multi_output=True, y_numeric=True)
        self._flat, y = y.ndim == 1, y.reshape(len(y), -1).astype(np.float32)
        return self._fit(ScBMLPRegressor, x, y, pd.RangeIndex(y.shape[1]))

    def predict(self, X: Any) -> np.ndarray:
        """Return the predicted targets (cell, or cell x out).

        Examples
        --------
        >>> fitted = BilinearRegressor(8, n_epochs=2).fit(adata.X, truth["state"])
        >>> fitted.predict(adata.X[:2]).round().astype(int).tolist()
        [[1, 1, 0, 1], [0, 1, 1, 1]]
        """
        outputs = self._outputs(X).astype(np.float64)
        return outputs[:, 0] if self._flat else outputs
