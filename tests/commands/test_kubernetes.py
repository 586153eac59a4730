"""launch/kubernetes.yaml: the published schema, and values that must agree; no cluster."""

import re
import signal
from pathlib import Path

import pytest
import yaml

from alexnet_jax.training.config import flat
from configs import paper

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "launch" / "kubernetes.yaml").read_text()
OLDEST = "1.29"  # which the file's first line promises
DOCUMENTS = {document["kind"]: document for document in yaml.safe_load_all(TEXT)}
SERVICE, JOB = DOCUMENTS["Service"], DOCUMENTS["Job"]["spec"]
NAME = DOCUMENTS["Job"]["metadata"]["name"]
POD = JOB["template"]["spec"]
(TRAINER,) = POD["containers"]
FLAGS = dict(re.fullmatch(r"--([\w.]+)=(.+)", arg).groups() for arg in TRAINER["args"])


@pytest.mark.parametrize("version", [OLDEST, None], ids=["oldest", "newest"])
def test_schema_holds(version):
    validate = pytest.importorskip(
        "kubernetes_validate", reason="the schemas are not installed (extra: dev)"
    )
    assert f"Kubernetes {OLDEST} or newer" in TEXT.splitlines()[0]
    assert sorted(DOCUMENTS) == ["Job", "Service"]
    for document in DOCUMENTS.values():
        version = version or validate.latest_version()
        validate.validate(document, version, strict=True)


def test_every_pod_finds_the_first():
    host, port = FLAGS["coordinator_address"].split(":")
    assert host == f"{NAME}-0.{SERVICE['metadata']['name']}"
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    # The Job controller adds this label.
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": NAME}
    # Without both the pods' names are not in the DNS, or not while they start.
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["publishNotReadyAddresses"] is True
    assert SERVICE["spec"]["ports"][0]["port"] == int(port)
    assert TRAINER["ports"][0]["containerPort"] == int(port)
    # Pods that wait for each other for longer than the Job controller's longest delay.
    assert int(FLAGS["connect_seconds"]) > 600


def test_every_process_is_a_pod():
    assert JOB["completionMode"] == "Indexed"
    assert JOB["completions"] == JOB["parallelism"] == int(FLAGS["num_processes"])
    (name,) = re.fullmatch(r"\$\((\w+)\)", FLAGS["process_id"]).groups()
    (source,) = [env["valueFrom"] for env in TRAINER["env"] if env["name"] == name]
    path = source["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert TRAINER["resources"]["limits"]["nvidia.com/gpu"] >= 1


def test_command_and_flags_match_the_program():
    assert TRAINER["command"] == ["python", "-m", "alexnet_jax.main"]
    assert FLAGS["config"] == "configs/paper.py"
    fields = {f"config.{name}" for name in flat(paper.get_config().to_dict())}
    assert {name for name in FLAGS if name.startswith("config.")} <= fields
    mounts = {mount["mountPath"]: mount for mount in TRAINER["volumeMounts"]}
    assert FLAGS["workdir"].startswith("/runs/") and FLAGS["config.data.dir"] == "/data"
    assert mounts["/data"]["readOnly"] and not mounts["/runs"].get("readOnly")


def test_a_stopped_pod_is_no_failure():
    # Both podFailurePolicy and backoffLimitPerIndex ask for it.
    assert POD["restartPolicy"] == "Never" and JOB["backoffLimitPerIndex"] > 0
    # An index that is given up ends the job: the others cannot go on without it.
    assert JOB["maxFailedIndexes"] == 0
    evicted, stopped = JOB["podFailurePolicy"]["rules"]
    assert evicted["action"] == stopped["action"] == "Ignore"
    assert stopped["onExitCodes"]["values"] == [128 + signal.SIGTERM]
