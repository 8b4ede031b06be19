"""What to watch a server with: a Grafana dashboard over the metrics of `lorasrv.metrics`."""
