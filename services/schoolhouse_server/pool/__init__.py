"""A pool of teachers on a Ray cluster; no other room imports Ray.

How a pool comes to life: `config` reads the pool file; `driver` connects to a cluster, or to a `local_cluster` that it
starts, and starts the `keeper`. The keeper holds the wanted state (`pool_state`), plans (`planning`, `scaling`), and
starts and stops replicas (`replica_handle`, `nodes`). Each replica is one of the `actors`, and `loading` builds its
teacher. `status_rows` makes the tables that an operator sees. `launcher` starts a pool from a job inside the cluster,
for the Helm chart.
"""
