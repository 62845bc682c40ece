"""The training loop, by Lightning: steps, history and best weights of one model, or of several side by side."""

from __future__ import annotations

import inspect
import logging
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning
import numpy as np
import torch
from scdataset import BlockShuffling, Streaming, scDataset
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from scbmlp.checks import nearest
from scbmlp.datasets import ExpressionDataset, dense_tensor

# Stored cells are read as runs of so many, in random order, and as many runs as hold so many cells, or bytes, are mixed
# before batches are dealt out of them: of two classes in a row, a batch of 1,024 then has shares that are off by 3%.
RUN, MIXED_CELLS, MIXED_BYTES = 64, 16384, 2**27


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
    order
        Generator of the order of the cells, whose state a checkpoint keeps.
    own_targets
        Whether a batch has targets for each model (cell x model, or cell x model x out).

    A batch may have a third part, how often each model is to count each of its cells (cell x model).
    """

    def __init__(
        self,
        models: Sequence[Any],
        units: tuple[np.ndarray, np.ndarray] | None = None,
        starts: Sequence[tuple[float, dict[str, Tensor]]] | None = None,
        order: torch.Generator | None = None,
        own_targets: bool = False,
    ) -> None:
        super().__init__()
        self.order, self.own_targets = order or torch.Generator(), own_targets
        self.drawn: dict[str, Tensor] = {}
        self.models = list(models)
        self.net = models[0] if len(models) == 1 else _SideBySide(models)
        self.seen: dict[str, list[tuple[Tensor, ...]]] = {"train": [], "val": []}
        self.rows: list[dict[str, float]] | None = None
        self.interrupted = False
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

    def _step(self, batch: tuple[Tensor, ...], stage: str) -> Tensor:
        x, y, *counts = batch
        if self.scale is not None:
            y = (y - self.mean) / self.scale
        # Losses are of full precision, whatever the products are.
        outputs = self.net(x).float().reshape(len(self.models), len(x), -1)
        counts = counts[0].T if counts else [None] * len(self.models)
        each = zip(self.models, outputs, self._targets(y), counts, strict=True)
        losses = torch.stack([model.loss(*one) for model, *one in each])
        self.seen[stage].append((losses.detach(), outputs.detach(), y))
        return losses.sum()  # no weight is shared, so each model learns as if alone

    def _targets(self, y: Tensor) -> Sequence[Tensor]:
        return y.unbind(1) if self.own_targets else [y] * len(self.models)

    def training_step(self, batch: tuple[Tensor, ...]) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._step(batch, "val")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rows"] = [model._rows for model in self.models]
        checkpoint["best"] = self.best
        # What is drawn next: the order of the cells, and dropout.
        checkpoint["order"], checkpoint["random"] = self.order.get_state(), torch.get_rng_state()
        if self.device.type == "cuda":
            checkpoint["random_cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for model, rows in zip(self.models, checkpoint["rows"], strict=True):
            model._rows = rows
        self.best = checkpoint["best"]
        if "order" in checkpoint:
            self.order.set_state(checkpoint["order"].cpu())
            self.drawn = {name: checkpoint[name] for name in ("random", "random_cuda") if name in checkpoint}

    def on_train_start(self) -> None:
        if "random" in self.drawn:
            torch.set_rng_state(self.drawn["random"].cpu())
        if "random_cuda" in self.drawn and self.device.type == "cuda":
            torch.cuda.set_rng_state(self.drawn["random_cuda"].cpu(), self.device)

    def on_validation_start(self) -> None:
        self.seen["val"].clear()  # what is left of Lightning's sanity check

    def on_train_batch_end(self, *args: Any) -> None:
        if self.interrupted:
            raise Interrupted

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking and self.seen["val"]:
            self.rows, losses = self._summary("val")
            self.log_dict(self.rows[0], prog_bar=True)
            if self.best is not None:
                self._keep(losses)

    def on_train_epoch_end(self) -> None:
        rows, _ = self._summary("train")
        self.log_dict(rows[0], prog_bar=True)
        # An epoch may have no validation, or several, of which its row has the last.
        for model, row, validated in zip(self.models, rows, self.rows or [{}] * len(rows), strict=True):
            model._rows.append(row | validated)
        self.rows = None
        epoch, patience = len(self.models[0]._rows), self.models[0].cfg.patience
        if self.best and patience is not None and all(epoch - best["epoch"] >= patience for best in self.best):
            self.trainer.should_stop = True

    def _summary(self, stage: str) -> tuple[list[dict[str, float]], list[float]]:
        """Return loss and metric of every model over the steps of a stage, and the losses as they are trained on."""
        each, outputs, targets = zip(*self.seen[stage], strict=True)
        weights = torch.tensor([float(len(y)) for y in targets])
        losses = (torch.stack(each, dim=1).cpu() @ weights / weights.sum()).tolist()
        outputs, targets = torch.cat(outputs, dim=1), torch.cat(targets)
        self.seen[stage].clear()
        rows = []
        for model, loss, one, target in zip(self.models, losses, outputs, self._targets(targets), strict=True):
            loss = loss if self.scale is None else self._in_target_units(model, one, target)
            measured = float(model._measure(one.cpu().numpy(), target.cpu().numpy()))
            rows.append({f"{stage}_loss": loss, f"{stage}_{model.metric}": measured})
        return rows, losses

    def _in_target_units(self, model: Any, outputs: Tensor, targets: Tensor) -> float:
        return float(model.loss(outputs * self.scale + self.mean, targets * self.scale + self.mean))

    def _keep(self, losses: list[float]) -> None:
        epoch = len(self.models[0]._rows) + 1
        for i, (best, loss) in enumerate(zip(self.best, losses, strict=True)):
            if loss < best["loss"]:
                weights = {name: value.clone() for name, value in self._weights(i).items()}
                best.update(loss=loss, epoch=epoch, weights=weights)

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


class Interrupted(Exception):
    """A fit was asked to end, by Ctrl-C: Lightning would end the whole program, and be deaf to the next one."""


@contextmanager
def interruptible(training: Training) -> Iterator[None]:
    """Let Ctrl-C end a fit after the step it is in, and be the KeyboardInterrupt that Python users expect."""
    inside_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if inside_main else None

    def note(*_: Any) -> None:
        if training.interrupted:  # asked twice: a step hangs
            raise KeyboardInterrupt
        training.interrupted = True

    if before is not None:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except Interrupted:
        raise KeyboardInterrupt from None
    except SystemExit as error:  # what Lightning makes of an interrupt that comes from elsewhere
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(
            f"a process that reads cells ahead has died ({error}); it may have run out of memory: cut the data sets "
            f"with fewer of them, or with num_workers=0."
        ) from error
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


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


class Counted(Dataset):
    """Cells with how often each of several models is to count them (cell x model)."""

    def __init__(self, dataset: ExpressionDataset, counts: np.ndarray) -> None:
        self.dataset, self.counts = dataset, torch.as_tensor(counts, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        return *self.dataset[index], self.counts[index]

    def parts(self, index: np.ndarray) -> tuple[Any, ...]:
        return *self.dataset.parts(index), self.counts[index]

    def load(self, index: np.ndarray) -> Counted:
        return Counted(self.dataset.load(index), self.counts[index])


class Permuted(Dataset):
    """Cells with the targets of others, in an order of its own for each of several models (cell x model)."""

    def __init__(self, dataset: ExpressionDataset, orders: np.ndarray, y: Tensor | None = None) -> None:
        self.dataset, self.orders = dataset, torch.as_tensor(orders)
        self.y = dataset.y if y is None else y

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: list[int]) -> tuple[Tensor, Tensor]:
        return self.dataset[index][0], self.y[self.orders[index]]

    def parts(self, index: np.ndarray) -> tuple[Any, ...]:
        return self.dataset.parts(index)[0], self.y[self.orders[index]]

    def load(self, index: np.ndarray) -> Permuted:
        return Permuted(self.dataset.load(index), self.orders[index], self.y)


def _cells(dataset: Dataset) -> ExpressionDataset:
    return dataset if isinstance(dataset, ExpressionDataset) else dataset.dataset


class Stored(IterableDataset):
    """Batches of cells on disk, by scDataset: in the order of the file, or shuffled anew by every `seed`."""

    def __init__(self, dataset: Dataset, batch_size: int, shuffled: bool) -> None:
        self.dataset, self.batch_size, self.shuffled, self.seed = dataset, batch_size, shuffled, 0

    def _reader(self) -> scDataset:
        mixed = min(MIXED_CELLS, _cells(self.dataset).x.holds(MIXED_BYTES))
        return scDataset(
            self.dataset,
            BlockShuffling(RUN) if self.shuffled else Streaming(),
            self.batch_size,
            fetch_factor=max(mixed // self.batch_size, 1),
            fetch_callback=lambda dataset, index: dataset.load(index),
            batch_callback=lambda loaded, index: loaded.parts(index),
            seed=self.seed,
        )

    def __len__(self) -> int:
        return len(self._reader())

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self._reader())


class _StoredLoader(DataLoader):
    """Draws the seed of every epoch from the generator whose state a checkpoint keeps: workers cannot.

    Cells come from workers as sparse as they are, and are made dense here: they are a tenth as large on the way.
    """

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self.dataset.shuffled:
            self.dataset.seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
        for x, *rest in super().__iter__():
            yield dense_tensor(x), *rest


def loader(dataset: Dataset, batch_size: int, generator: torch.Generator | None = None) -> DataLoader:
    """Return a loader that cuts whole batches out of the matrix, or reads them; shuffled if it has a generator."""
    cells = _cells(dataset)
    if cells.stored:
        stored = Stored(dataset, batch_size, generator is not None)
        return _StoredLoader(stored, batch_size=None, num_workers=cells.num_workers, generator=generator)
    order = SequentialSampler(dataset) if generator is None else RandomSampler(dataset, generator=generator)
    return DataLoader(
        dataset, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None, generator=generator
    )


def check_trainer(arguments: dict[str, Any]) -> None:
    """Raise an error for arguments of Lightning's trainer that it does not have, or that would make a fit another."""
    known = inspect.signature(lightning.Trainer).parameters
    for name, value in arguments.items():
        if name not in known:
            raise ValueError(f"{name}={value!r} is no argument of fit or of lightning.Trainer{nearest(name, known)}.")
    for name, field in {"max_epochs": "n_epochs", "accelerator": "device"}.items():
        if name in arguments:
            raise ValueError(f"{name}={arguments[name]!r}: leave it out, and build the model with Config({field}=...).")
    for name in ("devices", "num_nodes"):
        if arguments.get(name, 1) not in (1, "1"):
            raise ValueError(
                f"{name}={arguments[name]!r}: a fit is on one device, since its history and best epoch are of all "
                f"cells; leave it out, and name a device by Config(device='cuda:0')."
            )
    allowed = ("32-true", "32", "bf16-mixed", "16-mixed")
    if str(arguments.get("precision") or "32") not in allowed:
        raise ValueError(
            f"precision={arguments['precision']!r}: weights are kept in float32, so that interactions can be read off "
            f"them; choose one of {', '.join(allowed)}."
        )


def accelerator(device: str) -> dict[str, Any]:
    """Translate a torch device name into the arguments of Lightning."""
    if device == "auto":
        return {"accelerator": "auto", "devices": 1}
    device = torch.device(device)
    return {"accelerator": device.type, "devices": 1 if device.index is None else [device.index]}


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Draw from `seed` inside, and leave torch's own generators where they were; for the CPU, no GPU is asked."""
    kind = torch.device("cpu" if device == "auto" else device).type
    if device == "auto" and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
    gpu = kind != "cpu"
    kind = kind if gpu else "cuda"
    with torch.random.fork_rng(range(torch.get_device_module(kind).device_count()) if gpu else [], device_type=kind):
        torch.manual_seed(seed) if gpu else torch.default_generator.manual_seed(seed)
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
