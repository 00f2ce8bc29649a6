"""Test matching, score thresholds, and what distillation changed on an image."""

import torch

from gdetkd.insight.detections import MatchedDetections, best_threshold, compare_detectors, match_objects

OBJECTS = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]])
CLASSES = torch.tensor([0, 1, 1])


NONE = torch.empty(0, 4), torch.empty(0, dtype=torch.long)


def shifted(index, by=0.0):
    return (OBJECTS[index] + by).tolist()


def find(*detections, crowds=NONE):
    """Match detections, each a (box, score, class), with the objects."""
    boxes, scores, classes = zip(*detections) if detections else ([], [], [])
    boxes = torch.tensor(boxes).reshape(-1, 4)
    return match_objects(
        boxes, torch.tensor(scores), torch.tensor(classes, dtype=torch.long), OBJECTS, CLASSES, *crowds
    )


def test_the_best_detection_takes_an_object_and_the_next_is_a_mistake():
    found = find((shifted(0, 1.0), 0.5, 0), (shifted(0), 0.9, 0))
    assert found.scores.tolist() == torch.tensor([0.9, 0.5]).tolist()
    assert found.objects.tolist() == [0, -1]


def test_class_and_overlap_have_to_be_right():
    assert find((shifted(0), 0.9, 1)).objects.tolist() == [-1]
    assert find((shifted(0, 3.0), 0.9, 0)).objects.tolist() == [-1]  # IoU 49 / 151


def test_no_detection_and_no_object():
    assert not find().finds(3).any()
    alone = match_objects(OBJECTS, torch.ones(3), CLASSES, *NONE, *NONE)
    assert alone.objects.tolist() == [-1, -1, -1] and len(alone.finds(0)) == 0
    assert best_threshold([find()], objects=3) == 0.0


def test_a_detection_in_a_crowd_of_its_class_is_no_mistake():
    crowds = torch.tensor([[100.0, 100.0, 200.0, 200.0]]), torch.tensor([0])
    inside, outside = [110.0, 110.0, 150.0, 150.0], [300.0, 300.0, 350.0, 350.0]
    found = find((inside, 0.9, 0), (inside, 0.8, 1), (outside, 0.7, 0), (shifted(0), 0.6, 0), crowds=crowds)
    assert found.objects.tolist() == [-1, -1, 0] and found.classes.tolist() == [1, 0, 0]


def test_threshold_is_that_of_the_best_f1():
    found = find((shifted(0), 0.9, 0), (shifted(1), 0.7, 1), (shifted(1, 30.0), 0.6, 1), (shifted(1, -15.0), 0.5, 0))
    # F1 after each: 2/4, 4/5, 4/6, 4/7.
    assert abs(best_threshold([found], objects=3) - 0.7) < 1e-6
    assert found.above(0.7).finds(3).tolist() == [True, True, False]


def test_equal_scores_are_taken_together():
    found = find((shifted(0), 0.9, 0), (shifted(1), 0.5, 1), (shifted(2, 30.0), 0.5, 0), (shifted(2, 60.0), 0.5, 0))
    # F1 is 2/4 after the first and 4/7 with all of score 0.5. A cut between equal scores would give 4/5.
    assert abs(best_threshold([found], objects=3) - 0.5) < 1e-6
    assert len(found.above(0.5).boxes) == 4


def test_without_a_teacher_and_a_baseline_nothing_has_changed():
    alone = compare_detectors(3, find((shifted(0), 0.9, 0), (shifted(1, 60.0), 0.8, 1)), None, None)
    assert len(alone) == 0 and alone.copied.tolist() == [False, False]


def test_what_distillation_changed():
    copied, shared = shifted(0, 60.0), shifted(0, 90.0)
    student = find((shifted(0), 0.9, 0), (copied, 0.8, 1), (shared, 0.7, 1))
    teacher = find((shifted(0), 0.9, 0), (shifted(1), 0.9, 1), (copied, 0.8, 1), (shared, 0.7, 1))
    baseline = find((shifted(2), 0.9, 1), (shared, 0.8, 1))
    compared = compare_detectors(3, student, teacher, baseline)
    assert compared.gained.tolist() == [True, False, False]
    assert compared.lost.tolist() == [False, False, True]
    assert compared.copied.tolist() == [False, True, False]  # the baseline makes the second mistake too
    assert len(compared) == 3


def test_without_a_baseline_the_teacher_is_the_reference():
    student, teacher = find((shifted(0), 0.9, 0)), find((shifted(1), 0.9, 1))
    compared = compare_detectors(3, student, teacher, None)
    assert compared.gained.tolist() == [True, False, False] and compared.lost.tolist() == [False, True, False]


def test_a_mistake_of_another_class_is_not_copied():
    box = shifted(0, 60.0)
    assert not compare_detectors(3, find((box, 0.9, 0)), find((box, 0.9, 1)), None).copied.any()
    assert isinstance(find(), MatchedDetections)
