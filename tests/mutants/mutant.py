"""What a mutant is: one small change that breaks one promise, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A textual change of one file below the root; `old` occurs in it exactly once."""

    name: str
    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # what pytest is given; it stops at the first that fails

    def apply(self, root: Path) -> None:
        """Change the file below `root`.

        Raises:
            ValueError: `old` does not occur exactly once: the list is older than the code.
        """
        path = root / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: `old` occurs {text.count(self.old)} times in {self.file}, not once")
        path.write_text(text.replace(self.old, self.new))
