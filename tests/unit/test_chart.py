"""The Helm chart: valid for Kubernetes, hardened throughout, closed but for named edges, and clear where it refuses."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from graft_api.keys.making import SHORTEST_PEPPER
from graft_api.keys.static import SHORTEST_KEY
from graft_shared.capacity import CapacityTable
from graft_shared.defaults import load_capacity
from graft_shared.store.migrate import PATIENCE
from graft_shared.webhooks import PUBLIC_PORTS
from tests.deployed import CHART, ROOT, VALUES, chart_values, render

Manifest = dict[str, Any]

OLDEST, NEWEST = "1.27", kubernetes_validate.latest_version()
SECRETS = {"databaseUrl": "postgresql://graft:x@db/graft", "brokerUrl": "redis://redis/0", "apiKeys": "a=" + 24 * "k"}
IMAGES = {"api": "registry/graft-api:1", "prepare": "registry/graft-prepare:1", "worker": "registry/graft-worker:1"}

# What KEDA 2 and the Prometheus operator ask of the kinds that Kubernetes does not know, and which we use.
OTHER_KINDS: dict[str, dict[str, set[str]]] = {
    "ScaledObject": {
        "needs": {"scaleTargetRef", "triggers"},
        "has": {"pollingInterval", "cooldownPeriod", "minReplicaCount", "maxReplicaCount", "advanced"},
    },
    "TriggerAuthentication": {"needs": {"secretTargetRef"}, "has": set()},
    "PodMonitor": {"needs": {"selector", "podMetricsEndpoints"}, "has": set()},
}


# It reads megabytes of definitions for each manifest anew.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


@pytest.fixture(scope="module", params=VALUES)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(chart_values(request.param))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Name, metadata and spec of each kind of pod."""
    for manifest in [*of_kind(manifests, "Deployment"), *of_kind(manifests, "Job")]:
        template = manifest["spec"]["template"]
        yield manifest["metadata"]["name"], template["metadata"], template["spec"]


def containers(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    for name, _, pod in pods(manifests):
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            yield f"{name}/{container['name']}", container


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_manifest_is_valid(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        if manifest["kind"] not in OTHER_KINDS:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_what_kubernetes_does_not_know_has_the_form_that_its_owner_asks(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if (form := OTHER_KINDS.get(manifest["kind"])) is not None:
            assert manifest["apiVersion"] in ("keda.sh/v1alpha1", "monitoring.coreos.com/v1")
            assert form["needs"] <= set(manifest["spec"]) <= form["needs"] | form["has"]


def test_the_chart_is_without_fault_to_helms_own_lint() -> None:
    from helm_python import lint

    for name in VALUES:
        report = lint(CHART, chart_values(name), strict=True, kube_version=f"v{OLDEST}.0")
        said = [message for message in report["messages"] if "icon is recommended" not in message["error"]]
        assert not report["errors"] and not said, (name, report)


def test_no_two_manifests_of_a_kind_have_one_name(manifests: list[Manifest]) -> None:
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(names) == len(set(names))
    assert all(manifest["metadata"]["namespace"] == "ml" for manifest in manifests)


def test_every_pod_is_as_closed_as_the_restricted_standard_wants(manifests: list[Manifest]) -> None:
    for name, _, pod in pods(manifests):
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, "a service named graft-… would set variables of our prefix"
        assert pod["shareProcessNamespace"] is True, "or zombies stay, and early signals go unheard"
        context = pod["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] == context["fsGroup"] == 10001
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for name, container in containers(manifests):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
    assert all(account["automountServiceAccountToken"] is False for account in of_kind(manifests, "ServiceAccount"))


def test_every_mount_has_its_volume_and_every_volume_its_mount(manifests: list[Manifest]) -> None:
    for name, _, pod in pods(manifests):
        used = {
            mount["name"]
            for container in [*pod.get("initContainers", []), *pod["containers"]]
            for mount in container["volumeMounts"]
        }
        assert used == {volume["name"] for volume in pod["volumes"]}, name


def test_selectors_find_their_own_pods_and_no_others(manifests: list[Manifest]) -> None:
    labels = {name: metadata["labels"] for name, metadata, _ in pods(manifests)}
    for kind, path in (("Deployment", "selector"), ("PodDisruptionBudget", "selector"), ("Service", "")):
        for manifest in of_kind(manifests, kind):
            selector = manifest["spec"][path]["matchLabels"] if path else manifest["spec"]["selector"]
            found = [name for name, its in labels.items() if selector.items() <= its.items()]
            assert found == [manifest["metadata"]["name"]], kind
    budgets = {budget["metadata"]["name"] for budget in of_kind(manifests, "PodDisruptionBudget")}
    assert budgets == {name for name in labels if not name.endswith("-migrate")}
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert budget["spec"]["maxUnavailable"] >= 1, "a node can be drained whatever runs on it"


def test_a_secret_is_read_by_name_and_stands_in_no_other_manifest(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] != "Secret":
            text = json.dumps(manifest)
            assert "postgresql://" not in text and "redis://" not in text and "default=" not in text
    known = {secret["metadata"]["name"]: set(secret["data"]) for secret in of_kind(manifests, "Secret")}
    for name, container in containers(manifests):
        for variable in container["env"]:
            source = variable.get("valueFrom", {}).get("secretKeyRef")
            if source is not None and source["name"] in known and not source.get("optional"):
                assert source["key"] in known[source["name"]], name


def test_each_process_is_given_the_secrets_that_it_needs_and_no_others(manifests: list[Manifest]) -> None:
    common = {"database-url", "s3-access-key-id", "s3-secret-access-key"}
    needs = {
        "api": {*common, "broker-url", "hub-token", "webhook-secret", "api-keys", "key-pepper"},
        "reconciler": {*common, "broker-url", "webhook-secret"},
        "worker": {*common, "broker-url", "hub-token"},
        "bucket": common,
        "migrate": common,
    }
    for name, container in containers(manifests):
        sources = [variable.get("valueFrom", {}).get("secretKeyRef") for variable in container["env"]]
        assert {source["key"] for source in sources if source} == needs[container["name"]], name


def test_the_hooks_need_nothing_that_comes_after_them(manifests: list[Manifest]) -> None:
    hooks = {
        (manifest["kind"], manifest["metadata"]["name"]): manifest["metadata"]["annotations"]
        for manifest in manifests
        if "helm.sh/hook" in manifest["metadata"].get("annotations", {})
    }
    assert all(said["helm.sh/hook"] == "pre-install,pre-upgrade" for said in hooks.values())
    (job,) = of_kind(manifests, "Job")
    pod = job["spec"]["template"]["spec"]
    assert int(hooks["ServiceAccount", pod["serviceAccountName"]]["helm.sh/hook-weight"]) < 0
    assert all("emptyDir" in volume for volume in pod["volumes"])
    for container in [*pod["initContainers"], *pod["containers"]]:
        for variable in container["env"]:
            if "valueFrom" in variable:
                secret = variable["valueFrom"]["secretKeyRef"]["name"]
                assert secret == "graft-settings" or int(hooks["Secret", secret]["helm.sh/hook-weight"]) < 0


def test_the_tables_change_before_any_new_process_starts_and_the_bucket_is_asked_first(
    manifests: list[Manifest],
) -> None:
    (job,) = of_kind(manifests, "Job")
    pod = job["spec"]["template"]["spec"]
    assert [each["command"][-1] for each in pod["initContainers"]] == ["graft_shared.buckets.gate"]
    assert [each["command"][-1] for each in pod["containers"]] == ["graft_shared.store.migrate"]


def test_helm_is_told_to_wait_longer_than_a_migration_may_take() -> None:
    (job,) = of_kind(render(chart_values("default")), "Job")
    assert PATIENCE.total_seconds() < job["spec"]["activeDeadlineSeconds"] < 15 * 60
    texts = (ROOT / "README.md", ROOT / "deploy" / "README.md", CHART / "templates" / "NOTES.txt")
    commands = [
        line for path in texts for line in re.findall(r"^ *helm (?:install|upgrade) .*", path.read_text(), re.M)
    ]
    assert len(commands) == 4 and all(" --timeout 15m" in command for command in commands), commands


def test_a_rollout_takes_workers_away_one_after_the_other_and_no_api_before_another_is_there(
    manifests: list[Manifest],
) -> None:
    for deployment in of_kind(manifests, "Deployment"):
        name, rolling = deployment["metadata"]["name"], deployment["spec"].get("strategy", {}).get("rollingUpdate")
        if name == "graft-api":
            assert rolling == {"maxSurge": 1, "maxUnavailable": 0}
        elif name != "graft-reconciler":
            assert rolling["maxSurge"] == 0 and 1 <= rolling["maxUnavailable"] <= 2, "its card is taken until it leaves"


def test_a_worker_has_one_card_or_none_and_says_which() -> None:
    found = {}
    for name, container in containers(render(chart_values("classes"))):
        if container["command"][-1] == "graft_worker":
            env = {each["name"]: each.get("value") for each in container["env"]}
            found[name] = (container["resources"]["limits"].get("nvidia.com/gpu"), env["GRAFT_WORKER_DEVICE"])
    assert found == {
        "graft-prepare/worker": (None, "cpu"),
        "graft-merge/worker": (None, "cpu"),
        "graft-worker-l4/worker": (1, "cuda:0"),
        "graft-worker-h100/worker": (1, "cuda:0"),
        "graft-worker-cpu/worker": (None, "cpu"),
    }
    with pytest.raises(ValueError, match="gpus"):
        render({"images": IMAGES, "secrets": SECRETS, "workers": [{"class": "24gb", "gpus": 2}]})


def test_what_a_worker_leaves_out_is_taken_from_the_defaults_and_a_zero_is_not_left_out() -> None:
    deployments = {each["metadata"]["name"]: each for each in of_kind(render(chart_values("classes")), "Deployment")}
    assert deployments["graft-worker-cpu"]["spec"]["replicas"] == 0
    assert deployments["graft-worker-l4"]["spec"]["replicas"] == 8
    pod = deployments["graft-worker-l4"]["spec"]["template"]["spec"]
    assert {"name": "state", "emptyDir": {"sizeLimit": "300Gi"}} in pod["volumes"]
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "32Gi", "nvidia.com/gpu": 1}


def test_the_classes_of_the_values_are_classes_of_the_capacity_table() -> None:
    names = {gpu.name for gpu in load_capacity().classes}
    assert {worker["class"] for worker in yaml.safe_load((CHART / "values.yaml").read_text())["workers"]} <= names
    assert {worker["class"] for worker in chart_values("ingress-keda")["workers"]} <= names
    own = yaml.safe_load(chart_values("classes")["capacity"])
    assert isinstance(table_of(own), CapacityTable)
    with pytest.raises(ValueError, match="capacity has no class a100"):
        render({**chart_values("classes"), "workers": [{"class": "a100"}]})


def table_of(table: dict[str, Any]) -> CapacityTable:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "capacity.yaml"
        path.write_text(yaml.safe_dump(table))
        return load_capacity(path)


def policies(manifests: list[Manifest]) -> dict[str, Manifest]:
    found = of_kind(manifests, "NetworkPolicy")
    return {policy["metadata"]["name"].removeprefix("graft-"): policy["spec"] for policy in found}


def test_nothing_comes_in_or_goes_out_but_by_an_edge_that_is_named() -> None:
    manifests = render(chart_values("classes"))
    found = policies(manifests)
    assert found["default-deny"]["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & set(found["default-deny"])
    labels = [metadata["labels"] for _, metadata, _ in pods(manifests)]
    assert all(found["default-deny"]["podSelector"]["matchLabels"].items() <= each.items() for each in labels)
    reached = {
        (port["port"], peer["ipBlock"]["cidr"])
        for name in ("stores", "bells", "public")
        for rule in found[name]["egress"]
        for port in rule["ports"]
        for peer in rule["to"]
        if "ipBlock" in peer
    }
    public = {(port, "0.0.0.0/0") for port in (443, 8443)}
    assert reached == {(5432, "10.0.0.10/32"), (6380, "10.0.0.11/32"), (443, "10.0.0.12/32"), *public}
    entered = {name for name, policy in found.items() if "Ingress" in policy["policyTypes"]}
    assert entered == {"default-deny", "api"}
    (incoming,) = found["api"]["ingress"]
    assert incoming == {"from": [{"podSelector": {}}], "ports": [{"protocol": "TCP", "port": "http"}]}


def test_receivers_of_webhooks_are_reached_by_whoever_sends_to_them_at_every_port_that_they_may_have() -> None:
    manifests = render(chart_values("classes"))
    (rule,) = policies(manifests)["public"]["egress"]
    assert [port["port"] for port in rule["ports"]] == list(PUBLIC_PORTS)
    selector = policies(manifests)["webhooks"]["podSelector"]
    (chosen,) = selector["matchExpressions"]
    senders = {
        name
        for name, metadata, _ in pods(manifests)
        if selector["matchLabels"].items() <= metadata["labels"].items()
        and metadata["labels"][chosen["key"]] in chosen["values"]
    }
    assert (chosen["operator"], senders) == ("In", {"graft-reconciler", "graft-api"})


def test_figures_are_shown_by_every_process_to_whom_the_values_name_and_under_the_jobs_that_alerts_speak_of() -> None:
    manifests = render(chart_values("ingress-keda"))
    shown = {
        name: {port["name"]: port["containerPort"] for port in container["ports"]}["metrics"]
        for name, container in containers(manifests)
        if "graft-migrate" not in name
    }
    assert set(shown.values()) == {9464} and len(shown) == 6, shown
    (incoming,) = policies(manifests)["metrics"]["ingress"]
    assert incoming["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    (monitor,) = of_kind(manifests, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    jobs = set()
    for _, metadata, _ in pods(manifests):
        component = metadata["labels"]["app.kubernetes.io/component"]
        for rule in endpoint["relabelings"]:
            if found := re.fullmatch(rule["regex"], component):
                jobs.add(rule["replacement"].replace("$1", found[1] if found.groups() else ""))
    assert jobs == set(re.findall(r"job_name: (graft-\S+)", (ROOT / "deploy/prometheus/prometheus.yml").read_text()))
    assert "metrics" not in policies(render(chart_values("default"))), "nobody is named, nobody is let in"


def test_what_the_operator_adds_reaches_every_process_that_runs_on() -> None:
    manifests = render(chart_values("ingress-keda"))
    for name, container in containers(manifests):
        added = {"name": "GRAFT_LOG_FORMAT", "value": "json"} in container["env"]
        assert added == ("envFrom" in container) == ("graft-migrate" not in name), name
    (rule,) = policies(manifests)["also"]["egress"]
    assert rule["ports"] == [{"port": 4318}]


def test_a_state_that_is_named_stands_in_for_the_default() -> None:
    for _, metadata, pod in pods(render(chart_values("ingress-keda"))):
        if metadata["labels"]["app.kubernetes.io/component"].startswith("worker-"):
            (state,) = [volume for volume in pod["volumes"] if volume["name"] == "state"]
            assert set(state) == {"name", "ephemeral"}


def test_the_account_of_the_migration_has_the_identity_of_the_api() -> None:
    annotations = {"iam.example.com/role": "graft"}
    manifests = render({**chart_values("default"), "serviceAccounts": {"api": {"annotations": annotations}}})
    accounts = {
        each["metadata"]["name"]: each["metadata"]["annotations"]
        for each in of_kind(manifests, "ServiceAccount")
        if "annotations" in each["metadata"]
    }
    assert accounts["graft-api"] == annotations and annotations.items() <= accounts["graft-migrate"].items()


def test_the_way_to_the_public_leads_to_no_private_address() -> None:
    (rule,) = policies(render(chart_values("ingress-keda")))["public"]["egress"]
    blocks = {peer["ipBlock"]["cidr"]: set(peer["ipBlock"]["except"]) for peer in rule["to"]}
    assert {"10.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"} <= blocks["0.0.0.0/0"]
    assert "fc00::/7" in blocks["::/0"]
    closed = {**chart_values("default"), "networkPolicy": {"public": []}}
    assert "public" not in policies(render(closed)), "without addresses there is no way, not a way to all"
    for name in ("api", "dns"):
        with pytest.raises(ValueError, match=name):
            render({**chart_values("default"), "networkPolicy": {name: []}})


def test_with_keda_no_upgrade_sets_the_number_of_workers() -> None:
    manifests = render(chart_values("ingress-keda"))
    deployments = {each["metadata"]["name"]: each["spec"] for each in of_kind(manifests, "Deployment")}
    scaled = {each["metadata"]["name"]: each["spec"] for each in of_kind(manifests, "ScaledObject")}
    assert set(scaled) == {"graft-worker-24gb", "graft-worker-80gb"}
    for name, spec in scaled.items():
        assert spec["scaleTargetRef"] == {"name": name}
        assert "replicas" not in deployments[name]
        (trigger,) = spec["triggers"]
        assert (trigger["type"], trigger["metricType"]) == ("postgresql", "AverageValue")
        assert trigger["metadata"]["targetQueryValue"] == "1"
    bounds = [(spec["minReplicaCount"], spec["maxReplicaCount"]) for spec in scaled.values()]
    assert bounds == [(0, 8), (1, 2)]
    (authentication,) = of_kind(manifests, "TriggerAuthentication")
    assert authentication["spec"]["secretTargetRef"] == [
        {"parameter": "connection", "name": "graft-reader", "key": "url"}
    ]
    assert {trigger["authenticationRef"]["name"] for spec in scaled.values() for trigger in spec["triggers"]} == {
        authentication["metadata"]["name"]
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": {}}, "images.api"),
        ({"secrets": {}}, "secrets.databaseUrl"),
        ({"secrets": {**SECRETS, "databaseUrl": "postgresql+psycopg://graft:x@db/graft"}}, "postgresql://"),
        ({"secrets": {**SECRETS, "brokerUrl": ""}}, "secrets.brokerUrl"),
        ({"secrets": {**SECRETS, "apiKeys": ""}}, "secrets.apiKeys"),
        ({"secrets": {**SECRETS, "apiKeys": f"a={'k' * (SHORTEST_KEY - 1)}"}}, "apiKeys"),
        ({"secrets": {**SECRETS, "keyPepper": "k" * (SHORTEST_PEPPER - 1)}}, "keyPepper"),
        ({"secrets": {**SECRETS, "s3AccessKeyId": "graft"}}, "both, or neither"),
        ({"secrets": {**SECRETS, "databaseUrl": "postgresql://a:b@db:6432/x"}}, "networkPolicy.postgres.port: 6432"),
        ({"secrets": {**SECRETS, "brokerUrl": "rediss://:b@redis:6380/0"}}, "networkPolicy.redis.port: 6380"),
        ({"s3": {"endpointUrl": "http://store:9000"}}, "networkPolicy.store.port: 9000"),
        ({"s3": {"endpointUrl": "http://store"}}, "networkPolicy.store.port: 80"),
        ({"workers": [{"class": "24gb"}, {"class": "24gb"}]}, "24gb is there twice"),
        ({"workers": [{"class": "24gb", "gpu": 1}]}, "gpu"),
        ({"ingress": {"enabled": True}}, "ingress.host"),
        ({"metrics": {"podMonitor": {"enabled": True}}}, "networkPolicy.metrics"),
        ({"quota": {}}, "quota"),
        ({"api": {"replicas": "2"}}, "replicas"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        render({"images": IMAGES, "secrets": SECRETS, **changes})


def test_the_schema_knows_every_value_and_no_other() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(schema["properties"]) - {"global"} == set(values)
    for name, value in values.items():
        described = schema["properties"][name]
        described = schema["definitions"][described["$ref"].rpartition("/")[2]] if "$ref" in described else described
        if isinstance(value, dict) and "properties" in described:
            assert set(described["properties"]) == set(value), name
            assert described["additionalProperties"] is False, name


def test_chart_and_distributions_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    for distribution in ("shared", "services/api", "services/worker"):
        assert f'\nversion = "{chart["appVersion"]}"\n' in (ROOT / distribution / "pyproject.toml").read_text()
