"""The deploy files name what is there: options of `volcast serve`, routes, paths, and the size of /dev/shm."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from volcast.runtime.artifact import read_artifact
from volcast.triton_repo.cli import serve
from volcast.triton_repo.gateway.application import Application
from volcast.triton_repo.gateway.keys import read_keys
from volcast.triton_repo.gateway.settings import Limits

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "triton_repo" / "deploy"
CHART = DEPLOY / "helm" / "volcast"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
DEPLOYMENT = (CHART / "templates" / "deployment.yaml").read_text()


def options() -> dict[str, Any]:
    """Of `volcast serve`: the default by the option's name."""
    app = typer.Typer()
    app.command()(serve)
    command: Any = typer.main.get_command(app)
    return {name: one.default for one in command.params for name in one.opts}


def shared_memory_mib(instances: int, voxels: int) -> int:
    """docs/deploy.md: 2 x instances x (input + output), an image and a volume of float32."""
    volume = -(-4 * voxels // 2**20)
    return 2 * instances * (volume + volume)


def words(command: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in command if word.startswith("--")]


def test_the_options_are_those_of_serve() -> None:
    known = options()
    (arguments,) = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    used = words(json.loads(arguments))
    for service in COMPOSE["services"].values():
        used += words(service["command"])
    used += re.findall(r"- (--[a-z-]+)=", DEPLOYMENT)
    assert len(used) > 20 and set(used) <= set(known), set(used) - set(known)
    assert f"EXPOSE {known['--port']}\n" in DOCKERFILE
    assert f"containerPort: {known['--port']}\n" in DEPLOYMENT
    for value, option in {
        "engine": "--engine", "threads": "--threads", "active": "--active", "queue": "--queue", "drain": "--drain",
        "rate": "--rate", "concurrency": "--concurrency", "maxVoxels": "--max-voxels", "storeMib": "--store-mib",
        "maxFileMib": "--max-file-mib", "heldMib": "--held-mib",
    }.items():  # fmt: skip
        assert VALUES["serve"][value] == known[option], value


def test_a_probe_asks_for_a_route_of_the_gateway(gaussian: Path) -> None:
    application = Application(read_artifact(gaussian), "g", grpc="127.0.0.1:1", triton_metrics=None)
    routes = {getattr(route, "path", "") for route in application._front._app.routes}  # type: ignore[attr-defined]
    asked = set(re.findall(r"/health/\w+", DOCKERFILE + DEPLOYMENT))
    assert asked == {"/health/live", "/health/ready"} and asked <= routes
    assert VALUES["podAnnotations"]["prometheus.io/path"] in routes


def test_what_the_dockerfile_copies_is_there() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [
        word
        for line in re.findall(r"^COPY (?!--)(.*)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
    ]
    assert {f"!{path}" for path in copied} == {line for line in ignored if line.startswith("!")}
    assert all((ROOT / path).exists() for path in copied)
    # The package's folders are links out of src.
    linked = {path.resolve().name for path in (ROOT / "src" / "volcast").iterdir() if path.is_symlink()}
    assert linked <= set(copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"^ARG EXTRAS=(.*)$", DOCKERFILE, re.MULTILINE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (tag,) = re.findall(r"^ARG TRITON=(.*)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"\d\d\.\d\d-py3", tag)
    build = COMPOSE["services"]["volcast"]["build"]
    assert build["args"]["TRITON"] == f"${{TRITON:-{tag}}}" and (ROOT / build["dockerfile"]).is_file()
    assert (DEPLOY / build["context"]).resolve() == ROOT


def test_shared_memory_has_the_documented_size() -> None:
    wanted = shared_memory_mib(1, Limits().voxels)
    assert COMPOSE["services"]["volcast"]["shm_size"] == f"{wanted}m"
    assert f"= {wanted} MiB" in (ROOT / "docs" / "deploy.md").read_text()


def test_the_memory_requested_is_the_documented_sum() -> None:
    serve, shm = VALUES["serve"], shared_memory_mib(1, VALUES["serve"]["maxVoxels"])
    wanted = VALUES["modelMib"] + serve["storeMib"] + serve["heldMib"] + shm
    text = " ".join((ROOT / "docs" / "deploy.md").read_text().split())
    assert f"= {wanted} MiB, its limit `modelMib` more, {wanted + VALUES['modelMib']} MiB" in text
    limits = Limits()
    assert serve["storeMib"] * 2**20 == limits.store_bytes and serve["heldMib"] * 2**20 == limits.held_bytes
    assert serve["maxFileMib"] * 2**20 == limits.file_bytes
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["serve"]["properties"]
    assert schema["maxFileMib"]["minimum"] * 2**20 == limits.body_bytes


def test_the_container_may_little() -> None:
    service = COMPOSE["services"]["volcast"]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["user"] != "0:0"
    assert "USER 1000:1000" in DOCKERFILE
    for line in ("runAsNonRoot: true", "readOnlyRootFilesystem: true", "allowPrivilegeEscalation: false"):
        assert line in DEPLOYMENT
    # Nothing is served beyond loopback without keys.
    assert "--keys" in words(service["command"]) and COMPOSE["secrets"]["volcast_keys"]
    seconds = int(service["stop_grace_period"].removesuffix("s"))
    assert seconds > 2 * VALUES["serve"]["drain"]


def test_the_chart_uses_each_of_its_values() -> None:
    texts = [path.read_text() for path in (CHART / "templates").iterdir()]
    used = {tuple(path.split(".")) for text in texts for path in re.findall(r"\.Values\.([\w.]+)", text)}

    def leaves(values: dict[str, Any], place: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
        found: set[tuple[str, ...]] = set()
        for key, value in values.items():
            found |= leaves(value, (*place, key)) if isinstance(value, dict) and value else {(*place, key)}
        return found

    for path in used:
        value: Any = VALUES
        for key in path:
            value = value[key]
    for leaf in leaves(VALUES):
        assert any(leaf[: len(path)] == path for path in used), leaf
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(VALUES) == set(schema["properties"]) - {"global"}


def rendered(*more: str) -> list[dict[str, Any]]:
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("helm is not installed")
    command = [helm, "template", "r", str(CHART), "--set", "keys.alice=0123456789abcdef", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def test_helm_renders_the_chart(tmp_path: Path) -> None:
    found = {one["kind"]: one for one in rendered("--set", "gpus=2,autoscaling.enabled=true")}
    assert set(found) == {
        "Deployment", "Service", "Secret", "HorizontalPodAutoscaler", "PodDisruptionBudget",
    }  # fmt: skip
    pod = found["Deployment"]["spec"]["template"]["spec"]
    volumes = {one["name"]: one for one in pod["volumes"]}
    wanted = shared_memory_mib(2, VALUES["serve"]["maxVoxels"])
    assert volumes["shm"]["emptyDir"]["sizeLimit"] == f"{wanted}Mi"
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    held = 2048 + 1024 + 1024 + wanted
    assert container["resources"]["requests"] == {"cpu": "2", "memory": f"{held}Mi"}
    assert container["resources"]["limits"]["memory"] == f"{held + 2048}Mi"
    (own,) = (
        one
        for one in rendered("--set", "resources.limits.memory=9Gi,serve.heldMib=2048")
        if one["kind"] == "Deployment"
    )
    (container,) = own["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "9Gi"} and "--held-mib=2048" in container["args"]
    assert container["resources"]["requests"]["memory"] == f"{2048 + 1024 + 2048 + wanted // 2}Mi"
    assert "replicas" not in found["Deployment"]["spec"]
    # The gateway reads the secret's file as it stands.
    file = tmp_path / "keys"
    file.write_text(found["Secret"]["stringData"]["keys"])
    assert read_keys(file, {}).caller("Bearer 0123456789abcdef") == "alice"
    assert found["Deployment"]["spec"]["selector"]["matchLabels"].items() <= (
        found["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    )
    assert found["Service"]["spec"]["selector"] == found["Deployment"]["spec"]["selector"]["matchLabels"]
