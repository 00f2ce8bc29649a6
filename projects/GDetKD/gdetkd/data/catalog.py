"""Read the datasets of Detectron2's catalog."""

from typing import List

from detectron2.data import DatasetCatalog

from ..errors import GDetKDError


def load_dataset(name: str) -> List[dict]:
    """Return a registered dataset's dicts in Detectron2's format. This may also set its metadata.

    Raises:
        GDetKDError: the dataset is not registered, a file of it is missing, or it has no image.
    """
    if name not in DatasetCatalog.list():
        related = sorted(known for known in DatasetCatalog.list() if known.split("_")[0] == name.split("_")[0])
        hint = f" Similar names: {', '.join(related)}." if related else ""
        raise GDetKDError(f"The dataset {name!r} is not registered. Add it to DATASETS.REGISTER.{hint}")
    try:
        dicts = DatasetCatalog.get(name)
    except FileNotFoundError as e:
        raise GDetKDError(
            f"A file of the dataset {name!r} is missing: {e.filename}. Set DETECTRON2_DATASETS to the folder that "
            "holds the dataset."
        ) from e
    if not dicts:
        raise GDetKDError(f"The dataset {name!r} has no image. Add images, or remove it from the config.")
    return dicts
