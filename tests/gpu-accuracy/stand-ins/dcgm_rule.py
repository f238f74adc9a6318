#!/usr/bin/env python3
"""A stand-in for the attribution rule of dcgm-exporter 4.8, written from its public description. It is not dcgm-exporter.

The rule: the utilization of a GPU as NVML reports it; the utilization of a pod is the sum over its processes of what the driver's process
samples have for them, read as they are from the whole buffer; the pods are those to which the GPU is assigned, and one without such a
sample, or for which the call fails, has 0.

    dcgm_rule.py --port 9400 --assigned containers.json
"""

import argparse
import http.server
import json

import pynvml


def cgroups(pid):
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


class Exporter:
    def __init__(self, assigned):
        pynvml.nvmlInit()
        self.devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        self.assigned = assigned

    def page(self):
        lines = ["# TYPE gpu_util gauge", "# TYPE gpu_energy_millijoules counter", "# TYPE pod_gpu_util gauge"]
        for index, device in enumerate(self.devices):
            labels = f'gpu="{index}"'
            for name, read in (
                ("gpu_util", lambda device: pynvml.nvmlDeviceGetUtilizationRates(device).gpu),
                ("gpu_energy_millijoules", pynvml.nvmlDeviceGetTotalEnergyConsumption),
            ):
                try:
                    lines.append(f"{name}{{{labels}}} {read(device)}")
                except pynvml.NVMLError:
                    pass
            self.pods(lines, index, device, labels)
        return "\n".join(lines) + "\n"

    def pods(self, lines, index, device, labels):
        try:
            samples = pynvml.nvmlDeviceGetProcessUtilization(device, 0)
        except pynvml.NVMLError:
            samples = []
        samples = [(cgroups(sample.pid), sample.smUtil) for sample in samples]
        for pod in self.assigned:
            if pod["gpu"] == index:
                util = sum(util for cgroup, util in samples if pod["container_id"] in cgroup)
                named = 'namespace="{namespace}",pod="{pod}",container="{container}"'.format(**pod)
                lines.append(f"pod_gpu_util{{{labels},{named}}} {util}")


def main():
    parser = argparse.ArgumentParser(description="A stand-in for the attribution rule of dcgm-exporter")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--assigned", required=True, help="JSON: a list of objects with gpu, namespace, pod, container, container_id")
    arguments = parser.parse_args()
    with open(arguments.assigned, encoding="utf-8") as file:
        exporter = Exporter(json.load(file))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = exporter.page().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    http.server.ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
