"""The fields of KubeRay's custom resources, strictly: no key that `ray.io/v1` does not have, no value of another type.

Written after the field reference of KubeRay 1.6.2 (https://docs.ray.io/en/latest/cluster/kubernetes/references/api.html);
`status`, which the operator alone writes, is left out. What is Kubernetes' own inside (pod templates, services,
volumes of the autoscaler) is checked against Kubernetes' OpenAPI schema, which the package `kubernetes-validate` ships.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Annotated, Any, Literal

import kubernetes_validate
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

KUBERNETES = "1.34"
Strings = dict[str, str]
Manager = Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]


def check_kubernetes(resource: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the resource breaks Kubernetes' schema, or has a key that is not in it.
    """
    if problem := _problem(json.dumps(resource, sort_keys=True)):
        raise ValueError(problem)


@cache
def _problem(resource: str) -> str:
    try:
        kubernetes_validate.validate(json.loads(resource), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    return ""


def _pod_template(template: dict[str, Any]) -> dict[str, Any]:
    check_kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "template": template})
    assert template["spec"]["containers"], "a pod without a container"
    return template


def _service(service: dict[str, Any]) -> dict[str, Any]:
    check_kubernetes({"apiVersion": "v1", "kind": "Service"} | service)
    return service


def _container_part(part: dict[str, Any]) -> dict[str, Any]:
    """Fields of a container, as one."""
    container = {"name": "autoscaler", "image": "any"} | part
    _pod_template({"spec": {"containers": [container]}})
    return part


PodTemplate = Annotated[dict[str, Any], AfterValidator(_pod_template)]
Service = Annotated[dict[str, Any], AfterValidator(_service)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(Strict):
    enableK8sTokenAuth: bool | None = None
    secretName: str | None = None
    mode: Literal["disabled", "token"] | None = None


class AutoscalerOptions(Strict):
    resources: dict[str, Any] | None = None
    image: str | None = None
    imagePullPolicy: str | None = None
    securityContext: dict[str, Any] | None = None
    idleTimeoutSeconds: int | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    version: Literal["v1", "v2"] | None = None
    env: list[dict[str, Any]] | None = None
    envFrom: list[dict[str, Any]] | None = None
    volumeMounts: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _kubernetes_takes_the_container(self) -> AutoscalerOptions:
        names = {"resources", "image", "imagePullPolicy", "securityContext", "env", "envFrom", "volumeMounts"}
        _container_part(self.model_dump(include=names, exclude_none=True))
        return self


class Credential(Strict):
    value: str | None = None
    valueFrom: dict[str, Any] | None = None


class FaultTolerance(Strict):
    redisAddress: str
    redisUsername: Credential | None = None
    redisPassword: Credential | None = None
    externalStorageNamespace: str | None = None


class Group(Strict):
    template: PodTemplate
    rayStartParams: Strings
    resources: Strings | None = None
    labels: Strings | None = None

    @model_validator(mode="after")
    def _each_thing_is_said_once(self) -> Group:
        """What the operator refuses beyond its schema."""
        if "labels" in self.rayStartParams:
            raise ValueError("rayStartParams.labels: use labels of the group")
        said_twice = {"num-cpus", "num-gpus", "memory", "resources"} & set(self.rayStartParams)
        if self.resources and said_twice:
            raise ValueError(f"resources and rayStartParams.{said_twice.pop()}: use one of them")
        return self


class HeadGroup(Group):
    headService: Service | None = None
    enableIngress: bool | None = None
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] | None = None


class ScaleStrategy(Strict):
    workersToDelete: list[str] | None = None


class WorkerGroup(Group):
    groupName: str
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)
    replicas: int | None = Field(None, ge=0)
    suspend: bool | None = None
    idleTimeoutSeconds: int | None = None
    scaleStrategy: ScaleStrategy | None = None
    numOfHosts: int | None = Field(None, ge=1)


class ClusterUpgrade(Strict):
    type: Literal["Recreate", "None"] | None = None


class RayClusterSpec(Strict):
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []
    rayVersion: str | None = None
    enableInTreeAutoscaling: bool | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    upgradeStrategy: ClusterUpgrade | None = None
    authOptions: AuthOptions | None = None
    suspend: bool | None = None
    managedBy: Manager | None = None
    headServiceAnnotations: Strings | None = None
    gcsFaultToleranceOptions: FaultTolerance | None = None


class SubmitterConfig(Strict):
    backoffLimit: int | None = None


class RayJobSpec(Strict):
    rayClusterSpec: RayClusterSpec | None = None
    entrypoint: str | None = None
    activeDeadlineSeconds: int | None = Field(None, ge=1)
    backoffLimit: int | None = Field(None, ge=0)
    submitterPodTemplate: PodTemplate | None = None
    metadata: Strings | None = None
    clusterSelector: Strings | None = None
    submitterConfig: SubmitterConfig | None = None
    managedBy: Manager | None = None
    deletionStrategy: dict[str, Any] | None = None
    runtimeEnvYAML: str | None = None
    jobId: str | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] | None = None
    entrypointResources: str | None = None
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    ttlSecondsAfterFinished: int | None = None
    preRunningDeadlineSeconds: int | None = Field(None, ge=1)
    shutdownAfterJobFinishes: bool | None = None
    suspend: bool | None = None

    @model_validator(mode="after")
    def _lives_on_only_to_be_shut_down(self) -> RayJobSpec:
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        return self


class UpgradeOptions(Strict):
    maxSurgePercent: int | None = None
    stepSizePercent: int | None = None
    intervalSeconds: int | None = None
    gatewayClassName: str | None = None


class ServiceUpgrade(Strict):
    type: Literal["NewClusterWithIncrementalUpgrade", "NewCluster", "None"] | None = None
    clusterUpgradeOptions: UpgradeOptions | None = None


class RayServiceSpec(Strict):
    rayClusterConfig: RayClusterSpec
    serveConfigV2: str | None = None
    rayClusterDeletionDelaySeconds: int | None = Field(None, ge=0)
    serveService: Service | None = None
    upgradeStrategy: ServiceUpgrade | None = None
    managedBy: Manager | None = None
    excludeHeadPodFromServeSvc: bool | None = None


class Metadata(Strict):
    name: str = Field(pattern=r"^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$")
    namespace: str | None = None
    labels: Strings | None = None
    annotations: Strings | None = None


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec
