"""The cluster files pass the validation of the launcher that reads them, and say what the cluster is meant to be."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]
FILES = ["cluster.yaml", "cluster-gcp.yaml"]


def load(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture(params=FILES)
def cluster(request):
    return load(request.param)


def test_the_launcher_takes_it(cluster):
    validate_config(prepare_config(cluster))


def test_the_launcher_would_refuse_a_misspelled_key(cluster):
    cluster["head_nod_type"] = cluster.pop("head_node_type")
    with pytest.raises(jsonschema.ValidationError, match="head_nod_type"):
        validate_config(prepare_config(cluster))


def test_the_head_does_no_work(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert any("--num-cpus=0" in command for command in cluster["head_start_ray_commands"])


def test_workers_come_and_go_on_demand(cluster):
    types = cluster["available_node_types"]
    workers = {name: t for name, t in types.items() if name != cluster["head_node_type"]}
    assert all(t["min_workers"] == 0 < t["max_workers"] for t in workers.values())
    assert sum(t["max_workers"] for t in workers.values()) <= cluster["max_workers"]
    assert {"cpu", "gpu"} <= set(workers)
    assert "GPU" not in workers["cpu"]["resources"]
    assert workers["gpu"]["resources"]["GPU"] == 1


def test_training_nodes_are_spot_and_serving_nodes_are_not(cluster):
    def is_spot(node):
        return "spot" in str(node["node_config"]) or "preemptible" in str(node["node_config"])

    types = cluster["available_node_types"]
    assert is_spot(types["gpu"])
    assert not is_spot(types["serving"])
    assert not is_spot(types["head"])


def test_nodes_install_this_project_from_its_constraints(cluster):
    commands = "\n".join(cluster["setup_commands"])
    assert "-c ~/cascade/constraints.txt -e ~/cascade" in commands
    assert "--python 3.11" in commands
    assert cluster["file_mounts"]["~/cascade"] == "."
    assert (ROOT / "constraints.txt").exists()


def test_every_aws_node_names_an_image_that_current_wheels_run_on():
    """Ray's default image is Ubuntu 18.04 with glibc 2.27; torch's wheels need 2.28."""
    types = load("cluster.yaml")["available_node_types"]
    assert {t["node_config"]["ImageId"].split("/")[-3] for t in types.values()} == {
        "base-oss-nvidia-driver-gpu-ubuntu-22.04"
    }


def test_every_node_may_reach_the_storage():
    """Ray gives a role of its own to the head alone."""
    for node in load("cluster.yaml")["available_node_types"].values():
        assert node["node_config"]["IamInstanceProfile"] == {"Name": "cascade"}
    gcp = load("cluster-gcp.yaml")
    for name, node in gcp["available_node_types"].items():
        if name != gcp["head_node_type"]:
            (account,) = node["node_config"]["serviceAccounts"]
            assert account["email"] == f"ray-autoscaler-sa-v1@{gcp['provider']['project_id']}.iam.gserviceaccount.com"
        (disk,) = node["node_config"]["disks"]
        assert disk["initializeParams"]["diskType"].startswith(f"zones/{gcp['provider']['availability_zone']}/")


def test_the_dashboard_listens_on_the_head_alone(cluster):
    start = "\n".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in start


def test_a_node_of_each_kind_can_hold_one_actor_of_the_domain_configs(cluster):
    from cascade.config import load_config

    types = cluster["available_node_types"]
    for path in (ROOT / "configs").glob("*.yaml"):
        execution = load_config(path).execution
        kind = types["gpu" if execution.use_gpu else "cpu"]
        assert execution.cpus_per_actor <= kind["resources"]["CPU"]
        assert execution.cpus_per_worker <= kind["resources"]["CPU"]
        if execution.use_gpu:
            assert max(execution.train_workers, execution.student_actors) <= kind["max_workers"]
