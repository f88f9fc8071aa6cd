"""OpenTelemetry: spans and metrics for a collector, by OTLP. Imported only where `otlp_endpoint` is set."""
