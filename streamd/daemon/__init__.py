"""The daemon's processes: parent and workers, signals, drain, systemd, logs."""
