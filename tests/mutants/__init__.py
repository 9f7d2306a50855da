"""Small changes that break a promise each: tests that do not notice one leave a sentence unsaid."""

from tests.mutants import of_tenants, of_the_store, of_the_worker

MUTANTS = [*of_the_store.MUTANTS, *of_tenants.MUTANTS, *of_the_worker.MUTANTS]
