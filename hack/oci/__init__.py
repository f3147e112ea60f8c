"""The project's images without a daemon and without a registry: `hack/images.toml` becomes OCI layers, manifests and the Dockerfile."""
