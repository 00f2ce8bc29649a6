from .kinds import DATASET_KIND_REGISTRY, DatasetKind, Keys
from .register import register_datasets, register_test_sets
from .train_loader import ResumableLoader, build_train_loader

__all__ = [
    "DATASET_KIND_REGISTRY",
    "DatasetKind",
    "Keys",
    "ResumableLoader",
    "build_train_loader",
    "register_datasets",
    "register_test_sets",
]
