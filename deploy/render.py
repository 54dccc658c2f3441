"""Renders the Helm chart with Helm's own engine, for clusters that are used without Helm.

    python deploy/render.py                    # writes deploy/kuberay/*.yaml again
    python deploy/render.py --check            # checks whether they are what the chart renders
    python deploy/render.py my-values.yaml     # prints the manifests for your values

Helm's engine comes with the package helm-python-sdk, which is part of the extra `dev`.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parent
CHART = DEPLOY / "helm/schoolhouse"
VARIANTS = ("cpu", "gpu")
_HEAD = """\
# The chart of deploy/helm, rendered with values-{variant}.yaml by `python deploy/render.py`. Do not edit it.
#
#   kubectl apply -f deploy/kuberay/{variant}.yaml
#
# It needs the KubeRay operator, 1.5.1 or newer, in the namespace kuberay-operator, and the image of deploy/docker.
# {traffic}
# The NetworkPolicy admits pods of this namespace that have the label schoolhouse.student=true, if your cluster's
# network enforces such policies.
"""
_TRAFFIC = {
    "cpu": "Traffic is plaintext, and clients need no token.",
    "gpu": "Traffic is TLS, with the certificate in the Secret schoolhouse-tls.",
}


def values(variant: str) -> dict[str, Any]:
    """The values file of a variant: "cpu" or "gpu"."""
    loaded: dict[str, Any] = yaml.safe_load((CHART / f"values-{variant}.yaml").read_text())
    return loaded


def render(given: dict[str, Any]) -> dict[str, str]:
    """Render the chart with these values; returns the text of each template by its name.

    Raises:
        helm_python.HelmError: the values do not fit values.schema.json, or a template fails.
    """
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(given)
        rendered = chart.render(given, name="schoolhouse", namespace="default")
    return {Path(name).stem: text.strip() for name, text in sorted(rendered.items()) if text.strip()}


def manifest(given: dict[str, Any]) -> str:
    """All objects for these values, as one file."""
    parts = {name: text for name, text in render(given).items() if name != "NOTES"}
    return "".join(f"---\n{text}\n" for text in parts.values())


def _head(variant: str) -> str:
    return _HEAD.format(variant=variant, traffic=_TRAFFIC[variant])


def stale(*, write: bool) -> list[str]:
    """The names of committed manifests that differ from what the chart renders; with `write`, writes them again."""
    found = []
    for variant in VARIANTS:
        path, text = DEPLOY / f"kuberay/{variant}.yaml", _head(variant) + manifest(values(variant))
        if not path.exists() or path.read_text() != text:
            found.append(path.name)
            if write:
                path.write_text(text)
    return found


def main(arguments: list[str]) -> int:
    """Do what these arguments say (see above); returns the exit status."""
    if arguments and arguments != ["--check"]:
        sys.stdout.write(manifest(yaml.safe_load(Path(arguments[0]).read_text())))
        return 0
    found = stale(write=not arguments)
    if arguments and found:
        sys.stderr.write(f"deploy/kuberay differs from the rendered chart: {', '.join(found)}; run deploy/render.py\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
