"""Pages from the records that benchmarks/gpu_results.py put in their place.

    python benchmarks/render_gpu.py benchmarks/results/gpu --into benchmarks/GPU.md --readme README.md

Fills the parts of GPU.md between `<!-- checks -->` and `<!-- /checks -->`, and those called `steps` and `parts`; and in
README what is between `<!-- gpu -->` and `<!-- /gpu -->`. Where there is no record, they say so.
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path

from learnpruner.families import FAMILIES
from learnpruner_commands.arguments import Parser

from gpu import proof_parts, speed_parts
from gpu_results import read_part
from render_accuracy import MISSING, fill

NAMES = [config_class.base_model_type for config_class in FAMILIES]
ORDER = [part.name for parts in (proof_parts("cuda", Path()), speed_parts("cuda", Path(), "sdpa")) for part in parts]
SHOWN = {"holds": "holds", "fails": "**fails**", "not there": "not there"}
PAGE, SPEED_PAGE = (f"[benchmarks/{name}.md](benchmarks/{name}.md)" for name in ("GPU", "SPEED"))
# Of a text in a cell, in characters.
LONGEST = 300


def read_folder(folder: Path) -> dict[str, list[dict]]:
    """Records of each GPU, in the order in which parts are run. Raises `ValueError` where a file is none."""
    found = {}
    for path in sorted(folder.glob("*/*/*.json")):
        record = {**read_part(path), "kind": path.parent.name}
        found.setdefault(record["device"], []).append(record)
    # Parts that a later release no longer has come last.
    place = lambda record: (record["kind"], ORDER.index(record["part"]) if record["part"] in ORDER else len(ORDER))  # noqa: E731
    return {device: sorted(records, key=place) for device, records in found.items()}


def cell(text: str) -> str:
    """As a cell of a table, whoever wrote it."""
    text = " ".join(text.split())
    for one, other in (("&", "&amp;"), ("|", "&#124;"), ("<", "&lt;"), ("`", "'")):
        text = text.replace(one, other)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def conditions(record: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"{record['device']}: {versions}, code {record['code_sha256'][:8]}"


def checks_of(records: list[dict]) -> dict[str, dict[str, dict]]:
    """Name of a check -> family -> what was found, of the proof."""
    found = {}
    for record in records:
        for check in record.get("checks", {}).values():
            found.setdefault(check["name"], {})[check["family"]] = check
    return found


def check_tables(gpus: dict[str, list[dict]]) -> str:
    """A table for each GPU; below it what fails, and what is not there."""
    texts = []
    for records in gpus.values():
        found = checks_of(records)
        if not found:
            continue
        rows = [
            [cell(name), *(SHOWN[families[family]["result"]] if family in families else "" for family in NAMES)]
            for name, families in found.items()
        ]
        said = defaultdict(list)
        for check in (check for families in found.values() for check in families.values()):
            if check["result"] != "holds":
                said[check["result"], check["name"], check["detail"]].append(check["family"])
        lines = [
            f"- {SHOWN[result]}: {cell(name)}, {cell(', '.join(families))}: {cell(detail)}"
            for (result, name, detail), families in sorted(said.items(), key=lambda one: one[0][0])
        ]
        proof = next(record for record in records if record.get("checks"))
        texts += [cell(conditions(proof)), table(["check", *NAMES], rows), *(["\n".join(lines)] if lines else [])]
    return "\n\n".join(texts) or MISSING


def step_table(gpus: dict[str, list[dict]]) -> str:
    rows = []
    for device, records in gpus.items():
        for step in (step for record in records for step in record.get("steps", {}).values()):
            seconds, peak = step["seconds"], step["peak_memory_bytes"]
            rows.append(
                [
                    cell(device),
                    f"{cell(step['preset'])}, {cell(step['dtype'])}",
                    f"{step['batch_size']} x ({step['image_tokens']} + {step['text_tokens']})",
                    cell(step["checkpointing"]),
                    f"{seconds['median']:.3f} ({seconds['low']:.3f}-{seconds['high']:.3f})",
                    f"{step['weights_bytes'] / 1e9:.1f}",
                    MISSING if peak is None else f"{peak / 1e9:.1f}",
                ]
            )
    head = [
        "GPU",
        "model",
        "image and text tokens",
        "checkpointing",
        "seconds a step",
        "weights, GB",
        "peak beside them, GB",
    ]
    return table(head, rows) if rows else MISSING


def part_table(gpus: dict[str, list[dict]]) -> str:
    """How each part went, with the last line of stderr where it did not pass."""
    rows = [
        [
            cell(device),
            record["kind"],
            cell(record["part"]),
            record["outcome"],
            f"{record['seconds']:.0f} of {record['limit_seconds']:.0f}",
            cell(record["stderr"][-1] if record["stderr"] else ""),
        ]
        for device, records in gpus.items()
        for record in records
    ]
    return table(["GPU", "", "part", "outcome", "seconds", "its last words"], rows) if rows else MISSING


def summary(gpus: dict[str, list[dict]]) -> str:
    """Of README: how many checks hold on each GPU, and whether its speed was measured; or that nothing was."""
    lines = []
    for device, records in gpus.items():
        results = Counter(check["result"] for families in checks_of(records).values() for check in families.values())
        run = results["holds"] + results["fails"]
        proof = f"{results['holds']} of {run} checks hold" if run else f"correctness {MISSING}"
        timed = any(record["kind"] == "speed" and record["outcome"] == "passed" for record in records)
        lines.append(f"On {cell(device)}: {proof} ({PAGE}); speed {f'in {SPEED_PAGE}' if timed else MISSING}.")
    return "\n".join(lines) or (
        f"On a GPU: {MISSING}, neither equality with the stock model, nor flash and flex attention, nor training, nor\n"
        f"speed. `make gpu-proof` and `make gpu-speed` do it in a quarter of an hour ({PAGE})."
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, help="folder with a folder for each GPU, or none")
    parser.add_argument("--into", type=Path, help="Markdown file with the marks")
    parser.add_argument("--readme", type=Path, help="Markdown file with the mark `gpu`")
    arguments = parser.parse_args(argv)
    try:
        gpus = read_folder(arguments.records)
        pages = {
            arguments.into: {"checks": check_tables(gpus), "steps": step_table(gpus), "parts": part_table(gpus)},
            arguments.readme: {"gpu": summary(gpus)},
        }
        for file, tables in pages.items():
            if file is None:
                print("\n\n".join(tables.values()))
                continue
            page = file.read_text()
            for mark, text in tables.items():
                page = fill(page, mark, text)
            file.write_text(page)
    except (OSError, ValueError) as error:
        print(f"render_gpu: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
