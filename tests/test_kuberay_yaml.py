"""KubeRay, Kubernetes, Ray's autoscaler and Ray Serve would take the files, and they say what they are meant to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay import RayJob, RayService
from pydantic import BaseModel, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from cascade.config import load_config
from serve.arguments import CONFIG_VARIABLE
from serve.ingress import EngineReplica, Ingress
from serve.limits import Limits

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "kuberay"
KINDS: dict[str, type[BaseModel]] = {"rayjob.yaml": RayJob, "rayservice.yaml": RayService}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def cluster_of(resource: dict[str, Any]) -> dict[str, Any]:
    spec = resource["spec"]
    return spec["rayClusterSpec" if resource["kind"] == "RayJob" else "rayClusterConfig"]


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def resource(name: str) -> dict[str, Any]:
    return load(name)


@pytest.fixture
def node_types(resource: dict[str, Any]) -> dict[str, Any]:
    """The kinds of nodes as Ray's autoscaler reads them from the cluster."""
    cluster = {"metadata": {"name": "test", "namespace": "default"}, "spec": cluster_of(resource)}
    return _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]


def groups(resource: dict[str, Any]) -> dict[str, Any]:
    return {group["groupName"]: group for group in cluster_of(resource)["workerGroupSpecs"]}


def pods(resource: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(resource)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_kuberay_and_kubernetes_take_it(name: str, resource: dict[str, Any]) -> None:
    KINDS[name].model_validate(resource)


def _spec(resource: dict[str, Any]) -> Any:
    return resource["spec"]


def _head(resource: dict[str, Any]) -> Any:
    return cluster_of(resource)["headGroupSpec"]


def _worker(resource: dict[str, Any]) -> Any:
    return cluster_of(resource)["workerGroupSpecs"][-1]


def _pod(resource: dict[str, Any]) -> Any:
    return _worker(resource)["template"]["spec"]


def _container(resource: dict[str, Any]) -> Any:
    return _pod(resource)["containers"][0]


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (_spec, "shutdownAfterJobFinish", True),
        (cluster_of, "rayVersion", 2.6),
        (cluster_of, "autoscalerOption", {}),
        (_head, "rayStartParams", {"num-cpus": 0}),
        (_head, "resources", {"CPU": "0"}),
        (_worker, "maxReplica", 4),
        (_worker, "maxReplicas", "4"),
        (_worker, "minReplicas", True),
        (_pod, "affinities", {}),
        (_pod, "volumes", {"name": "config"}),
        (_container, "envForm", []),
        (_container, "image", 3.11),
        (_container, "resources", {"limits": ["nvidia.com/gpu"]}),
    ],
)
def test_a_misspelled_key_and_a_wrong_type_are_refused(
    name: str, resource: dict[str, Any], place: Callable[[dict[str, Any]], Any], key: str, value: object
) -> None:
    place(resource)[key] = value
    with pytest.raises(ValidationError, match=key):
        KINDS[name].model_validate(resource)


@pytest.mark.parametrize("missing", ["maxReplicas", "rayStartParams", "template", "groupName"])
def test_what_kuberay_needs_is_missed(name: str, resource: dict[str, Any], missing: str) -> None:
    del _worker(resource)[missing]
    with pytest.raises(ValidationError, match=missing):
        KINDS[name].model_validate(resource)


def test_image_and_clusters_have_the_ray_of_the_project(resource: dict[str, Any]) -> None:
    pinned = re.search(r"ray\[.*\]==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert pinned is not None
    assert cluster_of(resource)["rayVersion"] == pinned.group(1)
    dockerfile = (FOLDER / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{pinned.group(1)}-py311\n" in dockerfile
    assert "-c constraints.txt" in dockerfile
    assert {c["image"] for pod in pods(resource) for c in pod["containers"]} == {"registry.example.com/cascade:0.1.0"}


def test_nodes_are_of_the_kinds_of_the_launchers_cluster(node_types: dict[str, Any]) -> None:
    """Same names, labels and custom resources; at most its CPUs, since Kubernetes keeps some for itself."""
    launcher = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    for name, kind in node_types.items():
        there = launcher["head" if name == "headgroup" else name]
        assert kind["labels"]["cascade/role"] == there["labels"]["cascade/role"]
        assert {k: v for k, v in kind["resources"].items() if k not in ("CPU", "memory")} == {
            k: v for k, v in there["resources"].items() if k != "CPU"
        }
        assert kind["resources"]["CPU"] <= there["resources"]["CPU"]


def test_the_head_does_no_work_and_takes_none_from_strangers(
    resource: dict[str, Any], node_types: dict[str, Any]
) -> None:
    assert node_types["headgroup"]["resources"]["CPU"] == 0
    assert _head(resource)["serviceType"] == "ClusterIP"
    assert cluster_of(resource)["authOptions"] == {"mode": "token"}


def test_the_job_starts_from_nothing_and_leaves_nothing() -> None:
    resource = load("rayjob.yaml")
    assert resource["spec"]["shutdownAfterJobFinishes"]
    assert cluster_of(resource)["enableInTreeAutoscaling"]
    assert set(groups(resource)) == {"cpu", "gpu"}
    assert all(g["minReplicas"] == g["replicas"] == 0 < g["maxReplicas"] for g in groups(resource).values())


def test_workers_may_be_spot_and_the_head_and_serving_are_not() -> None:
    def kind(pod: dict[str, Any]) -> str:
        affinity = pod["affinity"]["nodeAffinity"]
        if "requiredDuringSchedulingIgnoredDuringExecution" in affinity:
            terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
            wanted = {e["operator"] for t in terms for e in t["matchExpressions"]}
            assert len(terms) == 1, "several terms are alternatives"
        else:
            terms = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
            wanted = {e["operator"] for t in terms for e in t["preference"]["matchExpressions"]}
        return {"NotIn": "steady", "In": "spot"}[wanted.pop()]

    assert [kind(pod) for pod in pods(load("rayjob.yaml"))] == ["steady", "spot", "spot"]
    assert [kind(pod) for pod in pods(load("rayservice.yaml"))] == ["steady", "steady"]


def test_gpu_pods_get_past_the_taint_of_gpu_nodes(resource: dict[str, Any]) -> None:
    for group in groups(resource).values():
        pod = group["template"]["spec"]
        wants = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        assert wants == any(t["key"] == "nvidia.com/gpu" for t in pod["tolerations"])


def test_keys_come_from_a_secret_to_whoever_may_need_them(resource: dict[str, Any]) -> None:
    """Teachers are asked, and the storage is read, on workers of any kind; the driver opens the storage on the head."""
    for pod in pods(resource):
        assert all(c["envFrom"] == [{"secretRef": {"name": "cascade-keys"}}] for c in pod["containers"])
        assert not any("env" in c for c in pod["containers"])


def test_model_code_can_be_confined_wherever_the_pipeline_runs_it() -> None:
    unconfined = {"seccompProfile": {"type": "Unconfined"}, "appArmorProfile": {"type": "Unconfined"}}
    assert all(pod["securityContext"] == unconfined for pod in pods(load("rayjob.yaml")))


def mounted(pod: dict[str, Any]) -> set[str]:
    """Where a pod has the ConfigMap."""
    volumes = {v["name"] for v in pod.get("volumes", []) if v.get("configMap", {}).get("name") == "cascade-config"}
    return {m["mountPath"] for c in pod["containers"] for m in c.get("volumeMounts", []) if m["name"] in volumes}


def test_the_config_is_where_the_job_and_the_application_look_for_it() -> None:
    job = load("rayjob.yaml")
    config = Path(job["spec"]["entrypoint"].split("--config ")[1])
    assert str(config.parent) in mounted(pods(job)[0]), "the driver runs on the head"
    service = load("rayservice.yaml")
    application = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]
    named = Path(application["runtime_env"]["env_vars"][CONFIG_VARIABLE])
    assert all(str(named.parent) in mounted(pod) for pod in pods(service)), "Serve builds it on any node"
    assert config.name == named.name == "domain.yaml"
    for name in KINDS:
        assert "from-file=domain.yaml=" in (FOLDER / "rayjob.yaml").read_text(), name


def test_the_job_runs_a_module_of_the_project() -> None:
    _, module = load("rayjob.yaml")["spec"]["entrypoint"].split("python -m ")
    assert (ROOT / (module.split()[0].replace(".", "/") + ".py")).is_file()


def test_a_node_of_each_kind_can_hold_one_actor_of_the_domain_configs() -> None:
    cluster = {"metadata": {"name": "test", "namespace": "default"}, "spec": cluster_of(load("rayjob.yaml"))}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    for path in (ROOT / "configs").glob("*.yaml"):
        execution = load_config(path).execution
        kind = types["gpu" if execution.use_gpu else "cpu"]
        assert max(execution.cpus_per_actor, execution.cpus_per_worker) <= kind["resources"]["CPU"]
        if execution.use_gpu:
            assert max(execution.train_workers, execution.student_actors) <= kind["max_workers"]


def serve_config() -> dict[str, Any]:
    return yaml.safe_load(load("rayservice.yaml")["spec"]["serveConfigV2"])


def unknown_keys(config: dict[str, Any]) -> set[str]:
    """Keys that Ray Serve would pass over without a word: its schema allows them for the sake of newer versions."""

    def extra(model: type[BaseModel], given: dict[str, Any]) -> set[str]:
        return set(given) - set(model.model_fields)

    found = extra(ServeDeploySchema, config)
    for application in config["applications"]:
        found |= extra(ServeApplicationSchema, application)
        for deployment in application["deployments"]:
            found |= extra(DeploymentSchema, deployment)
            found |= extra(RayActorOptionsSchema, deployment.get("ray_actor_options", {}))
            found |= extra(AutoscalingConfig, deployment.get("autoscaling_config", {}))
    return found


def test_ray_serve_takes_the_application() -> None:
    config = serve_config()
    ServeDeploySchema.model_validate(config)
    assert not unknown_keys(config)


def test_ray_serve_would_refuse_a_wrong_type_and_we_a_misspelled_key() -> None:
    config = serve_config()
    engine = config["applications"][0]["deployments"][0]
    engine["ray_actor_options"]["num_gpu"] = 1
    engine["autoscaling_config"]["max_replica"] = 8
    assert unknown_keys(config) == {"num_gpu", "max_replica"}
    engine["ray_actor_options"]["num_gpus"] = "many"
    with pytest.raises(ValidationError, match="num_gpus"):
        ServeDeploySchema.model_validate(config)


def test_the_application_overrides_deployments_that_there_are() -> None:
    deployments = {d["name"]: d for d in serve_config()["applications"][0]["deployments"]}
    assert set(deployments) == {EngineReplica.name, Ingress.name}  # type: ignore[attr-defined]
    assert deployments[Ingress.name]["num_replicas"] == 1  # type: ignore[attr-defined]


def test_engines_scale_as_far_as_there_may_be_nodes_and_each_fits_one() -> None:
    service = load("rayservice.yaml")
    engine = serve_config()["applications"][0]["deployments"][0]
    scaling = AutoscalingConfig(**engine["autoscaling_config"])
    serving = groups(service)["serving"]
    assert scaling.min_replicas == serving["minReplicas"]
    assert scaling.max_replicas == serving["maxReplicas"]
    assert scaling.target_ongoing_requests is not None
    assert scaling.target_ongoing_requests < Limits.rows, "a new engine comes before the others are full"
    options, limits = engine["ray_actor_options"], serving["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert options["num_gpus"] == int(limits["nvidia.com/gpu"])
    assert options["num_cpus"] + 0.1 <= int(limits["cpu"]), "the gateway has a place beside it"
    assert options["resources"] == {k: int(v) for k, v in serving["resources"].items()}
