"""A pool of teachers on a Ray cluster; no other room imports Ray.

A pool's life: `config` reads the pool file; `driver` connects to a cluster, or starts a `local_cluster`, and makes
the `keeper`. That holds the wanted `pool_state`: it plans (`planning`, `scaling`) and starts replicas
(`replica_handle`, `nodes`), each of them one of the `actors`, whose teacher `loading` makes. `status_rows` is what an
operator is shown. `launcher` starts a pool from a job of the cluster, for the chart.
"""
