"""The project's images without a daemon or a registry: `hack/images.toml` becomes OCI images and the Dockerfile."""
