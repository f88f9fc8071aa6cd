# The picture of Prometheus' graphs; included by the Makefile.

.PHONY: screenshots-prometheus

screenshots: screenshots-prometheus

screenshots-prometheus: $(VENV)/.dev ## the graphs of a real Prometheus through an outage of a server (make test-tools; two minutes)
	@command -v prometheus >/dev/null || apt-get install --quiet --yes --no-install-recommends prometheus
	@$(BIN)/python tests/prometheus/graphs.py
