"""A real Kubernetes on one Linux machine, for development and tests: no Docker, no registry, no systemd.

Each machine of a cluster (the control plane and its nodes) is a set of private mount, net, pid, uts and ipc namespaces.
A keeper process owns them all: when it ends, however it ends, every process, mount, network namespace, interface and
cgroup of the cluster goes with it. Nothing else of the host changes.
"""
