"""`python deploy/constraints/pin.py`: from `all.txt`, write the pins of each image: what it needs and nothing else.

The needs are read from the installed packages' own metadata, so that no index is asked.
"""

from __future__ import annotations

import re
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
OURS = ("graft-shared", "graft-api", "graft-worker")
IMAGES = {
    "api": ("graft-shared[otel]", "graft-api"),
    "prepare": ("graft-shared[otel]", "graft-worker[prepare]"),
    "worker": ("graft-shared[otel]", "graft-worker[train,trackers]"),
}
PYTHON = {"python_version": "3.11", "python_full_version": "3.11.14"}  # of the images, whatever this runs on
HEAD = "# Written by pin.py from all.txt: the third-party packages of the {image} image.\n"


def pins_of(image: str) -> str:
    """The content of an image's pin file.

    Raises:
        KeyError: Something that it needs has no pin in all.txt.
    """
    pinned = {
        canonicalize_name(line.split("==")[0]): line
        for line in (HERE / "all.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    names = sorted(_closure([Requirement(text) for text in IMAGES[image]]) - set(OURS))
    return HEAD.format(image=image) + "".join(f"{pinned[name]}\n" for name in names)


def _closure(wanted: list[Requirement]) -> set[str]:
    """The names of everything that these need, themselves included, on the platform that this runs on."""
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            needs = [Requirement(text) for text in distribution(name).requires or ()]
            wanted += [need for need in needs if _applies(need, extra)]
    return {name for name, _ in seen}


def _applies(need: Requirement, extra: str) -> bool:
    if re.match(r"nvidia|cuda|triton", need.name):
        return False  # torch pins these itself, where its wheel needs them
    return need.marker is None or need.marker.evaluate({**PYTHON, "extra": extra})


def main() -> None:
    """Write the three files."""
    for image in IMAGES:
        (HERE / f"{image}.txt").write_text(pins_of(image))


if __name__ == "__main__":
    main()
