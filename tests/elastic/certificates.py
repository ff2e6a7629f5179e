"""Certificates for the tests, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["Certificates"]


class Certificates:
    """An authority, and what it has signed for the members and for a client; PEM files."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "client.pem", folder / "client.k"
        self.server_cert, self.server_key = folder / "server.pem", folder / "server.k"
        own = ("-keyout", folder / "ca.k", "-out", self.ca)
        self._openssl("req", "-x509", "-days", "9", "-subj", "/CN=tests-ca", *own, *self._NEW_KEY)
        # etcd's members are clients of themselves too.
        self._sign("server", f"subjectAltName=IP:{host},DNS:localhost")
        self._sign("client", "keyUsage=digitalSignature")

    _NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")

    def _sign(self, name: str, extension: str) -> None:
        key, request, cert = (self._folder / f"{name}.{ending}" for ending in ("k", "csr", "pem"))
        wish = ("-keyout", key, "-out", request, "-subj", f"/CN={name}")
        self._openssl("req", "-new", *self._NEW_KEY, *wish)
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(f"{extension}\n")
        by = ("-CA", self.ca, "-CAkey", self._folder / "ca.k", "-CAcreateserial", "-days", "9")
        self._openssl("x509", "-req", "-in", request, "-out", cert, *by, "-extfile", extensions)

    @staticmethod
    def _openssl(*args: object) -> None:
        subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)
