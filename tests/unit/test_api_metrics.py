"""`GET /metrics` says what the store says, in the words that Prometheus reads."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.api_service import ApiService
from tests.store_factories import a_beat

Figures = dict[tuple[str, frozenset[str]], float]


def scrape(api: ApiService) -> Figures:
    """Every sample by its name and label values; those of 0 are left out."""
    answer = api.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, frozenset(value for value in sample.labels.values() if value)): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.value and not sample.name.startswith("graft_http_")  # this process's: what other tests asked, too
    }


def of(figures: Figures, name: str) -> dict[frozenset[str], float]:
    return {labels: value for (found, labels), value in figures.items() if found == name}


def test_a_service_without_jobs_and_workers_counts_none(api: ApiService) -> None:
    assert scrape(api) == {}


def test_jobs_are_counted_by_status_and_class(api: ApiService) -> None:
    first = api.new_job()
    gpu_class = first["gpu_class"]
    api.succeed(first["id"])
    api.train(api.new_job()["id"])
    cancelling = api.new_job()["id"]
    api.claim(cancelling)
    api.http.post(f"/jobs/{cancelling}/cancel")
    pausing = api.new_job()["id"]
    api.claim(pausing)
    for job_id in (pausing, api.new_job()["id"]):
        api.http.post(f"/jobs/{job_id}/pause")
    api.new_job()
    figures = scrape(api)
    words = ("succeeded", "running", "cancelling", "pausing", "paused", "validating_files")
    assert of(figures, "graft_jobs") == {frozenset({status, gpu_class}): 1 for status in words}
    assert of(figures, "graft_queued_jobs") == {frozenset({"prepare", "no_live_worker"}): 1}, "a paused one is none"


def test_what_waits_is_counted_by_what_it_waits_for(api: ApiService) -> None:
    handed = api.new_job()
    gpu_class = handed["gpu_class"]
    api.leases.hand_to_training(handed["id"], api.claim(handed["id"]).epoch, {"report": {}})
    api.new_job()
    figures = scrape(api)
    assert of(figures, "graft_queued_jobs") == {
        frozenset({"train", gpu_class, "no_live_worker"}): 1,
        frozenset({"prepare", "no_live_worker"}): 1,
    }
    ages = of(figures, "graft_oldest_queued_job_age_seconds")
    assert set(ages) == {frozenset({"train", gpu_class}), frozenset({"prepare"})}
    assert all(0 < age < 600 for age in ages.values())
    api.workers.beat(**a_beat("g", gpu_class=gpu_class, device="T4"))
    figures = scrape(api)
    assert of(figures, "graft_live_workers") == {frozenset({"train", gpu_class}): 1}
    assert of(figures, "graft_queued_jobs")[frozenset({"train", gpu_class, "in_line"})] == 1


def test_forecasts_are_held_against_what_was_measured(api: ApiService) -> None:
    for ratio in (0.9, 1.2):
        job = api.new_job()
        expected = job["memory"]["predicted_peak_bytes"]
        api.succeed(job["id"], measured_peak_bytes=int(expected * ratio))
    figures, here = scrape(api), frozenset({job["gpu_class"]})
    assert of(figures, "graft_memory_forecast_jobs") == {here: 2}
    assert of(figures, "graft_memory_forecast_mean_ratio") == {here: 1.05}
    assert of(figures, "graft_memory_forecast_highest_ratio") == {here: 1.2}
