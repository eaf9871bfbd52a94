"""Where things run, as plain data: no Ray, no Kubernetes client."""
