"""Keep everything that relies on the internals of Detectron2, fvcore, torch and NumPy in one place.

Each workaround names the versions that need it. A test in `tests/test_compat*.py` fails when a workaround can go.

- `imports`: import Detectron2 v0.6 on current packages. It must run before any import of Detectron2.
- `processes`: Detectron2's process groups and torch's store.
- `cascade`: the labels of a cascade's later stages.
- `retinanet`: the norms of RetinaNet's head.
- `training`: the trainer's steps, and BatchNorm.
- `evaluation`: COCO's metrics.
- `checkpoint`: the steps of loading a checkpoint.
- `pickles`: the names in pickles of NumPy's arrays, and those that torch's loader refuses.
"""

from .imports import has_compiled_ops, require_detectron2

__all__ = ["has_compiled_ops", "require_detectron2"]
