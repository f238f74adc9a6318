"""Renders the chart with Helm's own engine, validates it, and writes what is derived from it; `--check` compares instead of writing.

Derived: the chart's README from the comments of values.yaml, snapshots of every file in ci/, and the plain manifests. `cargo xtask chart`
and the test `chart` run it.
"""

import json
import logging
import pathlib
import sys
import tomllib

import kubernetes_validate
import yaml
from helm_python.chart import Chart, lint
from helm_python.errors import HelmError

HERE = pathlib.Path(__file__).resolve().parent
CHART = HERE / "gpu-sampler"
MANIFESTS = HERE.parent / "kubernetes"
# The oldest, a middle and the newest version that the schemas have and the chart supports.
VERSIONS = ["1.30", "1.32", "1.34", "1.37"]
# Kinds of other projects, which the schemas of Kubernetes do not have: only their shape is checked, below.
FOREIGN = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "SecurityContextConstraints"}
# Sets of values for newer versions alone: resource.k8s.io/v1.
SINCE = {"dra": (1, 34)}
# Values that are refused, and what the message names.
REFUSED = [
    ({"web": {"prot": 1}}, "prot"),
    ({"web": {"port": "9836"}}, "port"),
    ({"gpu": {"access": "all"}}, "access"),
    ({"image": {"digest": "latest"}}, "digest"),
    ({"tolerations": {}}, "tolerations"),
    ({"web": {"openMetrics": False}}, "set tokenSecret or configSecret"),
    ({"web": {"tls": True}}, "set web.configSecret"),
    ({"gpu": {"access": "host"}}, "needs privileged: true"),
    ({"monitoring": {"serviceMonitor": True, "podMonitor": True}}, "scraped twice"),
    ({"hostNetwork": True, "networkPolicy": {"create": True}}, "has no effect"),
    ({"service": {"create": False}, "monitoring": {"serviceMonitor": True}}, "needs service.create: true"),
    ({"config": {"listen": "[::]:9836"}}, "config.listen has no effect"),
    ({"web": {"openMetrics": False, "tokenSecret": "t"}, "monitoring": {"podMonitor": True}}, "scrapes need authorization"),
    ({"web": {"configSecret": "w", "tls": True}, "monitoring": {"podMonitor": True}}, "web.tls needs tlsConfig"),
    ({"monitoring": {"podMonitor": True, "endpoint": {"interval": "5s"}}}, "endpoint.interval is set by the chart"),
]

problems = []


def problem(text):
    problems.append(text)


def with_floats(value):
    """Helm reads the numbers of values files as floats."""
    if isinstance(value, dict):
        return {key: with_floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_floats(inner) for inner in value]
    return float(value) if type(value) is int else value


def check_config(rendered, config, what):
    """Numbers of the configuration file are as they were given."""
    for text in (text for path, text in rendered.items() if path.endswith("/configmap.yaml") and text.strip()):
        written = tomllib.loads(yaml.safe_load(text)["data"]["config.toml"])
        if json.dumps(written) != json.dumps(config):
            problem(f"{what}: config.toml has {written}, not {config}")


def render(values, what):
    rendered = Chart.load(CHART).render(values, name="gpu-sampler", namespace="gpu-sampler")
    for path in sorted(rendered):
        if not path.endswith(".yaml"):
            continue
        for document in yaml.safe_load_all(rendered[path]):
            if document:
                check(document, what)
    return rendered


def check(document, what):
    kind = document["kind"]
    name = f"{what}: {kind} {document['metadata']['name']}"
    if kind in FOREIGN:
        check_foreign(document, name)
        return
    for version in VERSIONS:
        if tuple(map(int, version.split("."))) < SINCE.get(what, (0, 0)):
            continue
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except Exception as error:
            problem(f"{name} in Kubernetes {version}: {getattr(error, 'message', error)}")


def check_foreign(document, name):
    kind, spec = document["kind"], document.get("spec", {})
    endpoints = spec.get("endpoints", []) + spec.get("podMetricsEndpoints", [])
    if kind.endswith("Monitor"):
        if not endpoints or not spec["selector"]["matchLabels"]:
            problem(f"{name} selects nothing")
        for endpoint in endpoints:
            if endpoint.get("honorLabels") is not True or endpoint.get("port") != "metrics":
                problem(f"{name}: {endpoint}")
    elif kind == "PrometheusRule":
        groups = spec["groups"]
        alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
        if len(alerts) < 10 or not all("expr" in rule for group in groups for rule in group["rules"]):
            problem(f"{name} has {len(alerts)} alerts")
        for alert in alerts:
            if not alert["annotations"]["runbook_url"].startswith("https://runbooks.example.com/docs/runbooks/"):
                problem(f"{name}: {alert['annotations']['runbook_url']}")
    elif document["allowHostPID"] is not True or not document["users"]:
        problem(f"{name} does not allow what the agent needs")


def text_of(rendered):
    """All objects as one file, without the dashboards, whose source is deploy/grafana."""
    paths = [path for path in sorted(rendered) if path.endswith(".yaml") and not path.endswith("/dashboards.yaml")]
    parts = []
    for path in paths:
        for part in rendered[path].split("\n---\n"):
            lines = [line.rstrip() for line in part.removeprefix("---\n").strip().splitlines()]
            if lines:
                parts.append("\n".join(lines))
    return "---\n" + "\n---\n".join(parts) + "\n"


def values_table():
    """One row for each `# --` comment of values.yaml."""
    rows, path, comment = [], [], None
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    for line in (CHART / "values.yaml").read_text().splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            comment = stripped[5:]
        elif stripped.startswith("#") and comment is not None:
            comment += " " + stripped[1:].strip()
        elif ":" in stripped and not stripped.startswith("-"):
            depth = (len(line) - len(line.lstrip())) // 2
            path = path[:depth] + [stripped.split(":")[0]]
            if comment is not None:
                value = defaults
                for key in path:
                    value = value[key]
                rows.append((".".join(path), json.dumps(value), comment))
            comment = None
    documented = {row[0] for row in rows}
    for key in undocumented(defaults, "", documented):
        problem(f"values.yaml: {key} has no comment")
    lines = ["| value | default | meaning |", "|---|---|---|"]
    lines += [f"| `{key}` | `{default}` | {meaning} |" for key, default, meaning in rows]
    return "\n".join(lines)


def undocumented(values, prefix, documented):
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path in documented:
            continue
        if isinstance(value, dict) and value:
            yield from undocumented(value, f"{path}.", documented)
        else:
            yield path


def main():
    logging.disable(logging.INFO)
    check_only = "--check" in sys.argv[1:]
    files = {}
    for values in sorted((CHART / "ci").glob("*-values.yaml")):
        name = values.name.removesuffix("-values.yaml")
        given = yaml.safe_load(values.read_text())
        rendered = render(given, name)
        config = dict(sorted(given.get("config", {}).items()))
        check_config(rendered, config, name)
        check_config(render(given | {"config": with_floats(config)}, name), config, name)
        files[HERE / "snapshots" / f"{name}.yaml"] = text_of(rendered)
        if name in ("default", "privileged"):
            head = f"# Rendered from deploy/helm/gpu-sampler with ci/{values.name} by `cargo xtask chart`: change the chart.\n"
            namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "gpu-sampler"}}
            namespace["metadata"]["labels"] = {"pod-security.kubernetes.io/enforce": "privileged"}
            suffix = "" if name == "default" else f"-{name}"
            text = text_of(rendered).replace("app.kubernetes.io/managed-by: Helm", "app.kubernetes.io/managed-by: kubectl")
            text = "".join(line for line in text.splitlines(True) if "helm.sh/chart:" not in line)
            files[MANIFESTS / f"gpu-sampler{suffix}.yaml"] = head + "---\n" + yaml.safe_dump(namespace) + text
    template = (HERE / "README.md.in").read_text()
    files[CHART / "README.md"] = template.replace("@VALUES@", values_table())
    for values, expected in REFUSED:
        try:
            Chart.load(CHART).render(values, name="gpu-sampler", namespace="gpu-sampler")
            problem(f"{values} is not refused")
        except HelmError as error:
            if expected not in str(error):
                problem(f"{values}: {error}")
    for message in lint(CHART)["messages"]:
        # 1 is information, 2 a warning, 3 an error.
        if message["severity"] > 1:
            problem(f"helm lint: {message}")
    for path, text in files.items():
        shown = path.relative_to(HERE.parent.parent)
        if not check_only:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            problem(f"{shown} differs from what the chart renders: run `cargo xtask chart`")
    if check_only:
        for path in [*(HERE / "snapshots").glob("*.yaml"), *MANIFESTS.glob("*.yaml")]:
            if path not in files:
                problem(f"{path.relative_to(HERE.parent.parent)} is not made by the chart any more: remove it")
    for text in problems:
        print(text, file=sys.stderr)
    if problems:
        sys.exit(1)
    print(f"{len(files)} files, {len(REFUSED)} refused values, Kubernetes {', '.join(VERSIONS)}")


main()
