"""What every program of the project needs of Kubernetes: client, caches, certificates, serving."""
