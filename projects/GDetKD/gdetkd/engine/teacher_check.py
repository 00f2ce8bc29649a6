"""Judge a teacher by its AP on a few images, for `--check`."""

import math
from typing import List, NamedTuple, Optional

from detectron2.config import CfgNode

from ..teacher import FrozenTeacher
from .preprocessing import USUAL, Preprocessing, preprocessing_of, with_channels_swapped
from .sample_score import SampleScore, score_on_sample

# Other preprocessing counts as right if it beats the teacher's own by so many points of AP on so many images. On fewer
# images chance has more effect, so the gain must be larger.
NOTABLE_GAIN, NOTABLE_IMAGES = 2.0, 50
# In training, a teacher sees images of another size than in its evaluation if the short sides have at least this ratio.
# It is a problem if the teacher then loses more than this share of its AP. The values are ours.
OTHER_SIZE, MOST_LOSS = 1.25, 0.5


class Judgement(NamedTuple):
    """Hold a sentence about a teacher, and problems with remedies."""

    text: str
    problems: List[str]


def judge_teacher(cfg: CfgNode, teacher: FrozenTeacher, dataset: str, count: int) -> Judgement:
    """Evaluate the teacher with its own preprocessing, with usual others, and at the size that it sees in training.

    Args:
        dataset: a registered dataset.
        count: number of images.

    Raises:
        GDetKDError: the images have no object, the dataset has none of the teacher's classes, or it does not name its
            classes.
    """
    own = preprocessing_of(teacher.model, teacher.file.input_format)
    score = score_on_sample(cfg, teacher, dataset, count)
    text = f"Teacher on {score.images} images of {dataset}, {score.classes} classes: AP {score.ap:.1f}"
    weak = score.ap < cfg.DISTILL.TEACHER.MIN_AP
    best, best_score = None, score
    if own is not None and len(own.mean) == 3:  # the usual preprocessings have three channels
        # Each preprocessing takes as long as the first evaluation, so all are tried only for a weak teacher.
        candidates = [usual for usual in USUAL if usual != own] if weak else [with_channels_swapped(own)]
        scores = {candidate: score_on_sample(cfg, teacher, dataset, count, candidate) for candidate in candidates}
        best = max(scores, key=lambda candidate: scores[candidate].ap)
        best_score = scores[best]
        text += f"; it would be {best_score.ap:.1f} with {best}"
    problems = _problems_of(cfg, score, best, best_score)
    side = score.side_in_training
    if side is not None and not 1 / OTHER_SIZE <= side / score.side <= OTHER_SIZE:
        seen = score_on_sample(cfg, teacher, dataset, count, as_in_training=True)
        text += f". At the size that it sees in training (short side {seen.side} for {score.side}): AP {seen.ap:.1f}"
        if not problems and seen.ap < MOST_LOSS * score.ap:
            problems.append(
                f"The teacher has AP {score.ap:.1f} on images with a short side of {score.side} pixels, and "
                f"{seen.ap:.1f} at {seen.side}, which is what it sees in training. Set DISTILL.TEACHER.SCALE to about "
                f"{cfg.DISTILL.TEACHER.SCALE * score.side / side:.2g}, or take a teacher that was trained on images of "
                "this size."
            )
    return Judgement(f"{text}.", problems)


def _problems_of(cfg: CfgNode, score: SampleScore, best: Optional[Preprocessing], best_score: SampleScore) -> List[str]:
    weak = score.ap < cfg.DISTILL.TEACHER.MIN_AP
    found = f"The teacher has AP {score.ap:.1f} on {score.images} images"
    if weak:
        found += f", less than DISTILL.TEACHER.MIN_AP {cfg.DISTILL.TEACHER.MIN_AP:g}"
    notable = NOTABLE_GAIN * max(1.0, math.sqrt(NOTABLE_IMAGES / max(1, score.images)))
    if best_score.ap > score.ap + notable:
        return [
            f"{found}, and {best_score.ap:.1f} with images in {best}. Set INPUT.FORMAT, MODEL.PIXEL_MEAN and "
            "MODEL.PIXEL_STD as the teacher was trained, in its config file or by DISTILL.TEACHER.OPTS."
        ]
    if weak:
        tried = ", and no usual preprocessing makes it better" if best else ""
        return [
            f"{found}{tried}. Check that its weights are trained and that its classes are in the order of the dataset "
            "that it was trained on. If it is meant to be so weak, lower MIN_AP."
        ]
    return []
