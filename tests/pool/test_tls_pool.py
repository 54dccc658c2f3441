"""A pool on a real Ray cluster whose directory, replicas and page speak TLS, and want certificates of who asks."""

import pytest
import schoolhouse as sh
import torch
from authority import fetched, ours
from models import Net
from schoolhouse import errors

pytest.importorskip("ray")
pytestmark = pytest.mark.ray


def test_a_pool_of_mutual_tls(cluster, tmp_path, monkeypatch):
    from schoolhouse_server.pool import config
    from schoolhouse_server.pool.driver import launch

    for name in ("server.pem", "server-key.pem", "ca.pem"):
        (tmp_path / name).write_bytes((ours().folder / name).read_bytes())
    (tmp_path / "pool.yaml").write_text(
        "port: 0\nhttp_port: 0\n"
        "security: {tls: {cert: server.pem, key: server-key.pem, client_ca: ca.pem}}\n"
        "teachers: {net: {build: 'models:Net', kwargs: {width: 32, seed: 1}, threads: 1, resources: {num_cpus: 0.5}}}\n"
    )
    pool = launch(config.load_pool(tmp_path / "pool.yaml"))
    try:
        pool.wait(120)
        url, x = pool.url("net"), torch.randn(3, 8)
        assert url.startswith("grpcs://127.0.0.1:")
        with sh.connect(url, security=sh.Security(**ours().client())) as teacher:
            assert torch.equal(teacher.submit((x,), {}, [""]).result(60)[""], Net(32, seed=1)(x))
        for name in ("_STEP_TIMEOUT_S", "_TIMEOUT_S"):  # a slow machine's handshake says why, too
            monkeypatch.setattr(f"schoolhouse.remote.handshake.{name}", 20.0)
        with pytest.raises(errors.AuthenticationError, match="requires a certificate"):
            sh.connect(url, security=sh.Security(ca=ours().ca), timeouts=sh.Timeouts(connect_s=0.5))
        assert pool.page.startswith("https://")
        assert fetched(pool.page, **ours().client()) == 200
    finally:
        pool.down()
