from .base import DETECTOR_ADAPTER_REGISTRY, DetectorAdapter, build_adapter
from .rcnn import RCNNAdapter

__all__ = ["DETECTOR_ADAPTER_REGISTRY", "DetectorAdapter", "RCNNAdapter", "build_adapter"]
