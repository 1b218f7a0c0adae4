"""hocket: federated fine-tuning of large language models in which nobody waits."""

__version__ = "0.1.0"
