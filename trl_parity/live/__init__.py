"""While training runs: the callback, the monitor and the pipeline they share."""
