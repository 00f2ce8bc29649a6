from .base import DETECTOR_ADAPTER_REGISTRY, DetectorAdapter, build_adapter, find_adapter
from .dense import DenseAdapter
from .dense_families import FCOSAdapter, RetinaNetAdapter
from .fcos import FCOS
from .rcnn import CascadeAdapter, RCNNAdapter
from .torchvision_detector import TorchvisionDetector
from .torchvision_teachers import TorchvisionFCOSAdapter, TorchvisionRCNNAdapter, TorchvisionRetinaNetAdapter

__all__ = [
    "DETECTOR_ADAPTER_REGISTRY",
    "CascadeAdapter",
    "DenseAdapter",
    "DetectorAdapter",
    "FCOS",
    "FCOSAdapter",
    "RCNNAdapter",
    "RetinaNetAdapter",
    "TorchvisionDetector",
    "TorchvisionFCOSAdapter",
    "TorchvisionRCNNAdapter",
    "TorchvisionRetinaNetAdapter",
    "build_adapter",
    "find_adapter",
]
