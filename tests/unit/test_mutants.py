"""The list of mutants is about the code as it is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants import MUTANTS
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_changes_one_place_of_a_file_that_still_compiles(mutant: Mutant, tmp_path: Path) -> None:
    copied = tmp_path / mutant.file
    copied.parent.mkdir(parents=True)
    shutil.copyfile(ROOT / mutant.file, copied)
    mutant.apply(tmp_path)
    compile(copied.read_text(), mutant.file, "exec")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_names_tests_that_exist(mutant: Mutant) -> None:
    for test in mutant.tests:
        file, _, function = test.partition("::")
        text = (ROOT / file).read_text()
        assert not function or f"def {function.partition('[')[0]}(" in text, test


def test_every_mutant_has_a_name_of_its_own() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert sorted(names) == sorted(set(names))


def test_a_mutant_of_code_that_has_changed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    mutant = replace(MUTANTS[0], file="a.py", old="x = 1\n", new="")
    with pytest.raises(ValueError, match="occurs 2 times"):
        mutant.apply(tmp_path)
