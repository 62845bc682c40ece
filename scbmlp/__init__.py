"""Read gene-gene interactions off the weights of bilinear MLPs trained on single cells."""

__version__ = "0.1.0"
