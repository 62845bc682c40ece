"""The training loop, by Lightning: steps, history and best weights of one model, or of several side by side."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from scbmlp.datasets import ExpressionDataset


class Training(lightning.LightningModule):
    """Steps of a fit. Apart from the models, so that a fitted model holds on to neither trainer nor data.

    Parameters
    ----------
    models
        One model; or several of one form and size, which then see the same batches.
    units
        Mean and standard deviation of the targets (each out), in whose units the models learn; None for classes.
    starts
        For each model the validation loss and the weights that any epoch has to beat, None to keep the last epoch.
    """

    def __init__(
        self,
        models: Sequence[Any],
        units: tuple[np.ndarray, np.ndarray] | None = None,
        starts: Sequence[tuple[float, dict[str, Tensor]]] | None = None,
    ) -> None:
        super().__init__()
        self.models = list(models)
        self.net = models[0] if len(models) == 1 else _SideBySide(models)
        self.seen: dict[str, list[tuple[Tensor, ...]]] = {"train": [], "val": []}
        self.best = starts and [{"loss": loss, "epoch": 0, "weights": weights} for loss, weights in starts]
        for name, values in zip(("mean", "scale"), units or (None, None), strict=True):
            values = None if values is None else torch.as_tensor(values, dtype=torch.float32)
            self.register_buffer(name, values, persistent=False)

    def configure_optimizers(self) -> dict[str, Any]:
        cfg = self.models[0].cfg
        if len(self.models) > 1:  # their penalties differ, and are added to the gradients
            groups = [{"params": list(self.net.parameters()), "weight_decay": 0.0}]
        else:
            # The direct weights are regularised apart from the bilinear ones.
            named = dict(self.net.named_parameters())
            direct = named.pop("direct.weight", None)
            groups = [{"params": list(named.values()), "weight_decay": cfg.weight_decay}]
            groups += [] if direct is None else [{"params": [direct], "weight_decay": cfg.weight_decay_linear}]
        optimizer = torch.optim.Adam(groups, lr=cfg.lr, fused=True)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=cfg.n_epochs),
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if len(self.models) > 1:
            self.net.add_penalties()

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, y = batch
        if self.scale is not None:
            y = (y - self.mean) / self.scale
        outputs = self.net(x).reshape(len(self.models), len(x), -1)
        losses = torch.stack([model.loss(one, y) for model, one in zip(self.models, outputs, strict=True)])
        self.seen[stage].append((losses.detach(), outputs.detach(), y))
        return losses.sum()  # no weight is shared, so each model learns as if alone

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._step(batch, "val")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rows"] = [model._rows for model in self.models]
        checkpoint["best"] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for model, rows in zip(self.models, checkpoint["rows"], strict=True):
            model._rows = rows
        self.best = checkpoint["best"]

    def on_train_epoch_end(self) -> None:
        rows: list[dict[str, float]] = [{} for _ in self.models]
        losses = None
        for stage, steps in self.seen.items():
            if steps:
                each, outputs, targets = zip(*steps, strict=True)
                weights = torch.tensor([float(len(y)) for y in targets])
                losses = (torch.stack(each, dim=1).cpu() @ weights / weights.sum()).tolist()
                outputs, targets = torch.cat(outputs, dim=1), torch.cat(targets)
                for model, row, loss, one in zip(self.models, rows, losses, outputs, strict=True):
                    row[f"{stage}_loss"] = loss if self.scale is None else self._in_target_units(model, one, targets)
                    row[f"{stage}_{model.metric}"] = float(model._measure(one.cpu().numpy(), targets.cpu().numpy()))
                steps.clear()
        for model, row in zip(self.models, rows, strict=True):
            model._rows.append(row)
        self.log_dict(rows[0], prog_bar=True)
        if self.best is not None:  # losses are those of the validation cells, which come last
            self._keep(losses)

    def _in_target_units(self, model: Any, outputs: Tensor, targets: Tensor) -> float:
        return float(model.loss(outputs * self.scale + self.mean, targets * self.scale + self.mean))

    def _keep(self, losses: list[float]) -> None:
        epoch = len(self.models[0]._rows)
        for i, (best, loss) in enumerate(zip(self.best, losses, strict=True)):
            if loss < best["loss"]:
                weights = {name: value.clone() for name, value in self._weights(i).items()}
                best.update(loss=loss, epoch=epoch, weights=weights)
        patience = self.models[0].cfg.patience
        if patience is not None and all(epoch - best["epoch"] >= patience for best in self.best):
            self.trainer.should_stop = True

    def _weights(self, i: int) -> dict[str, Tensor]:
        named = {name: value.detach() for name, value in self.net.named_parameters()}
        return named if len(self.models) == 1 else {self.net.name(key): value[i] for key, value in named.items()}

    def finish(self) -> None:
        """Give the models their best weights, in the units of the targets, and take them out of training mode."""
        for i, model in enumerate(self.models):
            weights = self._weights(i) if self.best is None else self.best[i]["weights"]
            model.best_epoch = len(model._rows) if self.best is None else self.best[i]["epoch"]
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in weights.items():
                    parameters[name].copy_(value)
                if self.scale is not None:
                    mean, scale = (value.to(model.project.weight) for value in (self.mean, self.scale))
                    for layer in filter(None, (model.project, model.direct)):
                        layer.weight.mul_(scale[:, None])
                    model.project.bias.mul_(scale).add_(mean)
            model.eval()


class _SideBySide(nn.Module):
    """Weights of several models, stacked on an axis of their own: one product reads the cells for all of them."""

    def __init__(self, models: Sequence[Any]) -> None:
        super().__init__()
        first = models[0]
        self.hid, self.linear = first.cfg.d_hidden, first.cfg.linear
        self.register_buffer("center", first.center.clone())
        keep = torch.tensor([1 - model.cfg.dropout_rate for model in models])
        self.register_buffer("keep", keep[:, None])
        named = [dict(model.named_parameters()) for model in models]
        self.weights = nn.ParameterDict(
            {name.replace(".", "_"): torch.stack([one[name].detach() for one in named]) for name in named[0]}
        )
        for key in self.weights:
            field = "weight_decay_linear" if key == "direct_weight" else "weight_decay"
            decay = torch.tensor([getattr(model.cfg, field) for model in models])
            self.register_buffer(f"decay_{key}", decay.reshape(-1, *(1,) * (self.weights[key].ndim - 1)))

    @staticmethod
    def name(key: str) -> str:
        """Return what a model calls the weights that are stacked under `key`."""
        return key.removeprefix("weights.").replace("_", ".")

    def add_penalties(self) -> None:
        for key, weight in self.weights.items():
            weight.grad.addcmul_(weight.detach(), getattr(self, f"decay_{key}").expand_as(weight))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of every model (model x cell x out)."""
        w = self.weights
        if self.linear:
            x = x - self.center
        hidden = nn.functional.linear(x, w["branches_weight"].flatten(0, 1))
        if "branches_bias" in w:
            hidden = hidden + w["branches_bias"].flatten()
        left, right = hidden.unflatten(-1, (-1, 2, self.hid)).unbind(2)
        product = left * right
        if self.training:
            product = product * (torch.rand_like(product) < self.keep) / self.keep
        y = torch.einsum("cmh,moh->mco", product, w["project_weight"])
        if "project_bias" in w:
            y = y + w["project_bias"][:, None]
        if self.linear:
            direct = nn.functional.linear(x, w["direct_weight"].flatten(0, 1))
            y = y + direct.unflatten(-1, (len(y), -1)).transpose(0, 1)
        return y


def loader(dataset: ExpressionDataset, batch_size: int, generator: torch.Generator | None = None) -> DataLoader:
    """Return a loader that cuts whole batches out of the matrix; shuffled if it has a generator."""
    order = SequentialSampler(dataset) if generator is None else RandomSampler(dataset, generator=generator)
    return DataLoader(
        dataset, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None, generator=generator
    )


def accelerator(device: str) -> dict[str, Any]:
    """Translate a torch device name into the arguments of Lightning."""
    if device == "auto":
        return {"accelerator": "auto", "devices": 1}
    device = torch.device(device)
    return {"accelerator": device.type, "devices": 1 if device.index is None else [device.index]}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, and leave torch's own generators where they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet_lightning() -> Iterator[None]:
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
