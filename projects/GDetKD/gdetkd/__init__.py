"""G-DetKD (Yao et al., ICCV 2021) for Detectron2: a small object detector learns from a big one."""

from ._compat import require_detectron2

require_detectron2()

from . import insight  # noqa: E402, F401, I001  adds its hooks to the trainer
from .config import add_gdetkd_config  # noqa: E402
from .distiller import GDetKD  # noqa: E402
from .engine import DistillTrainer  # noqa: E402

__version__ = "0.1.0"
__all__ = ["DistillTrainer", "GDetKD", "add_gdetkd_config", "__version__"]
