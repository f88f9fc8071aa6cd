"""What makes a process of it: loop, signals, drain, systemd, logs."""
