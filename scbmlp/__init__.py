"""Read gene-gene interactions off the weights of bilinear MLPs trained on single cells."""

from importlib import import_module

__version__ = "0.1.0"
__all__ = [
    "annotate", "audit", "baselines", "datasets", "effects", "enrichment", "evidence", "exact", "explorer",
    "interactions", "knockoffs", "look", "models", "modules", "moments", "nested", "plotting", "preparing", "report",
    "simulate", "sklearn", "solving", "sources", "stability", "stores", "targets",
]  # fmt: skip


def __getattr__(name: str):
    # Modules are imported when they are first asked for: torch and scanpy take seconds.
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
