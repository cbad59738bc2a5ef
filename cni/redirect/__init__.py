"""Traffic redirection inside a pod's network namespace."""
