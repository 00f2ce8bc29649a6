"""Write what `gpu.py` measured as Markdown, for docs/performance.md."""

from typing import Any, Dict, Iterable, List, Mapping

from tabulate import tabulate

TERMS = ("SGFI", "CKD", "CLS", "REG")
NONE = "–"


def as_markdown(result: Mapping[str, Any]) -> str:
    """Return the page. Items that are not measured have no row, and a sentence names them.

    Args:
        result: the content of gpu.json.
    """
    parts = [*_caption(result)]
    if result["pairs"]:
        parts += [_times(result), _notes(result), _memory(result)]
    if result["loader"]:
        parts += [_loader(result)]
    if result["training"]:
        parts += [_training(result["training"])]
    if result["not_reached"]:
        parts += [f"Not reached in {result['minutes']:g} minutes: {'; '.join(result['not_reached'])}."]
    for name, failure in result["failed"].items():
        parts += [f"Failed: {name} ({failure['error']})."]
    return "\n\n".join(parts) + "\n"


def _caption(result: Mapping[str, Any]) -> List[str]:
    height, width = result["image_size"]
    on = result["card"] or f"{result['machine']}, {result['threads']} threads, no GPU"
    cuda = f", CUDA {result['cuda']}" if result["cuda"] else ""
    return [
        f"    {result['command']}",
        f"{on}; {result['cores']} cores, Python {result['python']}, torch {result['torch']}{cuda}, Detectron2 "
        f"{result['detectron2']}. {result['images']} images of {height}x{width} a step, made up, and random weights."
        + (" Tiny detectors: these figures only show that the code runs." if result["tiny"] else ""),
    ]


def _table(headers: List[str], rows: Iterable[List[str]]) -> str:
    return tabulate(list(rows), headers, tablefmt="github", disable_numparse=True)


def _middle(pair: Mapping[str, Any], work: str) -> str:
    """Return the median time of a piece of work in ms."""
    return f"{1000 * pair['seconds'][work][1]:.1f}" if work in pair["seconds"] else NONE


def _times(result: Mapping[str, Any]) -> str:
    headers = ["pair", "precision", "plain step, ms", "teacher, ms", *(f"{term}, ms" for term in TERMS)]
    headers += ["all losses, ms", "over the plain step", "over the floor"]
    return _table(
        headers,
        (
            [
                pair["pair"],
                pair["precision"],
                *(_middle(pair, work) for work in ("plain", "teacher", *TERMS, "all")),
                f"{pair['ratio_to_plain']:.2f}",
                f"**{pair['ratio_to_floor']:.2f}**",
            ]
            for pair in result["pairs"]
        ),
    )


def _notes(result: Mapping[str, Any]) -> str:
    rounds = [pair["rounds"] for pair in result["pairs"]]
    spread = max(_spread(values) for pair in result["pairs"] for values in pair["seconds"].values())
    few = f"{min(rounds)}" if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
    notes = [
        f"- Medians of {few} steps, taken in turn; quartiles within {100 * spread:.0f} % of the median.",
        "- A step is the forward and the backward pass. The column of a loss is a step with that loss alone.",
        "- The floor is the plain step plus the teacher's forward pass on the student's regions.",
    ]
    if result["tf32_convolutions"]:
        notes += ["- In float32, convolutions compute in TF32, which is torch's default."]
    return "\n".join(notes)


def _spread(quartiles: List[float]) -> float:
    """Return the distance of the farther quartile from the median, as a share of the median."""
    low, middle, high = quartiles
    return max(high - middle, middle - low) / middle


def _memory(result: Mapping[str, Any]) -> str:
    kind = "peak of a step beyond the weights" if result["card"] else "kept for the backward pass"
    headers = ["pair", "precision", "regions", "plain, images/s", "all losses, images/s"]
    headers += [f"plain, MB ({kind})", *(f"{term}, MB" for term in TERMS), "all losses, MB"]
    return _table(headers, (_memory_row(pair) for pair in result["pairs"]))


def _memory_row(pair: Mapping[str, Any]) -> List[str]:
    speeds, megabytes = pair["images_a_second"], pair["megabytes"]
    used = [f"{megabytes[work]:.0f}" if work in megabytes else NONE for work in ("plain", *TERMS, "all")]
    return [
        pair["pair"],
        pair["precision"],
        str(pair["regions"]),
        f"{speeds['plain']:.1f}",
        f"{speeds['all']:.1f}",
        *used,
    ]


def _loader(result: Mapping[str, Any]) -> str:
    """Return the loader's speeds above those of the steps that it feeds."""
    rows = [[f"loader, {each['workers']} workers", f"{each['images_a_second']:.1f}"] for each in result["loader"]]
    for pair in result["pairs"][:2]:  # the pair whose recipe the loader reads, in both precisions
        for work, name in (("plain", "plain step"), ("all", "step with all losses")):
            rows.append([f"{name}, {pair['pair']}, {pair['precision']}", f"{pair['images_a_second'][work]:.1f}"])
    return _table(["loader against step", "images/s"], rows)


def _training(training: Dict[str, Any]) -> str:
    """Return the losses of the short training at its start and at its end."""
    first, last, window = training["first"], training["last"], training["window"]
    rows = [[name, f"{first[name]:.3f}", f"{last[name]:.3f}"] for name in first]
    headers = [f"loss of {training['iterations']} iterations of the quickstart in {training['seconds']:.0f} s"]
    return _table([*headers, f"mean of the first {window}", f"mean of the last {window}"], rows)
