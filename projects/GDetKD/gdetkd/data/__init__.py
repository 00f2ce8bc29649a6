from .register import register_datasets
from .train_loader import ResumableLoader, build_train_loader

__all__ = ["ResumableLoader", "build_train_loader", "register_datasets"]
