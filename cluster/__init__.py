"""The placement of the service on machines, as plain data: no Ray, no Kubernetes client."""
