"""launch/kubernetes.yaml: against the published schema, and what no schema sees.

No cluster is asked. The schema knows the fields and their types; which values they may
have, and what has to agree with what, is checked one by one.
"""

import re
import signal
from pathlib import Path

import pytest
import yaml
from absl import flags

import alexnet_jax.main  # noqa: F401  (defines the flags)
from configs import paper

try:
    import kubernetes_validate
except ImportError:
    kubernetes_validate = None

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "launch" / "kubernetes.yaml").read_text()
OLDEST = "1.29"  # which the file's first line promises
# What a Service's name and a hostname must be: a label of the DNS (RFC 1123).
DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"

needs_schemas = pytest.mark.skipif(
    kubernetes_validate is None,
    reason="kubernetes-validate, which has the schemas, is not installed (extra: dev)",
)


class Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, as the cluster does and PyYAML does not."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if len(keys) > len(set(keys)):
            raise yaml.YAMLError(f"a key is there twice, {node.start_mark}: {keys}")
        return super().construct_mapping(node, deep)


def load(text=TEXT):
    return {document["kind"]: document for document in yaml.load_all(text, Loader)}


def trainer_of(documents):
    (container,) = documents["Job"]["spec"]["template"]["spec"]["containers"]
    return container


def flags_of(documents):
    """The trainer's "--name=value", as a dict."""
    args = trainer_of(documents)["args"]
    pairs = [re.fullmatch(r"--([\w.]+)=(.+)", arg).groups() for arg in args]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.fixture
def service():
    return load()["Service"]


@pytest.fixture
def job():
    return load()["Job"]


@pytest.fixture
def pod(job):
    return job["spec"]["template"]["spec"]


@pytest.fixture
def trainer():
    return trainer_of(load())


@pytest.fixture
def given():
    return flags_of(load())


def test_a_service_and_a_job():
    kinds = [document["kind"] for document in yaml.load_all(TEXT, Loader)]
    assert sorted(kinds) == ["Job", "Service"]
    assert f"Kubernetes {OLDEST} or newer" in TEXT.splitlines()[0]
    with pytest.raises(yaml.YAMLError, match="twice"):
        load(TEXT.replace("completionMode:", "parallelism:"))


# The schema. Strict: a field that it does not know is an error.


def validate(documents, version):
    version = version or kubernetes_validate.latest_version()
    for document in documents.values():
        kubernetes_validate.validate(document, version, strict=True)


@needs_schemas
@pytest.mark.parametrize("version", [OLDEST, None], ids=["oldest", "newest"])
def test_schema(version):
    validate(load(), version)


@needs_schemas
@pytest.mark.parametrize("version", [OLDEST, None], ids=["oldest", "newest"])
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("publishNotReadyAddresses: true", "publishNotReadyAddress: true"),
        ("completionMode: Indexed", "completionMod: Indexed"),
        ("onPodConditions:", "onPodCondition:"),
        ("terminationGracePeriodSeconds: 300", "terminationGraceSeconds: 300"),
        ("valueFrom:", "valueOf:"),
        ("sizeLimit: 2Gi", "size: 2Gi"),
        ("backoffLimitPerIndex: 10", "backoffLimitPerIndex: ten"),
        ('status: "True"', "status: True"),
        ("apiVersion: batch/v1", "apiVersion: batch/v2"),
    ],
)
def test_mistakes_are_refused(right, wrong, version):
    assert TEXT.count(right) == 1
    with pytest.raises(
        (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError)
    ):
        validate(load(TEXT.replace(right, wrong)), version)


# What has to agree.


def test_service_finds_the_pods(service, job, pod):
    name = job["metadata"]["name"]
    # The Job controller's own labels (1.27 on), which the template does not have.
    added = {"batch.kubernetes.io/job-name": name, "job-name": name}
    labels = added | job["spec"]["template"].get("metadata", {}).get("labels", {})
    assert service["spec"]["selector"]
    assert service["spec"]["selector"].items() <= labels.items()
    # Without both the pods' names are not in the DNS, or not while they start.
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert pod["subdomain"] == service["metadata"]["name"]
    assert "hostname" not in pod  # the Job's: its name and the index
    last = job["spec"]["completions"] - 1
    for label in (service["metadata"]["name"], f"{name}-{last}"):
        assert re.fullmatch(DNS_LABEL, label)


def test_coordinator_is_the_first_pod(service, job, trainer, given):
    host, port = given["coordinator_address"].split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    (listed,) = service["spec"]["ports"]
    (opened,) = trainer["ports"]
    assert listed["port"] == opened["containerPort"] == int(port)


def test_every_process_is_a_pod(job, given):
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    # All at once, since each waits for the others.
    assert spec["completions"] == spec["parallelism"] == int(given["num_processes"])


def test_process_id_is_the_index(trainer, given):
    (name,) = re.fullmatch(r"\$\((\w+)\)", given["process_id"]).groups()
    (source,) = [env["valueFrom"] for env in trainer["env"] if env["name"] == name]
    path = source["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    # What is not in env would reach the program as it is written.
    known = {env["name"] for env in trainer["env"]}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(trainer["args"]))) <= known


def test_flags_are_those_of_the_program(trainer, given):
    assert trainer["command"] == ["python", "-m", "alexnet_jax.main"]
    assert given.pop("config") == "configs/paper.py"
    fields = flatten(paper.get_config().to_dict())
    for name, value in given.items():
        if name.startswith("config."):
            field = fields[name.removeprefix("config.")]
            type(field)(value)  # raises if it is not one
        elif name != "process_id":  # known in the pod only
            flags.FLAGS[name].parser.parse(value)  # raises if it may not have it
        assert name.startswith("config.") or name in flags.FLAGS


def flatten(tree, prefix=""):
    flat = {}
    for name, value in tree.items():
        inner = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def test_pods_meet_whatever_their_delays(given):
    # The longest delay of the Job controller is 10 minutes. Pods that wait for each
    # other for longer than that overlap, whenever each of them starts.
    assert int(given["connect_seconds"]) > 600


def test_folders_are_mounted(pod, trainer, given):
    mounts = {mount["mountPath"]: mount for mount in trainer["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    assert not mounts["/runs"].get("readOnly")
    assert given["workdir"].startswith("/runs/")
    assert mounts["/data"]["readOnly"] is True
    assert given["config.data.dir"] == "/data"
    for path in ("/runs", "/data"):
        assert "persistentVolumeClaim" in volumes[mounts[path]["name"]]
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"


def test_placeholders_are_obvious(pod, trainer):
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    for name in (trainer["image"], trainer["workingDir"], *claims):
        assert "change-me" in name


# What the cluster refuses, or silently does otherwise, for values that the schema takes.


def test_failures(job, pod, trainer):
    spec = job["spec"]
    # Both podFailurePolicy and backoffLimitPerIndex ask for it.
    assert pod["restartPolicy"] == "Never"
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["backoffLimitPerIndex"] > 0
    # An index that is given up ends the job: the others cannot go on without it.
    assert spec["maxFailedIndexes"] == 0
    evicted, stopped = spec["podFailurePolicy"]["rules"]
    assert evicted["action"] == stopped["action"] == "Ignore"
    assert evicted["onPodConditions"] == [
        {"type": "DisruptionTarget", "status": "True"}
    ]
    codes = stopped["onExitCodes"]
    assert codes["containerName"] == trainer["name"]
    assert codes["operator"] == "In"
    # What the trainer exits with after SIGTERM.
    assert codes["values"] == [128 + signal.SIGTERM]


def test_a_gpu_is_asked_for(trainer):
    # Of such resources requests may be left out, and else must equal the limits.
    gpus = trainer["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus >= 1
    assert trainer["resources"]["requests"].get("nvidia.com/gpu", gpus) == gpus
