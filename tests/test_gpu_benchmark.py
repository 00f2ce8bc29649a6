"""benchmarks/gpu.py runs at tiny sizes on a CPU, keeps within its time, and names what it did not measure."""

import json
from pathlib import Path

import pytest

from gdetkd.data import shapes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch):
    """Import benchmarks/gpu.py, whose modules are beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


@pytest.fixture
def run(gpu, monkeypatch, tmp_path):
    """Run the benchmark on two of its pairs; return the exit code, gpu.json and gpu.md."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setitem(shapes.SPLITS, "student", (4, 0))
    names = [*gpu.PAIRS][:1] + [*gpu.PAIRS][-1:]
    monkeypatch.setattr(gpu, "PAIRS", {name: gpu.PAIRS[name] for name in names})

    def start(*arguments):
        output = tmp_path / "output"
        code = gpu.main(["--tiny", "--device", "cpu", "--output", str(output), *arguments])
        return code, json.loads((output / "gpu.json").read_text()), (output / "gpu.md").read_text()

    return start


def rows_of(page, heading):
    """Return the cells of the rows of the table with a heading that starts so."""
    tables = [part.splitlines() for part in page.split("\n\n") if part.startswith("|")]
    [table] = [table for table in tables if f"| {heading}" in table[0]]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_everything_is_measured_and_in_the_tables(gpu, run):
    code, result, page = run("--minutes", "60")
    assert code == 0 and result["not_reached"] == [] and result["failed"] == {}
    cases = [(name, precision) for name in gpu.PAIRS for precision in ("float32", "bfloat16")]
    assert [(pair["pair"], pair["precision"]) for pair in result["pairs"]] == cases
    for pair in result["pairs"]:
        terms = {"SGFI", "CKD"} if "FCOS" in pair["pair"] else {"SGFI", "CKD", "CLS", "REG"}
        assert set(pair["seconds"]) == set(pair["megabytes"]) == {"plain", "teacher", "all", *terms}
        assert all(0 < low <= middle <= high for low, middle, high in pair["seconds"].values())
        assert pair["regions"] == 2 * 8 and pair["rounds"] == gpu.TINY.rounds
        plain, teacher, all_losses = (pair["seconds"][work][1] for work in ("plain", "teacher", "all"))
        assert pair["ratio_to_floor"] == pytest.approx(all_losses / (plain + teacher))
        assert pair["images_a_second"]["all"] == pytest.approx(2 / all_losses)
    for rows in (rows_of(page, "over the floor"), rows_of(page, "regions")):
        assert [tuple(row[:2]) for row in rows] == cases
        assert [row.count("–") for row in rows] == [0, 0, 2, 2]
    assert page.startswith("    python benchmarks/gpu.py --tiny --device cpu --minutes 60\n")
    assert [row[0] for row in rows_of(page, "loader")][0] == "loader, 0 workers"
    assert all(each["images_a_second"] > 0 for each in result["loader"])
    assert len(result["training"]["total_loss"]) == result["training"]["iterations"] == gpu.TINY.iterations
    losses = [row[0] for row in rows_of(page, "loss of")]
    assert losses == list(result["training"]["first"]) and {"total_loss", "loss_distill_sgfi"} <= set(losses)
    assert "Not reached" not in page and "Failed" not in page


def test_items_without_time_are_named_in_a_sentence(run):
    code, result, page = run("--minutes", "0")
    assert code == 0 and result["pairs"] == result["loader"] == [] and result["training"] is None
    assert len(result["not_reached"]) == 2 * 2 + 2 and "|" not in page
    assert f"Not reached in 0 minutes: {'; '.join(result['not_reached'])}." in page


def test_an_item_that_fails_is_named_and_does_not_cost_the_others(gpu, run, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("CUDA out of memory.\nTried to allocate 3 GiB.")

    monkeypatch.setattr(gpu, "measure_pair", fail)
    monkeypatch.setattr(gpu, "measure_training", fail)
    code, result, page = run("--minutes", "5", "--only", "the ")
    assert code == 1 and list(result["failed"]) == ["the short training"] and result["loader"]
    assert "Failed: the short training (RuntimeError: CUDA out of memory.)." in page
    assert "Traceback" in capsys.readouterr().err


class Clock:
    """A clock that stands still, except when work is done."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds

    def work(self, seconds):
        self.seconds += seconds


@pytest.mark.parametrize(
    "total, items_left, rounds",
    [
        (100.0, 1, 6),  # all rounds
        (100.0, 20, 2),  # a share of 5 seconds is over before the least number of rounds
        (100.0, 4, 3),  # 25 seconds: two rounds of warm-up, three counted, and time for one more
        (8.0, 1, None),  # not even the least number of rounds
    ],
)
def test_rounds_are_added_until_the_share_of_the_time_is_over(gpu, monkeypatch, total, items_left, rounds):
    import budget

    clock = Clock()
    monkeypatch.setattr("gdetkd.engine.step_costs.now", clock)
    limit = budget.Budget(total, 6, clock)
    limit.start_item(items_left)
    works = {"step": lambda: clock.work(3.0), "teacher": lambda: clock.work(1.0)}
    if rounds is None:
        with pytest.raises(budget.OutOfTime):
            limit.time(works, warm_up=2)
    else:
        assert limit.time(works, warm_up=2) == {"step": [3.0] * rounds, "teacher": [1.0] * rounds}
    assert clock.seconds <= total


def test_an_item_does_not_start_if_an_earlier_one_needed_more_time_than_is_left(gpu):
    import budget

    clock, names = Clock(), []
    limit = budget.Budget(30.0, 2, clock)

    def item(name):
        names.append(name)
        clock.work(20.0)  # builds its models
        limit.time({"step": lambda: clock.work(0.5)}, warm_up=0)

    missed = []
    items = {name: lambda name=name: item(name) for name in ("first", "second")}
    budget.run_items(items, limit, lambda not_reached, failed: missed.append(not_reached))
    assert names == ["first"] and missed == [["second"], ["second"]]
