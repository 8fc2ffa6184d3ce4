"""One thin process before several replicas on this machine."""
