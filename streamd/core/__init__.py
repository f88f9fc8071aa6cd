"""The domain: streams, subscribers, logs, budgets. No sockets; time comes in as an argument."""
