"""A reward server over TLS, with a certificate made here: who trusts it is answered, and nobody holds it up."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess

import numpy as np
import pytest

from marble_jax.cli.reward_serve import _tls
from marble_jax.errors import InputError
from marble_jax.rewards.http.connections import ServerOptions
from marble_jax.rewards.http.server import RewardServer
from marble_jax.rewards.registry import load_rewards

TOKEN = "a-token-of-some-length"
IMAGES = np.linspace(0, 1, 2 * 8 * 8 * 3, dtype=np.float32).reshape(2, 8, 8, 3)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate, key) of 127.0.0.1, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(command, check=True, capture_output=True)
    return files


@pytest.fixture
def server(certificate, tmp_path):
    (tmp_path / "rewards.json").write_text(json.dumps({"bright": {"kind": "brightness"}}))
    options = ServerOptions(token=TOKEN, tls=_tls(*map(str, certificate)), header_seconds=2)
    with RewardServer(load_rewards(tmp_path, ["bright"]), options=options) as running:
        yield running


def client(tmp_path, monkeypatch, url, **options):
    monkeypatch.setenv("TLS_TEST_TOKEN", TOKEN)
    entry = {"kind": "remote", "urls": [url], "reward": "bright", "token_env": "TLS_TEST_TOKEN"}
    entry |= {"retries": 0, "timeout": 10, "patience": 0} | options
    folder = tmp_path / "client"
    folder.mkdir(exist_ok=True)
    (folder / "rewards.json").write_text(json.dumps({"mine": entry}))
    (reward,) = load_rewards(folder, ["mine"])
    return reward


def score(reward):
    return reward.score(None, IMAGES, ["a", "b"], [{}, {}])


def test_who_trusts_the_certificate_is_answered(server, certificate, tmp_path, monkeypatch):
    assert server.url.startswith("https://127.0.0.1:")
    reward = client(tmp_path, monkeypatch, server.url, ca_file=str(certificate[0]))
    values, valid = score(reward)[:2]
    (direct,) = load_rewards(tmp_path, ["bright"])
    expected = score(direct)[0]
    assert valid.all()
    # Sent as 8 bits.
    np.testing.assert_allclose(values, expected, atol=1 / 255)


def test_who_does_not_trust_it_sends_no_token(server, tmp_path, monkeypatch):
    with pytest.raises(Exception, match="(?i)certificate"):
        score(client(tmp_path, monkeypatch, server.url))


def test_clients_that_do_not_speak_tls_hold_nobody_up(server, certificate, tmp_path, monkeypatch):
    address = server.server_address[:2]
    silent = [socket.create_connection(address) for _ in range(20)]
    plain = http.client.HTTPConnection(*address, timeout=10)
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.request("GET", "/health")
        plain.getresponse()
    reward = client(tmp_path, monkeypatch, server.url, ca_file=str(certificate[0]))
    assert score(reward)[1].all()
    for connection in silent:
        connection.close()


def test_certificates_that_are_none(certificate, tmp_path):
    cert, key = map(str, certificate)
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    encrypted = tmp_path / "encrypted.pem"
    command = ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret"]
    subprocess.run([*command, "-out", str(encrypted)], check=True, capture_output=True)
    assert _tls("", "") is None
    for one in ((cert, ""), ("", key)):
        with pytest.raises(InputError, match="expected --tls_cert and --tls_key; received one"):
            _tls(*one)
    for two in (
        (str(text), key),
        (cert, str(text)),
        (cert, cert),
        (cert, str(encrypted)),
        ("/nowhere", key),
    ):
        with pytest.raises(InputError, match="expected a certificate with its key in PEM"):
            _tls(*two)
