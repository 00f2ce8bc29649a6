"""Every config key that GDetKD adds to Detectron2's: meaning, unit and source beside each default.

The authors of G-DetKD published no code, so the method's values have three sources. The comments name them like this:

- "a write-up": a public description of the paper gives the value.
- "a re-implementation": a public re-implementation's configuration gives the value. The authors' may differ.
- "ours": no source gives the value, and we chose it.
"""

from typing import Any, Dict, Mapping

import yaml
from detectron2.config import CfgNode, get_cfg

from .losses import DISTILL_LOSS_REGISTRY

# Keys that earlier versions had. A file may still have them, the config.yaml of a run for example; they do nothing.
REMOVED_KEYS = ("DISTILL.TEACHER.COMPILE", "DISTILL.FGFI.PER_LEVEL")


def add_gdetkd_config(cfg: CfgNode) -> None:
    """Adds GDetKD's keys to a Detectron2 config, in place."""
    # Data sets to register before anything else reads them; each entry a mapping with `name`, `kind` and paths:
    #   {name: my_train, kind: coco, json: my/train.json, images: my/train}
    #   {name: my_train, kind: voc, root: my/VOC, split: train, classes: [cat, dog]}
    #   {name: my_train, kind: yolo, yaml: my/data.yaml, split: train}
    #   {name: my_images, kind: images, images: my/images}, without labels: for --eval-only, which writes detections
    # `limit: N` keeps the first N images. A relative path is taken from the folder that the environment variable
    # DETECTRON2_DATASETS names, `datasets` by default, as for Detectron2's own sets.
    cfg.DATASETS.REGISTER = []
    # Paths of an entry that are relative and lead out of that folder, file names in a COCO JSON that are absolute or
    # lead out of its `images`, names in a VOC list that lead out of its `root`, and paths in a data.yaml that lead out
    # of the file's folder and of DETECTRON2_DATASETS, are refused unless this is set.
    cfg.DATASETS.ALLOW_OUTSIDE = False

    _add_sampler_keys(cfg)

    # "SGD" is Detectron2's own, untouched. "AdamW" trains small detectors from scratch much faster;
    # SOLVER.WEIGHT_DECAY, BIAS_LR_FACTOR and the like act on it in the same way.
    cfg.SOLVER.OPTIMIZER = "SGD"

    # Keep model_best.pth, the student with the highest bbox/AP (percent) so far, at every TEST.EVAL_PERIOD; of several
    # sets in DATASETS.TEST the first counts.
    cfg.TEST.KEEP_BEST = True
    # What computes COCO's metrics: "pycocotools"; "faster-coco-eval", a package with the same figures, several times
    # faster on large sets (pip install 'gdetkd[eval]'), but for keypoints; empty: Detectron2's own where compiled, else
    # pycocotools.
    cfg.TEST.COCO_EVAL = ""

    # Training leaves images out that are not there, do not open or have another size than their annotations say, and
    # takes others in place of those that turn out to be broken when they are read; a larger share than this stops it.
    cfg.INPUT.MAX_BAD_FRACTION = 0.01

    _add_instaboost_node(cfg)
    _add_fcos_node(cfg)

    cfg.DISTILL = CfgNode()
    # The student's own meta-architecture: what MODEL.META_ARCHITECTURE would say without distillation.
    cfg.DISTILL.STUDENT_META_ARCHITECTURE = "GeneralizedRCNN"
    # Which terms are added to the student's own losses: G-DetKD's "SGFI", "CKD", "CLS", "REG", and those of other
    # papers: "FITNET", "GTMASK", "FGFI", "ROIFI", "CWD", "PKD", "FGD", "MGD", "CROSSKD". None: plain training. Each
    # has a node DISTILL.<name>, whose keys stand in the loss's file (losses/).
    cfg.DISTILL.LOSSES = ()
    # Start the student's heads (everything but the backbone) from the teacher's weights where name and shape agree.
    cfg.DISTILL.HEAD_TRANSFER = False
    # Evaluate the teacher once before training, and log its AP beside the student's.
    cfg.DISTILL.EVAL_TEACHER = False

    # CLS and REG run on the classes that student and teacher both have, by name. Pairs [student's, teacher's] add
    # those that mean the same under different names: [["car", "vehicle"]].
    cfg.DISTILL.CLASS_MAP = []
    # All terms rise linearly from 0 over this many iterations, or over their own WARMUP_ITERS where that is more.
    cfg.DISTILL.WARMUP_ITERS = 0

    # Every so many iterations, look at what distillation does: level matching, tau, similarity of classes, gradients
    # of the terms, detections. OUTPUT_DIR/visualization/index.html and TensorBoard show it; 0: never.
    cfg.DISTILL.VIS_PERIOD = 0
    # Labelled images of DATASETS.TEST[0] that are looked at, evenly spread over it.
    cfg.DISTILL.VIS_IMAGES = 32
    # The OUTPUT_DIR of a finished run of the student alone, to be compared with; empty: there is none.
    cfg.DISTILL.VIS_BASELINE = ""

    # Steps in which a loss is infinite or not a number that a run leaves out, with a warning, before it stops.
    cfg.DISTILL.SKIP_NONFINITE = 0

    _add_teacher_node(cfg)
    _add_regions_node(cfg)
    _add_loss_nodes(cfg)
    for key in REMOVED_KEYS:
        cfg.register_deprecated_key(key)


def _add_sampler_keys(cfg: CfgNode) -> None:
    """Adds keys that Detectron2's samplers read, where the installed Detectron2 does not define them.

    v0.6 defines none of them, and main only REPEAT_SQRT.
    """
    # DATALOADER.SAMPLER_TRAIN "WeightedTrainingSampler" and "WeightedCategoryTrainingSampler" repeat the images of each
    # dataset by these factors: pairs [dataset in DATASETS.TRAIN, positive factor]. Other datasets have the factor 1.
    if "TRAIN_REPEAT_FACTOR" not in cfg.DATASETS:
        cfg.DATASETS.TRAIN_REPEAT_FACTOR = []
    # Take the square root of the repeat factors that DATALOADER.REPEAT_THRESHOLD gives to images of rare categories.
    if "REPEAT_SQRT" not in cfg.DATALOADER:
        cfg.DATALOADER.REPEAT_SQRT = True
    # Share of the images that "RandomSubsetTrainingSampler" trains on. SEED chooses them.
    if "RANDOM_SUBSET_RATIO" not in cfg.DATALOADER:
        cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0


def plain_config(cfg: CfgNode) -> CfgNode:
    """The config of the plain Detectron2 detector that a GDetKD config trains; a plain config as it is."""
    if cfg.MODEL.META_ARCHITECTURE != "GDetKD":
        return cfg
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.META_ARCHITECTURE = cfg.DISTILL.STUDENT_META_ARCHITECTURE
    plain.freeze()
    return plain


def without_gdetkd_keys(cfg: CfgNode) -> CfgNode:
    """The config that plain Detectron2 understands, of the detector that a config trains."""
    plain = plain_config(cfg).clone()
    plain.defrost()
    _keep_known(plain, get_cfg())
    return plain


def score_prefix(cfg: CfgNode) -> str:
    """What Detectron2 puts before "bbox/AP" of the set that counts, the first of DATASETS.TEST: nothing where it is the
    only one."""
    return f"{cfg.DATASETS.TEST[0]}/" if len(cfg.DATASETS.TEST) > 1 else ""


def flat_config(dump: str) -> Dict[str, Any]:
    """A config's dump, which is yaml, as {"SOLVER.MAX_ITER": 100, ...}."""
    return _flat(yaml.safe_load(dump), "")


def _flat(node: Mapping[str, Any], prefix: str) -> Dict[str, Any]:
    flat: Dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> Dict[str, str]:
    """What differs between two flat configs, by key in their order: "SOLVER.MAX_ITER 100 -> 200"."""
    pairs = {key: (before.get(key, "absent"), now.get(key, "absent")) for key in sorted({*before, *now})}
    return {key: f"{key} {a!r} -> {b!r}" for key, (a, b) in pairs.items() if a != b}


def _keep_known(node: CfgNode, known: CfgNode) -> None:
    for key in list(node):
        if key not in known:
            del node[key]
        elif isinstance(node[key], CfgNode):
            _keep_known(node[key], known[key])


def _add_teacher_node(cfg: CfgNode) -> None:
    cfg.DISTILL.TEACHER = CfgNode()
    # The teacher's own Detectron2 file, relative to the current folder: yaml, or LazyConfig's .py, which is run.
    cfg.DISTILL.TEACHER.CONFIG_FILE = ""
    # Its weights: a path or URL that Detectron2 can read. Empty: the teacher config's own MODEL.WEIGHTS.
    cfg.DISTILL.TEACHER.WEIGHTS = ""
    # Changes to it, as on a command line: ["MODEL.ROI_HEADS.NUM_CLASSES", 6]; ["model.roi_heads.num_classes", 6].
    cfg.DISTILL.TEACHER.OPTS = []
    # What it runs in: "float32", "float16" (CUDA), "bfloat16"; empty: half precision with SOLVER.AMP, else float32.
    cfg.DISTILL.TEACHER.DTYPE = ""
    # AP (percent) on a sample of the student's data below which `--check` takes it for not loaded or mis-normalised.
    cfg.DISTILL.TEACHER.MIN_AP = 5.0
    # Names of its classes in order, where its own DATASETS.TRAIN does not tell them.
    cfg.DISTILL.TEACHER.CLASSES = []


def _add_loss_nodes(cfg: CfgNode) -> None:
    """Add a node for each registered loss. The loss's class gives the default weight and its own keys."""
    for name, loss in DISTILL_LOSS_REGISTRY:
        node = cfg.DISTILL[name] = CfgNode()
        # Factor on the term in the total loss.
        node.WEIGHT = loss.default_weight
        # The weight rises linearly from 0 over this many iterations; 0: constant from the start.
        node.WARMUP_ITERS = 0
        loss.add_keys(node)


def _add_regions_node(cfg: CfgNode) -> None:
    """Add the keys that choose which of a dense student's predictions become regions.

    A write-up of the paper gives the IoU of positives and their ratio to negatives. The other values are a
    re-implementation's, which are also mmdetection's usual ones, or ours.
    """
    node = cfg.DISTILL.REGIONS = CfgNode()
    # Predictions of an image that are decoded, by class-maximum score (FCOS: and centerness), over all levels.
    # Source: a re-implementation.
    node.PRE_NMS_TOPK = 2000
    # IoU of class-agnostic suppression. Source: a re-implementation.
    node.NMS_THRESH = 0.7
    # How many boxes of an image the suppression leaves at most. Source: a re-implementation.
    node.POST_NMS_TOPK = 1000
    # Shortest side, in pixels after clipping to the image, below which a box is no region. Source: ours.
    node.MIN_SIZE = 1.0
    # IoU with an object from which on a box is positive. Source: a write-up.
    node.IOU_THRESHOLD = 0.5
    # Regions of an image. Source: a re-implementation.
    node.BATCH_SIZE_PER_IMAGE = 512
    # The largest share of the regions that is positive: one positive to three negatives. Source: a write-up.
    node.POSITIVE_FRACTION = 0.25


def _add_instaboost_node(cfg: CfgNode) -> None:
    """Add the keys of InstaBoost, the augmentation of the paper's X-101 teacher.

    It needs `pip install gdetkd[instaboost]` and masks. The names and values are those of InstaBoost's authors.
    """
    node = cfg.INPUT.INSTABOOST = CfgNode()
    node.ENABLED = False
    # Of an image to be augmented.
    node.PROBABILITY = 0.5
    # What happens to an object: "normal" (moved, scaled, turned), "horizontal", "vertical" (flipped as well), "skip".
    node.ACTION_CANDIDATE = ("normal", "horizontal", "skip")
    node.ACTION_PROB = (1.0, 0.0, 0.0)
    # Range of scales; the farthest move, as a share 1/DX of the width, 1/DY of the height; range of turns in degrees.
    node.SCALE = (0.8, 1.2)
    node.DX = 15
    node.DY = 15
    node.THETA = (-1, 1)
    # Of an augmented image to change in colour, too.
    node.COLOR_PROB = 0.5
    # Moves objects where their surroundings look alike; slow.
    node.HEATMAP_FLAG = False


def _add_fcos_node(cfg: CfgNode) -> None:
    """Detectron2's FCOS, which has no keys of its own; the values are its own configuration's.

    MODEL.META_ARCHITECTURE "FCOS"; MODEL.BACKBONE.NAME "build_fcos_resnet_fpn_backbone", or RetinaNet's.
    """
    node = cfg.MODEL.FCOS = CfgNode()
    node.NUM_CLASSES = 80
    # Levels of the pyramid that the head reads.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions in each of the two towers, and their normalisation; "GN" is the FCOS paper's, "" none.
    node.NUM_CONVS = 4
    node.NORM = "GN"
    # Probability of an object that the classification starts from.
    node.PRIOR_PROB = 0.01
    # A location is positive within this many strides of an object's centre.
    node.CENTER_SAMPLING_RADIUS = 1.5
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    # Inference: least score, candidates of a level before suppression, and the IoU of suppression.
    node.SCORE_THRESH_TEST = 0.2
    node.TOPK_CANDIDATES_TEST = 1000
    node.NMS_THRESH_TEST = 0.6
