"""The training loop, by Lightning: where a fit starts, its steps, its history and its best weights."""

from __future__ import annotations

import inspect
import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from scdataset import BlockShuffling, Streaming, scDataset
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from scbmlp.baselines import LinearModel
from scbmlp.checks import nearest, warn
from scbmlp.datasets import ExpressionDataset, dense_tensor, mean
from scbmlp.display import watched

MARGIN = 0.01  # below the linear baseline by less than this is noise
# Stored cells are read in runs of so many, in random order. As many runs as hold so many cells, or bytes, are mixed.
RUN, MIXED_CELLS, MIXED_BYTES = 64, 16384, 2**27
# What a fit asks of Lightning; its loaders share out by themselves.
TRAINER = {"logger": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
FIELDS = {"max_epochs": "n_epochs", "accelerator": "device"}  # of Config, in place of the trainer's arguments
PRECISIONS = ("32-true", "32", "bf16-mixed", "16-mixed")


class Training(lightning.LightningModule):
    """A fit. Apart from the model, so that a fitted model holds on to neither trainer nor data."""

    def __init__(
        self, model: Any, train: ExpressionDataset, val: ExpressionDataset | None, baseline: LinearModel | None
    ) -> None:
        super().__init__()
        cfg = model.cfg
        self.model, self.row, self.best, self.units = model, {}, None, None
        self.order = torch.Generator().manual_seed(cfg.seed)  # of the cells; a checkpoint keeps its state
        self.drawn: list[dict[str, Tensor]] = []
        self.seen: dict[str, list[tuple[Tensor, ...]]] = {"train": [], "val": []}
        with seeded(cfg.seed):
            for layer in filter(None, (model.branches, model.project, model.direct)):
                layer.reset_parameters()
        model.train()
        model._forget()
        model._adopt(train)
        outputs = None if baseline is None else self._keep_row_of(baseline, train, val)
        if cfg.linear:
            self._start_linear(train, val, baseline, outputs)
        self.loaders = [loader(self._in_units(train), cfg.batch_size, self.order)]
        if val is not None:
            self.loaders.append(loader(self._in_units(val), max(cfg.batch_size, 1024)))

    def _keep_row_of(
        self, baseline: LinearModel, train: ExpressionDataset, val: ExpressionDataset | None
    ) -> np.ndarray | None:
        """Make the linear baseline the first row of the history, and return its outputs of the validation cells."""
        self.model._baseline, outputs = {}, None
        for stage, part in {"train": train, "val": val}.items():
            if part is not None:
                outputs = baseline.outputs(part)
                loss = self.model.loss(torch.as_tensor(outputs, dtype=torch.float32), part.y)
                self.model._baseline |= self._row(stage, loss, outputs, part.y.numpy())
        return outputs

    def _start_linear(
        self, train: ExpressionDataset, val: ExpressionDataset | None, baseline: LinearModel | None, outputs: Any
    ) -> None:
        """Start the linear part at the baseline, or at 0, and keep it as the best epoch so far.

        Targets are learnt in standard deviations; classes are as they are.
        """
        model, shift, scale = self.model, 0.0, np.ones(1)
        if not model._classes:
            y = train.y.numpy().astype(np.float64)
            shift, scale = y.mean(axis=0), np.where(np.ptp(y, axis=0) > 0, y.std(axis=0), 1.0)
            self.units = [torch.as_tensor(one, dtype=torch.float32) for one in (shift, scale)]
        with torch.no_grad():
            model.center.copy_(torch.as_tensor(mean(train.x)))
            nn.init.zeros_(model.direct.weight)
            nn.init.zeros_(model.project.bias)
            if baseline is not None:
                at_center = baseline.constant + baseline.weight @ model.origin
                model.direct.weight.copy_(torch.as_tensor(baseline.weight / scale[:, None]))
                model.project.bias.copy_(torch.as_tensor((at_center - shift) / scale))
        if val is not None:
            weights = self._weights()
            weights["project.weight"].zero_()  # the linear part alone
            outputs = np.zeros((len(val), model.cfg.d_output)) if outputs is None else (outputs - shift) / scale
            target = val.y if model._classes else torch.as_tensor((val.y.numpy() - shift) / scale)
            self.best = {"loss": float(model.loss(torch.as_tensor(outputs), target)), "epoch": 0, "weights": weights}

    def _in_units(self, cells: ExpressionDataset) -> ExpressionDataset:
        """Return the cells with targets in standard deviations from the mean, if the model learns those."""
        if self.units is None:
            return cells
        mean, scale = self.units
        cells = copy(cells)
        cells.y = (cells.y - mean) / scale
        return cells

    def run(self, ckpt_path: str | Path | None, options: dict[str, Any]) -> None:
        """Fit by a trainer with these options, and give the model its best weights, whatever happens."""
        cfg = self.model.cfg
        if ckpt_path == "last":
            ckpt_path = _newest_checkpoint(Path(options.get("default_root_dir") or "."))
        kind, _, index = cfg.device.partition(":")  # as in cuda:0
        known = {"max_epochs": cfg.n_epochs, "accelerator": kind, "devices": [int(index)] if index else 1}
        known |= {"enable_progress_bar": watched(), "enable_checkpointing": "default_root_dir" in options}
        try:
            with seeded(cfg.seed, cfg.device), _tamed():
                lightning.Trainer(**TRAINER | known | options).fit(self, *self.loaders, ckpt_path=ckpt_path)
        finally:
            self._finish()

    def configure_optimizers(self) -> dict[str, Any]:
        cfg, groups = self.model.cfg, []
        for name, weight in self.model.named_parameters():
            decay = cfg.weight_decay_linear if name == "direct.weight" else cfg.weight_decay
            groups.append({"params": [weight], "weight_decay": decay})
        optimizer = torch.optim.Adam(groups, lr=cfg.lr, fused=True)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=cfg.n_epochs)
        return {"optimizer": optimizer, "lr_scheduler": cosine}

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        """Return the loss of a batch, and keep what the row of the epoch is made of."""
        x, y = batch
        outputs = self.model(x).float()  # losses are of full precision, whatever the products are
        # A process may have no cell of the last batch, and still has to take part in the step.
        loss = self.model.loss(outputs, y) if len(y) else outputs.sum()
        self.seen[stage].append((loss.detach(), outputs.detach(), y))
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss, cells = self._step(batch, "train"), self.trainer.train_dataloader.dataset
        processes, size = self.trainer.world_size, self.model.cfg.batch_size
        if processes == 1 or isinstance(cells, Stored):
            return loss
        # Gradients are averaged over processes, each counting as one whatever its share of the batch.
        return loss * (len(batch[1]) * processes / min(size, len(cells) - batch_idx * size))

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._step(batch, "val")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # What is drawn next: the order of the cells, and dropout.
        drawn = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            drawn["cuda"] = torch.cuda.get_rng_state(self.device)
        own = {"rows": self.model._rows, "best": self.best, "order": self.order.get_state(), "random": _of_all(drawn)}
        checkpoint.update(own)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.model._rows, self.best, self.drawn = (checkpoint[name] for name in ("rows", "best", "random"))
        self.order.set_state(checkpoint["order"].cpu())

    def on_train_start(self) -> None:
        if self.trainer.world_size > 1:
            torch.manual_seed(self.model.cfg.seed + self.global_rank)  # dropout of its own
        if len(self.drawn) == self.trainer.world_size:
            drawn = self.drawn[self.global_rank]
            torch.set_rng_state(drawn["cpu"].cpu())
            if "cuda" in drawn and self.device.type == "cuda":
                torch.cuda.set_rng_state(drawn["cuda"].cpu(), self.device)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking or not self.seen["val"]:
            self.seen["val"].clear()
            return
        self.row, loss = self._summary("val")
        self.log_dict(self.row, prog_bar=True)
        if self.best is not None and loss < self.best["loss"]:
            self.best = {"loss": loss, "epoch": len(self.model._rows) + 1, "weights": self._weights()}

    def on_train_epoch_end(self) -> None:
        row, _ = self._summary("train")
        self.log_dict(row, prog_bar=True)
        # An epoch may have no validation, or several, of which its row has the last.
        self.model._rows.append(row | self.row)
        self.row = {}

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def _row(self, stage: str, loss: Any, outputs: np.ndarray, target: np.ndarray) -> dict[str, float]:
        return {
            f"{stage}_loss": float(loss),
            f"{stage}_{self.model.metric}": float(self.model._measure(outputs, target)),
        }

    def _summary(self, stage: str) -> tuple[dict[str, float], float]:
        """Return loss and metric over the steps of a stage, and the loss as it is trained on."""
        each, outputs, targets = zip(*self.seen[stage], strict=True)
        self.seen[stage].clear()
        counts = torch.tensor([float(len(y)) for y in targets])
        own = torch.stack(each).cpu() @ counts, counts.sum(), torch.cat(outputs).cpu(), torch.cat(targets).cpu()
        losses, counts, outputs, targets = zip(*_of_all(own), strict=True)
        loss, outputs, targets = float(sum(losses) / sum(counts)), torch.cat(outputs), torch.cat(targets)
        shown = loss
        if self.units is not None:
            mean, scale = self.units
            shown = self.model.loss(outputs * scale + mean, targets * scale + mean)
        return self._row(stage, shown, outputs.numpy(), targets.numpy()), loss

    def _finish(self) -> None:
        """Give the model its best weights, in the units of the targets, and take it out of training mode."""
        model = self.model.to("cpu")
        model.best_epoch = len(model._rows) if self.best is None else self.best["epoch"]
        with torch.no_grad():
            if self.best is not None:
                model.load_state_dict(self.best["weights"])
            if self.units is not None:
                mean, scale = self.units
                for layer in (model.project, model.direct):
                    layer.weight.mul_(scale[:, None])
                model.project.bias.mul_(scale).add_(mean)
        model.zero_grad(set_to_none=True)
        model.eval()


def check_sets(model: Any, train: ExpressionDataset, val: ExpressionDataset | None, baseline: Any) -> None:
    """Raise an error for cells that do not fit, and warn of what a fit without validation cells lacks."""
    model.check(train, names=False)
    if val is not None:
        model.check(val, names=False)
        if not (val.gene_names.equals(train.gene_names) and val.output_names.equals(train.output_names)):
            raise ValueError(
                "val does not have the genes and outputs of train, in its order; cut both from one AnnData."
            )
    elif model.cfg.linear and baseline is True:
        warn(
            "fit has no validation cells: the linear part starts at 0 and not at the linear baseline, whose penalty "
            "they choose, the last epoch is kept and not the best, and the fit is not compared with a linear model; "
            "pass val=."
        )


def check_trainer(arguments: dict[str, Any]) -> None:
    """Raise an error for arguments of Lightning's trainer that it does not have, or that would make a fit another."""
    known = inspect.signature(lightning.Trainer).parameters
    for name, value in arguments.items():
        if name not in known:
            wrong = f" is no argument of fit or of lightning.Trainer{nearest(name, known)}"
        elif name in FIELDS:
            wrong = f": leave it out, and build the model with Config({FIELDS[name]}=...)"
        elif name in ("devices", "num_nodes") and value not in (1, "1") and arguments.get("strategy") != "ddp":
            wrong = (
                ": several processes need strategy='ddp', where each runs the whole script and has the model in the "
                "end; or leave it out, and name one device by Config(device='cuda:0')"
            )
        elif name == "precision" and str(value or "32") not in PRECISIONS:
            wrong = (
                f": weights are kept in float32, so that interactions can be read off them; choose one of "
                f"{', '.join(PRECISIONS)}"
            )
        else:
            continue
        raise ValueError(f"{name}={value!r}{wrong}.")


def compare(model: Any, val: ExpressionDataset) -> None:
    """Warn of a model that ends below the linear baseline."""
    name = f"val_{model.metric}"
    score, least, margin = model.score(val), model._baseline[name], MARGIN
    if model.cfg.class_weight is not None:  # nor is one cell of the rarest class more than noise
        sizes = np.unique(val.y, return_counts=True)[1]
        margin += 1 / (len(sizes) * sizes.min())
    if score < least - margin:
        remedy = "scbmlp.models.solve is never below it beyond noise"
        if not model.cfg.linear:
            remedy = f"Config(linear=True) starts there and keeps the best epoch, and {remedy}"
        warn(
            f"the model ends below a linear one on the validation cells: {name} {score:.3f}, linear baseline "
            f"{least:.3f}. What it has learnt beyond a linear model is noise; {remedy}."
        )


def _newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole; a process may have been killed while it wrote one."""
    for path in sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(Exception):  # whatever the unpickling of a half file raises
            torch.load(path, map_location="cpu", weights_only=True)
            return path
    return None


@contextmanager
def _tamed() -> Iterator[None]:
    """Keep Lightning from giving advice, and from ending the program at Ctrl-C, which stays a KeyboardInterrupt."""
    logger, handler = logging.getLogger("lightning.pytorch"), signal.getsignal(signal.SIGINT)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)  # Lightning is deaf to the next Ctrl-C
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(
            f"a process that reads cells ahead has died ({error}); it may have run out of memory: cut the data sets "
            f"with fewer of them, or with num_workers=0."
        ) from error
    finally:
        logger.setLevel(level)


def kind_of(device: str) -> str:
    """Return the kind of device that a name stands for."""
    if device == "auto" and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type
    return torch.device("cpu" if device == "auto" else device).type


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Draw from `seed` inside, and leave torch's own generators where they were; for the CPU, no GPU is asked."""
    kind = kind_of(device)
    gpus = [] if kind == "cpu" else range(torch.get_device_module(kind).device_count())
    with torch.random.fork_rng(gpus, device_type="cuda" if kind == "cpu" else kind):
        torch.default_generator.manual_seed(seed) if kind == "cpu" else torch.manual_seed(seed)
        yield


def _of_all(own: Any) -> list[Any]:
    """Return what every process has; a list of one where there is one."""
    found = [own] * rank_of()[1]
    if len(found) > 1:
        torch.distributed.all_gather_object(found, own)
    return found


def rank_of() -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    several = torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)


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
