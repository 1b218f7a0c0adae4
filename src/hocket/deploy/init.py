"""`hocket deploy init`: everything a named list of sites needs, ready to be handed out.

    OUT/server/   recipe.toml, app/ (what Flower ships: names, no code), certificates and their keys, the sites'
                  public keys, nginx.conf and hocket-server.service
    OUT/sites/NAME/   site.toml, the authority's certificate, the site's own key, hocket-site.service

Private keys are readable by their owner alone. A folder that is there already is left as it is: keys are not replaced.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hocket.errors import StoreError

PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "hocket-app"
version = "1.0.0"
description = "Starts the hocket that is installed on each machine; ships no other code"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "hocket"

[tool.flwr.app.components]
serverapp = "hocket.deploy.server_app:app"
clientapp = "hocket.deploy.client_app:app"

[tool.flwr.app.config]
recipe = ""
folder = ""
"""
RECIPE = """name = "{name}"
turns = 20

[model]
source = "smollm2-135m-instruct"

[data]
source = "at the sites"            # each site names its own in its site.toml
max_length = 256
# heldout_source = "heldout.jsonl" # rows on the server, if the model is to be scored there

[method]
name = "fedit"
rank = 8

[schedule]
name = "sync"

[training]
lr = 3e-4
batch_size = 4
local_steps = 8

[clients]
count = {count}

[deployment]
sites = [{sites}]
"""
SITE = """name = "{site}"
superlink = "{host}:{port}"
certificate = "ca.crt"
key = "node.key"

[data]
source = "rows.jsonl"              # this site's rows; neither they nor this path leave the machine
"""
NGINX = """# Only what sites need of the SuperLink; everything else of its interface must stay unreachable.
server {{
    listen {port} ssl;
    server_name {host};
    ssl_certificate     /etc/hocket/server.pem;
    ssl_certificate_key /etc/hocket/server.key;
    client_max_body_size 64m;      # Flower sends arrays in pieces of 5 MiB
    proxy_read_timeout 300s;
    proxy_request_buffering off;

    location /v1/fleet/ {{
        proxy_pass https://127.0.0.1:{inner};
        proxy_ssl_trusted_certificate /etc/hocket/ca.crt;
        proxy_ssl_verify on;
        proxy_ssl_name localhost;
        proxy_set_header Host $host;
    }}
    location / {{ return 404; }}
}}
"""
SERVICE = """[Unit]
Description=hocket: {what}
After=network-online.target
Wants=network-online.target

[Service]
User=hocket
UMask=0077
WorkingDirectory={folder}
ExecStart=/opt/hocket/bin/hocket {command}
Restart=always
RestartSec=15
NoNewPrivileges=true
ProtectSystem=full
ProtectHome=read-only
PrivateTmp=true

[Install]
WantedBy=multi-user.target
"""


def init(out: Path, sites: Sequence[str], host: str, port: int = 9443, inner: int = 18000, days: int = 825) -> Path:
    """Write everything into `out`.

    Args:
        sites: names: letters, digits, `-` and `_`.
        host: name or address at which sites reach the server.
        port: at which they do; `inner` is the SuperLink's own, on the loopback interface.
        days: that certificates are valid.

    Raises:
        StoreError: the folder is there already, or a name cannot be used.
    """
    for name in sites:
        if not name or not all(c.isalnum() or c in "-_" for c in name):
            raise StoreError(f"'{name}' is no name of a site; use letters, digits, - and _")
    if len(set(sites)) != len(sites) or not sites:
        raise StoreError("give each site a name of its own")
    if out.exists():
        raise StoreError(f"'{out}' is there already, with its keys; choose another folder")
    server = out / "server"
    server.mkdir(parents=True)
    app(server / "app")
    _certificates(server, host, days)
    named = ", ".join(f'"{s}"' for s in sites)
    (server / "recipe.toml").write_text(RECIPE.format(name=out.name, count=len(sites), sites=named))
    (server / "nginx.conf").write_text(NGINX.format(host=host, port=port, inner=inner))
    command = f"serve recipe.toml --server . --port {port} --inner {inner} --out run"
    (server / "hocket-server.service").write_text(
        SERVICE.format(what="the server", folder="/etc/hocket", command=command)
    )
    (server / "nodes").mkdir()
    for name in sites:
        site = out / "sites" / name
        site.mkdir(parents=True)
        _node_key(site / "node.key", server / "nodes" / f"{name}.pub", name)
        shutil.copy(server / "ca.crt", site / "ca.crt")
        (site / "site.toml").write_text(SITE.format(site=name, host=host, port=port))
        (site / "hocket-site.service").write_text(
            SERVICE.format(what=f"site {name}", folder="/etc/hocket", command="join site.toml")
        )
    return out


def app(folder: Path) -> Path:
    """What Flower ships to its processes: no code, only the names of the installed hocket's two apps."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    return folder


def _secret(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as f:
        f.write(data)


def _crypto() -> Any:
    try:
        from cryptography import x509
    except ImportError as error:
        raise StoreError("keys and certificates need Flower's packages: pip install 'hocket[flower]'") from error
    return x509


def _certificates(folder: Path, host: str, days: int) -> None:
    """An authority of this deployment's own, and the server's certificate, for `host` and the loopback interface."""
    x509 = _crypto()
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC)
    until = now + datetime.timedelta(days=days)
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    keys = {n: ec.generate_private_key(ec.SECP384R1()) for n in ("ca", "server")}
    for name, key in keys.items():
        _secret(folder / f"{name}.key", key.private_bytes(*plain))
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"hocket {host}")])
    try:
        named: Any = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        named = x509.DNSName(host)
    alternatives = [named, x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]

    def certificate(subject: Any, key: Any) -> Any:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(authority).public_key(key.public_key())
        return builder.serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(until)

    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    ca = (
        certificate(authority, keys["ca"])
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(keys["ca"].public_key()), critical=False)
        .sign(keys["ca"], hashes.SHA384())
    )
    own = (
        certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])]), keys["server"])
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys["ca"].public_key()), critical=False)
        .sign(keys["ca"], hashes.SHA384())
    )
    (folder / "ca.crt").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(own.public_bytes(serialization.Encoding.PEM))


def _node_key(private: Path, public: Path, name: str) -> None:
    """A key pair in OpenSSH's format, as Flower wants it."""
    _crypto()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    _secret(private, key.private_bytes(*form))
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    public.write_bytes(line + f" {name}\n".encode())
