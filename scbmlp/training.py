"""The training loop, by Lightning: steps, history and best weights of one model, or of several side by side."""

from __future__ import annotations

import inspect
import logging
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import islice
from typing import Any

import lightning
import numpy as np
import torch
from scdataset import BlockShuffling, Streaming, scDataset
from scipy import sparse
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from scbmlp.checks import nearest
from scbmlp.datasets import ExpressionDataset, dense_tensor

# Share of values that are not 0 up to which sparse products are the quicker ones (benchmarks/scale.py).
SPARSE = 0.15
# Stored cells are read as runs of so many, in random order, and as many runs as hold so many cells, or bytes, are mixed
# before batches are dealt out of them.
RUN, MIXED_CELLS, MIXED_BYTES = 64, 16384, 2**27
_WIDE = ("branches_weight", "direct_weight")  # gene x hid and gene x out, of all models


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
        self.drawn: list[dict[str, Tensor]] = []
        self.models = list(models)
        self.net = _Net(models)
        self.seen: dict[str, list[tuple[Tensor, ...]]] = {"train": [], "val": []}
        self.rows: list[dict[str, float]] | None = None
        self.interrupted = False
        self.best = starts and [{"loss": loss, "epoch": 0, "weights": weights} for loss, weights in starts]
        for name, values in zip(("mean", "scale"), units or (None, None), strict=True):
            values = None if values is None else torch.as_tensor(values, dtype=torch.float32)
            self.register_buffer(name, values, persistent=False)

    def configure_optimizers(self) -> dict[str, Any]:
        cfg = self.models[0].cfg
        # The direct weights are regularised apart from the bilinear ones.
        groups = [
            {"params": [self.net.weights[key] for key in keys], "weight_decay": decay}
            for decay, keys in self.net.decays.items()
        ]
        optimizer = torch.optim.Adam(groups, lr=cfg.lr, fused=True)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=cfg.n_epochs),
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.net.add_penalties()

    def _step(self, batch: tuple[Any, ...], stage: str) -> Tensor:
        x, y, *counts = batch
        if self.scale is not None:
            y = (y - self.mean) / self.scale
        # Losses are of full precision, whatever the products are.
        outputs = self.net(x).float()
        counts = counts[0].T if counts else [None] * len(self.models)
        each = zip(self.models, outputs, self._targets(y), counts, strict=True)
        # A process may have no cell of the last batch, and still has to take part in the step.
        losses = torch.stack([model.loss(*one) if len(y) else one[0].sum() for model, *one in each])
        self.seen[stage].append((losses.detach(), outputs.detach(), y))
        return losses.sum()  # no weight is shared, so each model learns as if alone

    def _targets(self, y: Tensor) -> Sequence[Tensor]:
        return y.unbind(1) if self.own_targets else [y] * len(self.models)

    def training_step(self, batch: tuple[Any, ...], batch_idx: int) -> Tensor:
        loss, processes = self._step(batch, "train"), self.trainer.world_size
        if processes == 1 or isinstance(self.trainer.train_dataloader.dataset, Stored):
            return loss
        # Gradients are averaged over processes, each counting as one whatever its share of the batch.
        size = self.models[0].cfg.batch_size
        together = min(size, len(self.trainer.train_dataloader.dataset) - batch_idx * size)
        return loss * (len(batch[1]) * processes / together)

    def validation_step(self, batch: tuple[Any, ...]) -> None:
        self._step(batch, "val")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rows"] = [model._rows for model in self.models]
        checkpoint["best"] = self.best
        # What is drawn next: the order of the cells, and dropout.
        checkpoint["order"] = self.order.get_state()
        drawn = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            drawn["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["random"] = _of_all(drawn)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for model, rows in zip(self.models, checkpoint["rows"], strict=True):
            model._rows = rows
        self.best = checkpoint["best"]
        self.order.set_state(checkpoint["order"].cpu())
        self.drawn = checkpoint["random"]

    def on_train_start(self) -> None:
        if self.trainer.world_size > 1:
            self.net.places = None
            torch.manual_seed(self.models[0].cfg.seed + self.global_rank)  # dropout of its own
        if len(self.drawn) == self.trainer.world_size:
            drawn = self.drawn[self.global_rank]
            torch.set_rng_state(drawn["cpu"].cpu())
            if "cuda" in drawn and self.device.type == "cuda":
                torch.cuda.set_rng_state(drawn["cuda"].cpu(), self.device)

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
        self.seen[stage].clear()
        counts = torch.tensor([float(len(y)) for y in targets])
        own = (
            torch.stack(each, dim=1).cpu() @ counts,
            counts.sum(),
            torch.cat(outputs, dim=1).cpu(),
            torch.cat(targets).cpu(),
        )
        losses, counts, outputs, targets = zip(*_of_all(own), strict=True)
        losses = (sum(losses) / sum(counts)).tolist()
        outputs, targets = torch.cat(outputs, dim=1), torch.cat(targets)
        rows = []
        for model, loss, one, target in zip(self.models, losses, outputs, self._targets(targets), strict=True):
            loss = loss if self.scale is None else self._in_target_units(model, one, target)
            measured = float(model._measure(one.numpy(), target.numpy()))
            rows.append({f"{stage}_loss": loss, f"{stage}_{model.metric}": measured})
        return rows, losses

    def _in_target_units(self, model: Any, outputs: Tensor, targets: Tensor) -> float:
        mean, scale = self.mean.cpu(), self.scale.cpu()
        return float(model.loss(outputs * scale + mean, targets * scale + mean))

    def _keep(self, losses: list[float]) -> None:
        epoch = len(self.models[0]._rows) + 1
        for i, (best, loss) in enumerate(zip(self.best, losses, strict=True)):
            if loss < best["loss"]:
                weights = {name: value.clone() for name, value in self.net.own(i).items()}
                best.update(loss=loss, epoch=epoch, weights=weights)

    def finish(self) -> None:
        """Give the models their best weights, in the units of the targets, and take them out of training mode."""
        for i, model in enumerate(self.models):
            weights = self.net.own(i) if self.best is None else self.best[i]["weights"]
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


def _of_all(own: Any) -> list[Any]:
    """Return what every process has; a list of one where there is one."""
    if not torch.distributed.is_initialized():
        return [own]
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found


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


class _Net(nn.Module):
    """Weights of one model or of several, genes first, so that one product reads the cells for all of them.

    Weights of several are stacked on an axis of their own. Cells come dense, or as CSR with their transpose.
    """

    def __init__(self, models: Sequence[Any]) -> None:
        super().__init__()
        first, self.n = models[0], len(models)
        self.hid, self.dropout = first.cfg.d_hidden, first.cfg.dropout_rate
        self.register_buffer("center", first.center.clone() if first.cfg.linear else None)
        keep = torch.tensor([1 - model.cfg.dropout_rate for model in models])
        self.register_buffer("keep", keep[:, None])
        named = [dict(model.named_parameters()) for model in models]
        self.weights = nn.ParameterDict()
        for key in (name.replace(".", "_") for name in named[0]):
            each = [one[key.replace("_", ".")].detach() for one in named]
            self.weights[key] = torch.cat(each).T.contiguous() if key in _WIDE else torch.stack(each)
        # Where gradients of large weights go; several processes have to see them come by, and have no places.
        self.places: dict[str, Tensor] | None = {}
        # Weight decay by what it is of; the optimizer has one for all models, others are added to the gradients.
        self.decays: dict[float, list[str]] = {}
        for key, weight in self.weights.items():
            field = "weight_decay_linear" if key == "direct_weight" else "weight_decay"
            each = [getattr(model.cfg, field) for model in models]
            self.decays.setdefault(each[0] if len(set(each)) == 1 else 0.0, []).append(key)
            if len(set(each)) > 1:
                each = torch.tensor(each).repeat_interleave(weight.shape[1] // self.n if key in _WIDE else 1)
                size = (1, -1) if key in _WIDE else (-1, *(1,) * (weight.ndim - 1))
                self.register_buffer(f"decay_{key}", each.reshape(size))

    def own(self, i: int) -> dict[str, Tensor]:
        """Return the weights of one model, by its names."""
        own = {}
        for key, weight in self.weights.items():
            one = weight.detach().chunk(self.n, dim=1)[i].T if key in _WIDE else weight.detach()[i]
            own[key.replace("_", ".")] = one
        return own

    def add_penalties(self) -> None:
        for key, weight in self.weights.items():
            if hasattr(self, f"decay_{key}"):
                weight.grad.addcmul_(weight.detach(), getattr(self, f"decay_{key}").expand_as(weight))

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the outputs of every model (model x cell x out)."""
        w = self.weights
        if self.center is not None and torch.is_tensor(x):
            x = x - self.center
        hidden = self._product(x, "branches_weight")
        if "branches_bias" in w:
            hidden = hidden + w["branches_bias"].flatten()
        left, right = hidden.unflatten(-1, (self.n, 2, self.hid)).unbind(2)
        product = left * right
        if self.n == 1:
            product = nn.functional.dropout(product, self.dropout, self.training)
        elif self.training:  # rates may differ
            product = product * (torch.rand_like(product) < self.keep) / self.keep
        y = torch.einsum("cmh,moh->mco", product, w["project_weight"])
        if "project_bias" in w:
            y = y + w["project_bias"][:, None]
        if "direct_weight" in w:
            direct = self._product(x, "direct_weight")
            y = y + direct.unflatten(-1, (self.n, -1)).transpose(0, 1)
        return y

    def _product(self, x: Tensor | Sequence[Tensor], key: str) -> Tensor:
        weight = self.weights[key]
        if torch.is_tensor(x) and (x.device.type != "cpu" or torch.is_autocast_enabled("cpu")):
            return x @ weight
        if self.places is not None and key not in self.places:
            self.places[key] = torch.empty_like(weight)
        return _Product.apply(x, weight, self.center, self.places and self.places[key])


class _Product(torch.autograd.Function):
    """Cells times weights (gene x hid) on the CPU, where a large gradient that is allocated anew costs a product.

    So the gradient is written into a place that is kept; without one it is returned as usual. From sparse cells the
    centre (gene) is taken off in the product.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor | Sequence[Tensor], weight: Tensor, center: Tensor | None, place: Tensor | None
    ) -> Tensor:
        x, turned = (x, x.T) if torch.is_tensor(x) else x
        ctx.x, ctx.weight, ctx.place = turned, weight, place
        ctx.center = center if x.layout == torch.sparse_csr else None
        y = x @ weight
        return y if ctx.center is None else y - center @ weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        weight, place = ctx.weight, ctx.place
        place = torch.empty_like(weight) if place is None else place
        # A gradient that is there already is of an earlier batch of the same step.
        torch.addmm(place, ctx.x, slope, beta=float(weight.grad is place), out=place)
        if ctx.center is not None:
            place.addr_(ctx.center, slope.sum(dim=0), alpha=-1)
        if ctx.place is not None:
            weight.grad, place = place, None
        return None, place, None, None


class Batches(Dataset):
    """Cells as steps take them: dense, or sparse with their transpose where that makes products quicker.

    Parameters
    ----------
    dataset
        Cells with their targets.
    counts
        How often each of several models is to count each cell (cell x model).
    orders
        For each of several models the cells whose targets it is to take (cell x model).
    dense
        Never sparse, since the products are on a GPU or of low precision.
    """

    def __init__(
        self,
        dataset: ExpressionDataset,
        counts: np.ndarray | None = None,
        orders: np.ndarray | None = None,
        dense: bool = False,
    ) -> None:
        self.dataset, self.dense = dataset, dense or not torch.backends.mkl.is_available()
        self.counts = None if counts is None else torch.as_tensor(counts, dtype=torch.float32)
        self.y = dataset.y if orders is None else dataset.y[orders]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Sequence[int]) -> tuple[Any, ...]:
        return self.ready(*self.parts(index))

    def parts(self, index: Sequence[int]) -> tuple[Any, ...]:
        """Return expression as it is, targets, and counts."""
        return self.dataset.x[index], self.y[index], *(() if self.counts is None else (self.counts[index],))

    def ready(self, x: sparse.csr_matrix | np.ndarray, *rest: Tensor) -> tuple[Any, ...]:
        """Turn expression into tensors."""
        few = sparse.issparse(x) and x.shape[1] >= 1000 and x.nnz < SPARSE * x.shape[0] * x.shape[1]
        return tuple(map(_csr, (x, x.T.tocsr()))) if few and not self.dense else dense_tensor(x), *rest

    def load(self, index: Sequence[int]) -> Batches:
        """Return the cells of some positions, in memory."""
        part = copy(self)
        part.dataset, part.y = self.dataset.load(index), self.y[index]
        part.counts = None if self.counts is None else self.counts[index]
        return part


def _csr(x: sparse.csr_matrix) -> Tensor:
    return torch.sparse_csr_tensor(x.indptr, x.indices, torch.as_tensor(x.data), x.shape, check_invariants=False)


class Stored(IterableDataset):
    """Batches of cells on disk, by scDataset: in the order of the file, or shuffled anew by every `seed`.

    Of several processes each reads runs of its own, and all have as many batches.
    """

    def __init__(self, batches: Batches, batch_size: int, shuffled: bool) -> None:
        self.batches, self.batch_size, self.shuffled, self.seed = batches, batch_size, shuffled, 0

    def share_out(self) -> None:
        """Settle which cells are this process's, how many of them a batch has, and how many batches there are."""
        rank, processes = rank_of()
        runs = -(-len(self.batches) // RUN)
        if self.shuffled and runs < processes:
            raise ValueError(
                f"{len(self.batches)} cells on disk are {runs} blocks of {RUN}, fewer than the {processes} processes; "
                f"start fewer, or take more cells."
            )
        # What is shuffled is shared out run by run, what is not in one piece each.
        cell = np.arange(len(self.batches))
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
        return max(min(MIXED_CELLS, self.batches.dataset.x.holds(MIXED_BYTES)) // size, 1)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        reader = scDataset(
            self.batches,
            BlockShuffling(RUN, self.own) if self.shuffled else Streaming(self.own),
            self.size,
            fetch_factor=self.at_once(self.size),
            fetch_callback=lambda batches, index: batches.load(index),
            batch_callback=lambda loaded, index: loaded.parts(index),
            seed=self.seed,
            rank=0,
            world_size=1,
        )
        return iter(reader)


class _StoredLoader(DataLoader):
    """Draws the seed of every epoch from the generator whose state a checkpoint keeps: workers cannot.

    Cells come from workers as sparse as they are, and are made tensors here: they are a tenth as large on the way.
    """

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        stored, left = self.dataset, len(self.dataset)
        if stored.shuffled:
            stored.seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
        for parts in islice(super().__iter__(), left):
            left -= 1
            yield stored.batches.ready(*parts)
        for _ in range(left):  # others have a batch more to wait for
            yield stored.batches[[]]


class _Share(Sampler):
    """The cells of every batch that fall to this process; all of them where it is alone."""

    def __init__(self, batches: BatchSampler) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        rank, processes = rank_of()
        for batch in self.batches:
            yield batch[rank::processes]


def rank_of() -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    several = torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)


def loader(batches: Batches, batch_size: int, generator: torch.Generator | None = None) -> DataLoader:
    """Return a loader that cuts whole batches out of the matrix, or reads them; shuffled if it has a generator.

    Several processes draw the same order, and each takes its share of every batch.
    """
    cells = batches.dataset
    if cells.stored:
        stored = Stored(batches, batch_size, generator is not None)
        # A worker that had to wait until most of what it has read is used could not read on meanwhile.
        ahead = stored.at_once(batch_size) if cells.num_workers else None
        workers = {"num_workers": cells.num_workers, "prefetch_factor": ahead}
        return _StoredLoader(stored, batch_size=None, generator=generator, **workers)
    order = SequentialSampler(batches) if generator is None else RandomSampler(batches, generator=generator)
    share = _Share(BatchSampler(order, batch_size, drop_last=False))
    return DataLoader(batches, sampler=share, batch_size=None, generator=generator)


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
    """Keep advice on hardware, workers and the age of sparse tensors off the page, for the length of a fit."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            yield
    finally:
        logger.setLevel(level)
