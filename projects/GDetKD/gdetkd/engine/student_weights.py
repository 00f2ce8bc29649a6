"""Load the student's weights, and find the tensors that a file leaves out."""

from typing import Any, Dict, List, Sequence, Set

from detectron2.config import CfgNode
from torch import nn

from ..backbones import find_bottom_up, load_pretrained
from ..data.class_names import class_names, is_reordered
from ..errors import GDetKDError, some
from ..trained_with import TrainedWith, other_settings, trained_with
from .checkpoint import DurableCheckpointer
from .preprocessing import other_than_pretrained


class StudentCheckpointer(DurableCheckpointer):
    """Remember the tensors that a file leaves out, and refuse such a file on resume. Detectron2 only warns of them.

    Args:
        run: a `RunRecord`. It compares the run before anything else is loaded.

    Attributes:
        unloaded: names of the student's tensors that no file has set yet.
        pretrained: names of the student's tensors that the backbone's file of ImageNet weights has set, and no file
            since.
        trained_with: what the file loaded last tells about its training.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.unloaded: List[str] = list(model.state_dict())
        self.pretrained: List[str] = []
        self.trained_with = TrainedWith()
        self._resuming = False
        self._path = ""  # the file that was loaded last

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        self._resuming = resume and self.has_checkpoint()
        return super().resume_or_load(path, resume=resume)

    def start_backbone(self, resume: bool) -> None:
        """Start a backbone of `gdetkd.backbones` from its ImageNet weights, unless a checkpoint is resumed.

        Call this before `resume_or_load`: MODEL.WEIGHTS may replace these weights.
        """
        if not (resume and self.has_checkpoint()):
            self.pretrained = load_pretrained(self.model)
            loaded = set(self.pretrained)
            self.unloaded = [name for name in self.unloaded if name not in loaded]

    def load_weights(self, checkpoint: Any) -> Any:
        self.trained_with = trained_with(checkpoint, self._path)
        if self._resuming and "run" in checkpoint and "run" in self.checkpointables:
            self.checkpointables["run"].load_state_dict(checkpoint.pop("run"))
        incompatible = super().load_weights(checkpoint)
        left = {*incompatible.missing_keys, *(key for key, _, _ in incompatible.incorrect_shapes)}
        self.pretrained = [name for name in self.pretrained if name in left]
        # Old files lack the number of batches that a BatchNorm layer has seen, and it has no effect.
        self.unloaded = sorted(key for key in left - set(self.pretrained) if not key.endswith("num_batches_tracked"))
        # Torch itself fills in a BatchNorm's count of batches that a file lacks.
        own = {name for name in self.model.state_dict() if not name.endswith("num_batches_tracked")}
        if not self._resuming and not own - left:
            raise GDetKDError(
                f"MODEL.WEIGHTS {self._path!r} fits none of the student's {len(own)} tensors by name and shape. Give "
                f"a file that belongs to MODEL.BACKBONE and {self._backbone_node()}. To train from scratch, empty "
                f"MODEL.WEIGHTS.{self._hint()}"
            )
        other = self.unloaded + incompatible.unexpected_keys
        if self._resuming and other and "trainer" in self.checkpointables:  # an evaluation may leave tensors out
            raise GDetKDError(
                f"This run was started with another student: {len(other)} tensors do not agree ({some(other, 5)}). "
                "Resume it with the config that started it, or use a new OUTPUT_DIR."
            )
        return incompatible

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        self._path = path
        return super().load(path, *args, **kwargs)

    def check_whole(self) -> None:
        """Check that the loaded files have set all tensors of the student.

        Raises:
            GDetKDError: some tensors of the student are as they were initialised.
        """
        if self.unloaded:
            what = f"The weights {self._path!r} leave" if self._path else "MODEL.WEIGHTS is empty, which leaves"
            raise GDetKDError(
                f"{what} {len(self.unloaded)} of the student's {len(self.model.state_dict())} tensors as they were "
                f"initialised ({some(self.unloaded, 5)}). Give a checkpoint of this student and its config."
            )

    def check_settings(self, cfg: CfgNode, images_alone: bool = False) -> List[str]:
        """Return a message if the weights were trained with other settings than the config has. No tensor shows them.

        Args:
            cfg: the student's config.
            images_alone: see `other_settings`.
        """
        other = other_settings(self.trained_with.settings, cfg, images_alone)
        if not other:
            return []
        what = "sees images" if images_alone else "sees images or places boxes"
        return [
            f"The weights {self._path!r} were trained with other settings: {'; '.join(other)}. So the student {what} "
            "in another way than in that training. Set the values of that training."
        ]

    def start_problems(self, cfg: CfgNode, replaced: Sequence[str] = ()) -> List[str]:
        """Return what is wrong with the weights that the student starts from. Nothing else would show it.

        - They were trained with other settings, or on the classes in another order.
        - MODEL.WEIGHTS is given, but leaves tensors of the backbone out. Detectors' and classifiers' files hold them.
        - A tensor of the backbone is frozen, although no file has set it.
        - The student's images are not those that the backbone's ImageNet weights expect.

        Args:
            cfg: the student's config.
            replaced: names of tensors that head transfer replaces afterwards.
        """
        path, problems = cfg.MODEL.WEIGHTS, self.check_settings(cfg, images_alone=True)
        trained, names = self.trained_with.classes, class_names(cfg)
        keeps_classes = not any(name.endswith("cls_score.weight") for name in replaced)
        if trained and names and is_reordered(trained, names) and keeps_classes:
            problems.append(
                f"MODEL.WEIGHTS {path!r} was trained on the classes {some(trained)}, and DATASETS.TRAIN has them in "
                f"another order: {some(names)}. So a class starts from the weights of another class. Give the data "
                "the order of that training (in COCO JSON, by category id)."
            )
        left = [name for name in self.unloaded if name.startswith("backbone.bottom_up.")]
        if path and left:
            problems.append(
                f"MODEL.WEIGHTS {path!r} leaves {len(left)} tensors of the student's backbone as they were initialised "
                f"({left[0]}, ...). Check that the file belongs to {self._backbone_node()}."
            )
        reported = left if path else []
        frozen = _frozen_in_backbone(self.model)
        never_set = [name for name in self.unloaded if name in frozen and name not in reported]
        if never_set:
            problems.append(
                f"{len(never_set)} tensors of the student ({some(never_set)}) are frozen, but no file sets them, so "
                "they stay as they were initialised. Give weights in MODEL.WEIGHTS, or train these tensors: set "
                "MODEL.BACKBONE.FREEZE_AT to 0, and the backbone's NORM to one that is trained, such as BN."
                f"{self._hint()}"
            )
        if self.pretrained and (message := other_than_pretrained(self.model, cfg.INPUT.FORMAT)):
            problems.append(message)
        return problems

    def _backbone_node(self) -> str:
        bottom_up = find_bottom_up(self.model)
        return "MODEL.RESNETS" if bottom_up is None else bottom_up.key.rpartition(".")[0]

    def _hint(self) -> str:
        bottom_up = find_bottom_up(self.model)
        return "" if bottom_up is None else f" ImageNet weights of the backbone belong into {bottom_up.key}."


def _frozen_in_backbone(model: nn.Module) -> Set[str]:
    """Return the names of the backbone's parameters that are not trained, and of the tensors of its frozen norms."""
    names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for path, module in model.named_modules():
        if type(module).__name__.startswith("FrozenBatchNorm"):  # of Detectron2, torchvision or timm
            names.update(f"{path}.{name}" for name in module.state_dict())
    return {name for name in names if name.startswith("backbone.")}
