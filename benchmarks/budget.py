"""Keep a benchmark within its time: measure the items in order, and stop adding rounds when the time is over."""

import gc
import time
import traceback
from typing import Any, Callable, Dict, List, Mapping

from gdetkd.engine.step_costs import time_in_rounds
from gdetkd.errors import first_line

import torch  # isort: skip

# An item with fewer rounds than this is not reported.
LEAST_ROUNDS = 2


class OutOfTime(Exception):
    """Too little time is left to measure an item."""


class Budget:
    """Share out the time of a benchmark among its items.

    Args:
        seconds: time of the whole benchmark.
        most_rounds: number of rounds after which an item is complete.
        clock: returns the present time in seconds.
    """

    def __init__(self, seconds: float, most_rounds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._most_rounds = most_rounds
        self._item_start = self._item_end = self._end
        self._longest_start = 0.0  # from the start of an item until it has the least number of rounds

    def left(self) -> float:
        """Return the seconds that are left for all items."""
        return self._end - self._clock()

    def left_for_item(self) -> float:
        """Return the seconds that are left for the present item."""
        return self._item_end - self._clock()

    def start_item(self, items_left: int) -> None:
        """Give the next item an equal share of the time that is left.

        Args:
            items_left: number of items, the next one included.

        Raises:
            OutOfTime: no more time is left than an earlier item needed for the least number of rounds.
        """
        if self.left() <= self._longest_start:
            raise OutOfTime
        self._item_start = self._clock()
        self._item_end = self._item_start + self.left() / items_left

    def time(self, works: Mapping[str, Callable[[], Any]], warm_up: int) -> Dict[str, List[float]]:
        """Time pieces of work in turn, until the item has all its rounds or its share of the time is over.

        The least number of rounds may take more than the share, but never more than the whole benchmark has left.

        Args:
            works: the pieces of work by name.
            warm_up: number of rounds that are not counted.

        Returns:
            seconds of each piece of work in every round.

        Raises:
            OutOfTime: the time of the benchmark allows fewer than LEAST_ROUNDS rounds.
        """
        rounds: List[Dict[str, List[float]]] = []
        longest = 0.0
        while len(rounds) < warm_up + self._most_rounds:
            is_needed = len(rounds) < warm_up + LEAST_ROUNDS
            # Twice, because the memory is measured afterwards, which takes as long as a round.
            if 2 * longest >= (self.left() if is_needed else self.left_for_item()):
                break
            start = self._clock()
            rounds.append(time_in_rounds(works, rounds=1, warm_up=0))
            # The first round allocates memory and loads kernels, so it does not tell how long another one takes.
            if len(rounds) > 1:
                longest = max(longest, self._clock() - start)
            if is_needed:
                self._longest_start = max(self._longest_start, self._clock() - self._item_start)
        counted = rounds[warm_up:]
        if len(counted) < LEAST_ROUNDS:
            raise OutOfTime
        return {name: [each[name][0] for each in counted] for name in works}


def run_items(
    items: Mapping[str, Callable[[], None]],
    budget: Budget,
    keep: Callable[[List[str], Dict[str, Dict[str, str]]], None],
) -> None:
    """Run items in order, each within its share of the time. An item that fails does not cost the others their turn.

    Args:
        items: functions by name. Each measures something with the budget.
        budget: the time of all items.
        keep: writes what was measured so far. After each item it is called with the names of the items that are not
            measured yet or were not reached, and with the errors of the items that failed: `error`, one line, and
            `traceback`.
    """
    missed: List[str] = []
    failed: Dict[str, Dict[str, str]] = {}
    for index, (name, item) in enumerate(items.items()):
        try:
            budget.start_item(len(items) - index)
            item()
        except OutOfTime:
            missed.append(name)
        except Exception as e:  # a GPU may be at hand for minutes only, and the other items are worth measuring
            # As text, because the error itself would hold tensors.
            error = f"{type(e).__name__}: {first_line(e)}"
            failed[name] = {"error": error, "traceback": traceback.format_exc()}
        if torch.cuda.is_initialized():  # the next item needs the memory
            gc.collect()
            torch.cuda.empty_cache()
        keep(missed + list(items)[index + 1 :], failed)
