"""Puts the records of benchmarks/gpu.py in their place.

    python benchmarks/gpu_results.py runs/gpu.tar.gz --records benchmarks/results/gpu \
        --points benchmarks/results/speed/gpu

The archive may come from anyone: nothing of it is unpacked but JSON files under the names that they should have, of one
GPU, of one state of the code, whose every field holds what it must. A proof replaces the earlier one of the same GPU,
and so do the figures of speed. benchmarks/render_gpu.py and benchmarks/render_speed.py make pages of them.
"""

import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import learnpruner
from learnpruner.hub_cards.records import (
    AMOUNT,
    BYTES,
    COUNT,
    EACH,
    LINE,
    MEASURED,
    RATIO,
    VERSIONS,
    Kind,
    read_record,
    read_result,
)
from learnpruner_commands.arguments import Parser

KINDS = ("proof", "speed", "points")
NAME = re.compile(rf"({'|'.join(KINDS)})/[\w.-]+\.json", re.ASCII)
# Of an archive: files, and bytes of each. What is recorded is far below.
FILES, BYTES_EACH = 500, 2**20
RESULTS = ("holds", "fails", "not there")
OUTCOMES = ("passed", "failed", "out of time", "no time was left")


def one_of(words: tuple[str, ...]) -> Kind:
    return Kind(f"one of {', '.join(words)}", lambda value: value in words)


LINES = Kind("a list of lines", lambda value: isinstance(value, list) and all(isinstance(line, str) for line in value))
TEXT = Kind("a text", lambda value: isinstance(value, str) and value.strip() != "")
CHECK = {"family": LINE, "name": LINE, "result": one_of(RESULTS), "detail": TEXT, "seconds": AMOUNT}
STEP = {
    **dict.fromkeys(("preset", "checkpointing", "dtype"), LINE),
    **dict.fromkeys(("batch_size", "image_tokens", "text_tokens", "answer_tokens", "rounds", "weights_bytes"), COUNT),
    "ratio": RATIO,
    "seconds": MEASURED,
    "peak_memory_bytes": BYTES,
}
PART_FIELDS = {
    "part": LINE,
    "outcome": one_of(OUTCOMES),
    "seconds": AMOUNT,
    "limit_seconds": AMOUNT,
    "command": LINE,
    "stderr": LINES,
    "device": LINE,
    "device_type": LINE,
    "versions": {"torch": LINE, "learnpruner": LINE, **VERSIONS},
    "code_sha256": LINE,
    # What a part that did not come so far lacks.
    "checks?": {EACH: CHECK},
    "steps?": {EACH: STEP},
}


def read_part(path: Path) -> dict:
    """Raises `ValueError` where the file is no record of a part of benchmarks/gpu.py."""
    return read_record(path, PART_FIELDS, "a record of benchmarks/gpu.py")


def unpack(archive: Path, folder: Path) -> None:
    """Writes the JSON files of an archive below a folder.

    Raises:
        `ValueError`: where it is no archive, or holds anything else, or too much.
    """
    try:
        with tarfile.open(archive, "r:gz") as packed:
            for number, member in enumerate(packed):
                if not member.isfile() or not NAME.fullmatch(member.name):
                    raise ValueError(f"it holds {member.name!r}, which is no record")
                if number >= FILES or member.size > BYTES_EACH:
                    raise ValueError(f"it holds more than {FILES} files, or one of more than {BYTES_EACH} bytes")
                file = folder / member.name
                if file.exists():
                    raise ValueError(f"it holds {member.name} twice")
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(packed.extractfile(member).read())
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{archive} is no archive of benchmarks/gpu.py: {error}") from error


def read_archive(folder: Path) -> dict[str, dict[str, dict]]:
    """Of each kind the records, by the name of their file, of what [`unpack`] wrote.

    Raises:
        `ValueError`: where one is not what it must be, or not of a GPU, or they are not of one device, one state of the
            code and this release.
    """
    readers = {"proof": read_part, "speed": read_part, "points": lambda path: read_result(path, speed=True)}
    found = {
        kind: {path.name: readers[kind](path) for path in sorted((folder / kind).glob("*.json"))} for kind in KINDS
    }
    records = {f"{kind}/{name}": record for kind, some in found.items() for name, record in some.items()}
    if not records:
        raise ValueError("The archive is empty.")
    first = next(iter(records))
    for name, record in records.items():
        if record["device_type"] != "cuda":
            raise ValueError(f"{name} was run on {record['device']}, which is no GPU: it is no record.")
        for field, value in facts(record).items():
            if value != facts(records[first])[field]:
                raise ValueError(f"{name} and {first} are not of the same {field}: {value}.")
    for kind, some in found.items():
        if len({record["code_sha256"] for record in some.values()}) > 1:
            raise ValueError(f"The records in {kind}/ are of several states of the code: measure again.")
    release = records[first]["versions"]["learnpruner"]
    if release != learnpruner.__version__:
        raise ValueError(f"The archive is of learnpruner {release}, and this is {learnpruner.__version__}.")
    return found


def facts(record: Mapping) -> dict[str, str]:
    names = ("learnpruner", "transformers", "torch", "python")
    return {"device": record["device"], **{name: record["versions"].get(name) for name in names}}


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def place(found: dict[str, dict[str, dict]], folder: Path, records: Path, points: Path) -> list[Path]:
    """Copies what [`read_archive`] accepted; what is replaced goes first. Returns the folders that were written."""
    device = next(record["device"] for some in found.values() for record in some.values())
    targets = {"proof": records / slug(device) / "proof", "speed": records / slug(device) / "speed"}
    targets["points"] = points / slug(device)
    written = []
    for kind, target in targets.items():
        if found[kind]:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder / kind, target)
            written.append(target)
    return written


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="what benchmarks/gpu.py wrote")
    parser.add_argument("--records", type=Path, required=True, help="folder of the records of parts")
    parser.add_argument("--points", type=Path, required=True, help="folder of the results of benchmarks/speed.py")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            unpack(arguments.archive, folder)
            for target in place(read_archive(folder), folder, arguments.records, arguments.points):
                print(target)
        except (OSError, ValueError) as error:
            print(f"gpu_results: {error}".replace(f"{folder}/", ""), file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
