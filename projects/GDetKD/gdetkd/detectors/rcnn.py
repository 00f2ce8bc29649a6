"""Two-stage detectors with an FPN: Faster R-CNN, Mask R-CNN and Cascade R-CNN."""

from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, Callable, Collection, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import RROIHeads
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.func import functional_call

from .._compat.cascade import LABEL_LATER_STAGE
from ..errors import GDetKDError
from ..recorder import Call, replaced
from ..regions import SAMPLING_RATIO, is_aligned, levels_by_box_size, pool_in_full_precision
from ..roi_align import pool_on_levels
from ..structures import DetectorOutputs, DetectorSpec, Predictions, Regions
from .base import DETECTOR_ADAPTER_REGISTRY, DetectorAdapter
from .doubt import mark_ignored, without_doubtful, would_match


class _TwoStageAdapter(DetectorAdapter):
    """Read a two-stage detector.

    The regions are the proposals that the student's own sampler keeps for its box head. A detector with one box head is
    treated as a cascade of one stage.
    """

    def __init__(self, model: nn.Module, role: str, cfg: CfgNode) -> None:
        super().__init__(model, role, cfg)
        heads = model.roi_heads
        features = getattr(heads, "box_in_features", None)
        if features is None or len(features) < 2:
            raise GDetKDError(
                f"The {role} has no FPN: its box head ({type(heads).__name__}) reads "
                f"{'one feature map' if features is None else ', '.join(features)}, and GDetKD imitates pyramids. "
                "Choose a config whose MODEL.BACKBONE.NAME builds an FPN and whose MODEL.ROI_HEADS.NAME is "
                "StandardROIHeads."
            )
        self._features = list(features)
        self._heads = list(heads.box_head) if _is_cascade(model) else [heads.box_head]
        self._predictors = list(heads.box_predictor) if _is_cascade(model) else [heads.box_predictor]
        self._independent = _score_independently(self._predictors, role)

    @cached_property  # cached because reading the anchors waits for the GPU
    def spec(self) -> DetectorSpec:
        heads = self.model.roi_heads
        shapes = self.model.backbone.output_shape()
        head_shape = self._heads[0].output_shape
        weights = [tuple(predictor.box2box_transform.weights) for predictor in self._predictors]
        return DetectorSpec(
            channels=shapes[self._features[0]].channels,
            strides={name: shapes[name].stride for name in self._features},
            pooled_size=tuple(heads.box_pooler.output_size),
            embedding_dim=head_shape.channels * (head_shape.height or 1) * (head_shape.width or 1),
            num_classes=heads.num_classes,
            regression_weights=weights[0],
            later_regression_weights=tuple(weights[1:]),
            location_anchors=self._location_anchors(),
            anchor_offset=getattr(self._anchor_generator(), "offset", 0.0),
            independent_classes=self._independent,
            regions_per_image=heads.batch_size_per_image,
        )

    def _anchor_generator(self) -> Optional[nn.Module]:
        return getattr(self.model.proposal_generator, "anchor_generator", None)

    def _location_anchors(self) -> Optional[Dict[str, Tuple[Any, ...]]]:
        """Return the RPN's anchors on the maps that the box head reads. Other proposal generators have no anchors."""
        generator, names = self._anchor_generator(), getattr(self.model.proposal_generator, "in_features", ())
        cells = getattr(generator, "cell_anchors", ())
        anchors = {name: tuple(map(tuple, cell.tolist())) for name, cell in zip(names, cells) if not cell.is_meta}
        return {name: anchors[name] for name in self._features if name in anchors} or None

    def points(self) -> Dict[str, nn.Module]:
        points = {"pooler": self.model.roi_heads.box_pooler, "head": self._heads[0]}
        points.update({f"predictor{k}": predictor for k, predictor in enumerate(self._predictors)})
        return points

    def observe(self, calls: Dict[str, List[Call]], batched_inputs: List[Dict[str, Any]]) -> DetectorOutputs:
        # Regions are read from the pooler's inputs, because TRAIN_ON_PRED_BOXES later replaces the proposals' boxes.
        maps, _ = calls["pooler"][0].inputs
        regions = [Regions(list(call.inputs[1])) for call in calls["pooler"]]
        predictions = [self._read(calls[f"predictor{k}"][0].output) for k in range(len(self._predictors))]
        return DetectorOutputs(
            pyramid=dict(zip(self._features, maps)),
            strides=self.spec.strides,
            regions=regions[0],
            pooled=calls["pooler"][0].output,
            embeddings=calls["head"][0].output.flatten(start_dim=1),
            logits=predictions[0][0],
            deltas=predictions[0][1],
            later_stages=[Predictions(*stage) for stage in zip(regions[1:], *zip(*predictions[1:]))],
        )

    @contextmanager
    def ignoring(self, doubtful: Sequence[Boxes]) -> Iterator[None]:
        """Ignore anchors in the RPN, and leave out proposals before the box head samples or labels them."""
        generator, heads = self.model.proposal_generator, self.model.roi_heads
        with ExitStack() as stack:
            if hasattr(generator, "label_and_sample_anchors"):
                stack.enter_context(
                    replaced(generator, "label_and_sample_anchors", partial(_ignoring_anchors, generator, doubtful))
                )
            stack.enter_context(
                replaced(heads, "label_and_sample_proposals", partial(_sampling_without, heads, doubtful))
            )
            if _is_cascade(self.model):
                stack.enter_context(replaced(heads, LABEL_LATER_STAGE, partial(_labelling_without, heads, doubtful)))
            yield

    def look(
        self,
        features: Dict[str, torch.Tensor],
        regions: Optional[Regions],
        needs: Collection[str],
        later_regions: Sequence[Regions] = (),
    ) -> DetectorOutputs:
        pooler = self.model.roi_heads.box_pooler
        maps = [features[name] for name in self._features]
        outputs = DetectorOutputs(dict(zip(self._features, maps)), self.spec.strides, regions)
        reads_head = bool({"embeddings", "logits", "deltas"} & set(needs))
        pools_aligned = "pooled" in needs and not is_aligned(pooler)
        if "levels" in needs or pools_aligned:
            outputs.levels = levels_by_box_size(pooler, regions)
        if reads_head or ("pooled" in needs and not pools_aligned):
            outputs.pooled = pooled = pool_in_full_precision(pooler, maps, regions)
        if pools_aligned:
            strides, size = list(self.spec.strides.values()), self.spec.pooled_size
            outputs.pooled = pool_on_levels(maps, strides, regions, outputs.levels, size, SAMPLING_RATIO)
        if not reads_head:
            return outputs
        head = self._heads[0](pooled)
        outputs.embeddings = head.flatten(start_dim=1)
        if {"logits", "deltas"} & set(needs):
            outputs.logits, outputs.deltas = self._read(self._predictors[0](head))
            for boxes, head, predictor in zip(later_regions, self._heads[1:], self._predictors[1:]):
                pooled = pool_in_full_precision(pooler, maps, boxes)
                outputs.later_stages.append(Predictions(boxes, *self._read(predictor(head(pooled)))))
        return outputs

    def _read(self, predictions: Tuple[torch.Tensor, torch.Tensor]) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the logits and deltas of a predictor.

        A sigmoid predictor has a background column, but no loss trains it and inference ignores it. It is left out.
        """
        logits, deltas = predictions
        return (logits[:, :-1] if self._independent else logits), deltas


def _score_independently(predictors: Sequence[nn.Module], role: str) -> bool:
    """Return whether the predictors are trained with a sigmoid. Detectron2 v0.6 has no such predictors."""
    independent = {bool(getattr(predictor, "use_sigmoid_ce", False)) for predictor in predictors}
    if len(independent) > 1:
        raise GDetKDError(
            f"Some stages of the {role}'s cascade score classes with a sigmoid, some with a softmax (`use_sigmoid_ce` "
            "of its box predictors). CLS and REG need one kind. Give all stages the same."
        )
    return independent.pop()


def _is_cascade(model: nn.Module) -> bool:
    return isinstance(getattr(model.roi_heads, "box_head", None), nn.ModuleList)


def _ignoring_anchors(rpn: nn.Module, doubtful: Sequence[Boxes], original: Callable[..., Any]) -> Callable[..., Any]:
    @torch.no_grad()
    def label(anchors: List[Boxes], gt_instances: List[Instances]) -> Any:
        labels, matched_boxes = original(anchors, gt_instances)
        every = Boxes.cat(anchors)
        mark_ignored(labels, 0, [would_match(rpn.anchor_matcher, boxes, every) for boxes in doubtful])
        return labels, matched_boxes

    return label


def _sampling_without(heads: nn.Module, doubtful: Sequence[Boxes], original: Callable[..., Any]) -> Callable[..., Any]:
    @torch.no_grad()
    def sample(proposals: List[Instances], targets: List[Instances]) -> List[Instances]:
        return original(without_doubtful(heads.proposal_matcher, proposals, targets, doubtful), targets)

    return sample


def _labelling_without(heads: nn.Module, doubtful: Sequence[Boxes], original: Callable[..., Any]) -> Callable[..., Any]:
    @torch.no_grad()
    def label(proposals: List[Instances], stage: int, targets: List[Instances]) -> List[Instances]:
        matcher = heads.proposal_matchers[stage]
        return original(without_doubtful(matcher, proposals, targets, doubtful), stage, targets)

    return label


def _finds_rotated_boxes(model: nn.Module) -> bool:
    return isinstance(model.roi_heads, RROIHeads)


@DETECTOR_ADAPTER_REGISTRY.register()
class RCNNAdapter(_TwoStageAdapter):
    """Read a Faster R-CNN or Mask R-CNN."""

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, GeneralizedRCNN) and not _is_cascade(model) and not _finds_rotated_boxes(model)


@DETECTOR_ADAPTER_REGISTRY.register()
class CascadeAdapter(_TwoStageAdapter):
    """Read a Cascade R-CNN: regions, features and embeddings of the first stage, predictions of every stage.

    Detectron2 sums the losses of all stages, and divides the gradient of a stage into the pooled features by the number
    of stages. A term that reads only the first stage would send only a part of its gradient. For such a term the first
    stage runs once more, on the pooled features before the division.
    """

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, GeneralizedRCNN) and _is_cascade(model)

    def observe(self, calls: Dict[str, List[Call]], batched_inputs: List[Dict[str, Any]]) -> DetectorOutputs:
        outputs = super().observe(calls, batched_inputs)
        reads_embeddings = "embeddings" in self.needs
        # A term that sums over all stages sends its whole gradient through the recorded stages.
        reads_predictions = self.stages_compared == 1 and bool({"logits", "deltas"} & set(self.needs))
        if reads_embeddings or reads_predictions:
            head = _run_again(self._heads[0], outputs.pooled)
            if reads_embeddings:
                outputs.embeddings = head.flatten(start_dim=1)
            if reads_predictions:
                outputs.logits, outputs.deltas = self._read(_run_again(self._predictors[0], head))
        return outputs


def _run_again(module: nn.Module, inputs: torch.Tensor) -> Any:
    """Call a module a second time in a step, on copies of its buffers, so that a BatchNorm counts the batch once."""
    return functional_call(module, {name: buffer.clone() for name, buffer in module.named_buffers()}, (inputs,))
