"""The training loop, by Lightning: steps, history and best weights of a model."""

from __future__ import annotations

import inspect
import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning
import numpy as np
import torch
from scdataset import BlockShuffling, Streaming, scDataset
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from scbmlp.checks import nearest
from scbmlp.datasets import ExpressionDataset, dense_tensor

# Stored cells are read in runs of so many, in random order. As many runs as hold so many cells, or bytes, are mixed.
RUN, MIXED_CELLS, MIXED_BYTES = 64, 16384, 2**27


class Training(lightning.LightningModule):
    """Steps of a fit. Apart from the model, so that a fitted model holds on to neither trainer nor data."""

    def __init__(
        self,
        model: Any,
        units: tuple[np.ndarray, np.ndarray] | None,  # mean and sd of targets, in which the model learns
        start: tuple[float, dict[str, Tensor]] | None,  # validation loss and weights that an epoch has to beat
        order: torch.Generator,  # of the order of the cells; a checkpoint keeps its state
    ) -> None:
        super().__init__()
        self.model, self.order = model, order
        self.drawn: list[dict[str, Tensor]] = []
        self.seen: dict[str, list[tuple[Tensor, ...]]] = {"train": [], "val": []}
        self.row: dict[str, float] = {}
        self.best = start and {"loss": start[0], "epoch": 0, "weights": start[1]}
        for name, values in zip(("mean", "scale"), units or (None, None), strict=True):
            values = None if values is None else torch.as_tensor(values, dtype=torch.float32)
            self.register_buffer(name, values, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).float()  # losses are of full precision, whatever the products are

    def configure_optimizers(self) -> dict[str, Any]:
        cfg, groups = self.model.cfg, {}
        for name, weight in self.model.named_parameters():
            decay = cfg.weight_decay_linear if name == "direct.weight" else cfg.weight_decay
            groups.setdefault(decay, []).append(weight)
        groups = [{"params": weights, "weight_decay": decay} for decay, weights in groups.items()]
        optimizer = torch.optim.Adam(groups, lr=cfg.lr, fused=True)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=cfg.n_epochs)
        return {"optimizer": optimizer, "lr_scheduler": cosine}

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        """Return the loss of a batch, and keep what the row of the epoch is made of."""
        x, y = batch
        if self.scale is not None:
            y = (y - self.mean) / self.scale
        outputs = self(x)
        # A process may have no cell of the last batch, and still has to take part in the step.
        loss = self.model.loss(outputs, y) if len(y) else outputs.sum()
        self.seen[stage].append((loss.detach(), outputs.detach(), y))
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss, processes = self._step(batch, "train"), self.trainer.world_size
        if processes == 1 or isinstance(self.trainer.train_dataloader.dataset, Stored):
            return loss
        # Gradients are averaged over processes, each counting as one whatever its share of the batch.
        size = self.model.cfg.batch_size
        together = min(size, len(self.trainer.train_dataloader.dataset) - batch_idx * size)
        return loss * (len(batch[1]) * processes / together)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._step(batch, "val")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rows"], checkpoint["best"] = self.model._rows, self.best
        # What is drawn next: the order of the cells, and dropout.
        checkpoint["order"] = self.order.get_state()
        drawn = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            drawn["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["random"] = _of_all(drawn)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.model._rows, self.best = checkpoint["rows"], checkpoint["best"]
        self.order.set_state(checkpoint["order"].cpu())
        self.drawn = checkpoint["random"]

    def on_train_start(self) -> None:
        if self.trainer.world_size > 1:
            torch.manual_seed(self.model.cfg.seed + self.global_rank)  # dropout of its own
        if len(self.drawn) == self.trainer.world_size:
            drawn = self.drawn[self.global_rank]
            torch.set_rng_state(drawn["cpu"].cpu())
            if "cuda" in drawn and self.device.type == "cuda":
                torch.cuda.set_rng_state(drawn["cuda"].cpu(), self.device)

    def on_validation_start(self) -> None:
        self.seen["val"].clear()  # what is left of Lightning's sanity check

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking or not self.seen["val"]:
            return
        self.row, loss = self._summary("val")
        self.log_dict(self.row, prog_bar=True)
        if self.best is not None and loss < self.best["loss"]:
            weights = {name: value.detach().clone() for name, value in self.model.named_parameters()}
            self.best = {"loss": loss, "epoch": len(self.model._rows) + 1, "weights": weights}

    def on_train_epoch_end(self) -> None:
        row, _ = self._summary("train")
        self.log_dict(row, prog_bar=True)
        # An epoch may have no validation, or several, of which its row has the last.
        self.model._rows.append(row | self.row)
        self.row = {}
        epoch, patience = len(self.model._rows), self.model.cfg.patience
        if self.best and patience is not None and epoch - self.best["epoch"] >= patience:
            self.trainer.should_stop = True

    def _summary(self, stage: str) -> tuple[dict[str, float], float]:
        """Return loss and metric over the steps of a stage, and the loss as it is trained on."""
        each, outputs, targets = zip(*self.seen[stage], strict=True)
        self.seen[stage].clear()
        counts = torch.tensor([float(len(y)) for y in targets])
        own = torch.stack(each).cpu() @ counts, counts.sum(), torch.cat(outputs).cpu(), torch.cat(targets).cpu()
        losses, counts, outputs, targets = zip(*_of_all(own), strict=True)
        loss, outputs, targets = float(sum(losses) / sum(counts)), torch.cat(outputs), torch.cat(targets)
        measured = float(self.model._measure(outputs.numpy(), targets.numpy()))
        shown = loss
        if self.scale is not None:
            mean, scale = self.mean.cpu(), self.scale.cpu()
            shown = float(self.model.loss(outputs * scale + mean, targets * scale + mean))
        return {f"{stage}_loss": shown, f"{stage}_{self.model.metric}": measured}, loss

    def finish(self) -> None:
        """Give the model its best weights, in the units of the targets, and take it out of training mode."""
        model = self.model.to("cpu")
        model.best_epoch = len(model._rows) if self.best is None else self.best["epoch"]
        with torch.no_grad():
            if self.best is not None:
                for name, parameter in model.named_parameters():
                    parameter.copy_(self.best["weights"][name])
            if self.scale is not None:
                mean, scale = self.mean.cpu(), self.scale.cpu()
                for layer in filter(None, (model.project, model.direct)):
                    layer.weight.mul_(scale[:, None])
                model.project.bias.mul_(scale).add_(mean)
        model.zero_grad(set_to_none=True)
        model.eval()


def _of_all(own: Any) -> list[Any]:
    """Return what every process has; a list of one where there is one."""
    if not torch.distributed.is_initialized():
        return [own]
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt: Lightning would end the whole program, and be deaf to the next Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(
            f"a process that reads cells ahead has died ({error}); it may have run out of memory: cut the data sets "
            f"with fewer of them, or with num_workers=0."
        ) from error


class Stored(IterableDataset):
    """Batches of cells on disk, in the order of the file or shuffled by `seed`; each process reads runs of its own."""

    def __init__(self, cells: ExpressionDataset, batch_size: int, shuffled: bool) -> None:
        self.cells, self.batch_size, self.shuffled, self.seed = cells, batch_size, shuffled, 0

    def share_out(self) -> None:
        """Settle which cells are this process's, how many of them a batch has, and how many batches there are."""
        rank, processes = rank_of()
        runs = -(-len(self.cells) // RUN)
        if self.shuffled and runs < processes:
            raise ValueError(
                f"{len(self.cells)} cells on disk are {runs} blocks of {RUN}, fewer than the {processes} processes; "
                f"start fewer, or take more cells."
            )
        # What is shuffled is shared out run by run, what is not in one piece each.
        cell = np.arange(len(self.cells))
        owner = cell // RUN % processes if self.shuffled else cell * processes // max(len(cell), 1)
        self.own, shares = np.flatnonzero(owner == rank), np.bincount(owner, minlength=processes)
        self.size = -(-self.batch_size // processes)
        # In training all shares of a batch are equal, so that all cells count the same; what is over waits an epoch.
        even = self.shuffled and processes > 1
        self.steps = max(shares.min() // self.size, 1) if even else -(-shares.max() // self.size)

    def __len__(self) -> int:
        self.share_out()
        return int(self.steps)

    def at_once(self, size: int) -> int:
        """Return how many batches of a size are dealt out of the cells that are mixed."""
        return max(min(MIXED_CELLS, self.cells.x.holds(MIXED_BYTES)) // size, 1)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        reader = scDataset(
            self.cells,
            BlockShuffling(RUN, self.own) if self.shuffled else Streaming(self.own),
            self.size,
            fetch_factor=self.at_once(self.size),
            fetch_callback=lambda cells, index: cells.load(index),
            batch_callback=lambda loaded, index: (loaded.x[index], loaded.y[index]),
            seed=self.seed,
            rank=0,
            world_size=1,
        )
        return iter(reader)


class _StoredLoader(DataLoader):
    """Draws the seed of every epoch from the generator whose state a checkpoint keeps: workers cannot."""

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        stored, left = self.dataset, len(self.dataset)
        if stored.shuffled:
            stored.seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
        for x, y in islice(super().__iter__(), left):
            left -= 1
            yield dense_tensor(x), y  # sparse on the way from a worker, a tenth as large
        for _ in range(left):  # others have a batch more to wait for
            yield stored.cells[[]]


class _Share(BatchSampler):
    """The cells of every batch that fall to this process; all of them where it is alone."""

    def __iter__(self) -> Iterator[list[int]]:
        rank, processes = rank_of()
        for batch in super().__iter__():
            yield batch[rank::processes]


def rank_of() -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    several = torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)


def loader(cells: ExpressionDataset, batch_size: int, generator: torch.Generator | None = None) -> DataLoader:
    """Return a loader of whole batches, shuffled if it has a generator; each process takes its share of every batch."""
    if cells.stored:
        stored = Stored(cells, batch_size, generator is not None)
        # A worker that had to wait until most of what it has read is used could not read on meanwhile.
        ahead = stored.at_once(batch_size) if cells.num_workers else None
        workers = {"num_workers": cells.num_workers, "prefetch_factor": ahead}
        return _StoredLoader(stored, batch_size=None, generator=generator, **workers)
    order = SequentialSampler(cells) if generator is None else RandomSampler(cells, generator=generator)
    share = _Share(order, batch_size, drop_last=False)
    return DataLoader(cells, sampler=share, batch_size=None, generator=generator)


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
        if arguments.get(name, 1) not in (1, "1") and arguments.get("strategy") != "ddp":
            raise ValueError(
                f"{name}={arguments[name]!r}: several processes need strategy='ddp', where each runs the whole script "
                f"and has the model in the end; or leave it out, and name one device by Config(device='cuda:0')."
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


def kind_of(device: str) -> str:
    """Return the kind of device that a name stands for."""
    if device == "auto" and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type
    return torch.device("cpu" if device == "auto" else device).type


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Draw from `seed` inside, and leave torch's own generators where they were; for the CPU, no GPU is asked."""
    kind = kind_of(device)
    gpu = kind != "cpu"
    kind = kind if gpu else "cuda"
    with torch.random.fork_rng(range(torch.get_device_module(kind).device_count()) if gpu else [], device_type=kind):
        torch.manual_seed(seed) if gpu else torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep advice on hardware and workers off the page, for the length of a fit."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
