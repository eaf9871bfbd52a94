"""RAPID on Ray Serve: configuration, deployments, HTTP and the command line. No algorithm lives here."""
