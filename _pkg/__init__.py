"""Post-hoc analysis of saved neural-network checkpoints: how a network learned, with error bars."""

__version__ = "0.1.0"
