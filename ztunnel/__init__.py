"""A node proxy for Kubernetes in ambient mode."""
