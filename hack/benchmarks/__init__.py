"""What kubepcap costs and how fast it is, measured beside the tools that people use today. `hack/bench` runs these."""
