"""Test greedy matching, crowds, and the score threshold of the best F1."""

import pytest
import torch

from gdetkd.matching import best_f1, in_crowds, match_in_order

BOX = torch.tensor([[0.0, 0, 10, 10]])


def choose(scores, correct, objects):
    return best_f1(torch.tensor(scores, dtype=torch.float64), torch.tensor(correct, dtype=torch.bool), objects)


def test_threshold_of_the_best_f1_in_closed_form():
    # F1 is 2 * right / (kept + objects): 2/3, 2/4 and 4/5.
    assert choose([0.8, 0.9, 0.7], [False, True, True], 2) == pytest.approx((0.7, 2 / 3, 1.0, 4 / 5))
    # 2/4, 2/5 and 2/6: only the best detection is right.
    assert choose([0.9, 0.8, 0.7], [True, False, False], 3) == pytest.approx((0.9, 1.0, 1 / 3, 2 / 4))


def test_the_highest_of_equally_good_thresholds_is_taken():
    # F1 is 2/3, 2/4, 2/5 and 4/6.
    assert choose([0.9, 0.8, 0.7, 0.6], [True, False, False, True], 2).min_score == 0.9


def test_equal_scores_are_not_separated():
    # A cut between the equal scores would give an F1 of 1.
    assert choose([0.5, 0.5], [True, False], 1) == pytest.approx((0.5, 0.5, 1.0, 2 / 3))


def test_no_detection_and_nothing_right():
    assert choose([], [], 3) is None
    assert choose([0.9, 0.4], [False, False], 3) == (0.9, 0.0, 0.0, 0.0)


def test_best_f1_is_that_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 40):
        scores = (torch.rand(count, generator=generator, dtype=torch.float64) * 10).round() / 10  # many are equal
        correct = torch.rand(count, generator=generator) < 0.5
        objects = int(correct.sum()) + count % 3 + 1
        expected = (-1.0, 0.0)
        for threshold in sorted(set(scores.tolist()), reverse=True):
            kept = [bool(right) for score, right in zip(scores.tolist(), correct) if score >= threshold]
            f1 = 2 * sum(kept) / (len(kept) + objects)
            if f1 > expected[0]:
                expected = (f1, threshold)
        found = best_f1(scores, correct, objects)
        assert (found.f1, found.min_score) == expected


def test_an_object_is_taken_once_and_only_by_its_class():
    boxes, label = BOX.repeat(3, 1), torch.tensor([1, 0, 0])
    assert match_in_order(boxes, label, BOX, torch.tensor([0])).tolist() == [-1, 0, -1]
    assert match_in_order(boxes, label, torch.empty(0, 4), torch.empty(0, dtype=torch.long)).tolist() == [-1, -1, -1]


def test_a_detection_in_a_crowd_is_found_by_its_own_area():
    crowd = torch.tensor([[0.0, 0, 100, 100]])
    boxes = torch.tensor([[5.0, 5, 15, 15], [95.0, 0, 105, 10], [96.0, 0, 106, 10], [5.0, 5, 15, 15]])
    # The second has half of its area in the crowd, the third less. The last has another class.
    inside = in_crowds(boxes, torch.tensor([0, 0, 0, 1]), crowd, torch.tensor([0]))
    assert inside.tolist() == [True, True, False, False]
    assert not in_crowds(boxes, torch.zeros(4), torch.empty(0, 4), torch.empty(0)).any()
