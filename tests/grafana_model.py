"""Reads dashboards into the model of Grafana Labs' own SDK and writes them again: what the model does not have is lost, and is printed."""

import json
import sys

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard


def lost(before, after, path):
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key in after:
                yield from lost(value, after[key], f"{path}.{key}")
            else:
                yield f"{path}.{key} is not in the model"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for n, (one, other) in enumerate(zip(before, after)):
            yield from lost(one, other, f"{path}[{n}]")
    elif before != after:
        yield f"{path}: {before!r} is {after!r} in the model"


register_default_plugins()
for file in sys.argv[1:]:
    with open(file) as opened:
        dashboard = json.load(opened)
    written = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    for problem in lost(dashboard, written, ""):
        print(f"{file}: {problem}")
