"""Name service: names of the mesh are answered here, all others by the resolver the pod asked."""
